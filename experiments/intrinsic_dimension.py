"""Intrinsic dimension of image sets by their neighbours, and of an exact law by its denoiser.

- Data: every estimator of ``subspaces.dimension`` that reads samples, on the built-in digits and,
  with ``--data DIR``, on ``DIR/mnist``, ``DIR/fashion-mnist``, ``DIR/cifar10``,
  ``DIR/extended-yale-b`` (48x42 pixels) and ``DIR/coil20`` where they are.
  Beside each estimate stands a float64 reference on the same examples, and the published number,
  each in its own normaliser: the published MLE values are the k - 2 variant of the inverse mean,
  which at k = 3 is half of the unbiased one.
- Denoiser: FLIPD, the normal bundle and the Jacobian's rank against the noise level, with the exact
  posterior mean of three subspaces of dimension 3, 6 and 9 in R^50.

References:
    Pope et al. 2021, arXiv 2104.08894 (MLE of MNIST and CIFAR-10, k = 3, 5, 10, 20, training sets);
    Kamkari et al. 2024, arXiv 2406.03537; Stanczuk et al. 2024, arXiv 2212.12611.
"""

import argparse
import csv
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import data, linalg, reporting, schedules
from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.subspaces import dimension

KS = (3, 5, 10, 20)
FOLDERS = {
    "MNIST": ("mnist", "MNIST"),
    "Fashion-MNIST": ("fashion-mnist", "fashion_mnist", "FashionMNIST"),
    "CIFAR-10": ("cifar10", "cifar-10", "cifar-10-batches-py"),
    "Extended Yale B": ("extended-yale-b", "CroppedYale"),
    "COIL-20": ("coil20", "coil-20"),
}
SPLITS = {"CIFAR-10": "train", "Extended Yale B": None, "COIL-20": None}
"""Where the preset's split is not meant: the first examples of CIFAR-10 are its first batch's."""
PREFERRED = {"CIFAR-10": "*python*", "Extended Yale B": "*48x42*"}
"""The archive meant where a folder holds several: the lossless one, the one of reduced size."""

PUBLISHED = {"MNIST": (7, 11, 12, 13), "CIFAR-10": (13, 21, 25, 26)}
"""Pope et al. 2021, inverse mean with k - 2 at k = 3, 5, 10, 20; whole training sets."""

_COLUMNS = (
    ("MLE, inverse mean", 10, "k-1"),
    ("MLE, inverse mean", 20, "k-1"),
    ("MLE, mean", 20, "k-2"),
    ("TwoNN, fit", 2, "90 %"),
    ("TwoNN, maximum likelihood", 2, "N"),
    ("PCA, 90 % of variance", None, ""),
    ("PCA, 95 % of variance", None, ""),
    ("PCA, 99 % of variance", None, ""),
    ("PCA, participation ratio", None, ""),
)
_MEASURED: dict[tuple[str, str, int], tuple[float, ...]] = {
    # digits: scikit-dimension 0.5.0; the rest: numpy and scikit-learn, exact float64 distances.
    ("digits", "train", 500): (5.92, 5.19, 5.52, 7.68, 7.93),
    ("digits", "train", 1797): (7.42, 6.85, 7.32, 8.91, 9.06),
    ("MNIST", "test", 2000): (11.93, 11.58, 13.49, 13.21, 13.25, 84, 141, 296, 31.06),
    ("MNIST", "test", 10000): (12.25, 11.85, 13.06, 13.56, 13.56, 84, 149, 323, 29.39),
    ("MNIST", "train", 60000): (13.80, 13.37, 14.29, 14.90, 14.89, 87, 154, 331, 30.69),
    ("Fashion-MNIST", "test", 2000): (11.59, 10.61, 12.19, 14.02, 13.55, 75, 159, 386, 7.63),
    ("Fashion-MNIST", "test", 10000): (13.57, 12.79, 14.92, 15.69, 14.93, 83, 183, 446, 7.88),
    ("Fashion-MNIST", "train", 60000): (14.93, 14.55, 17.16, 15.64, 14.17, 84, 187, 459, 7.90),
    ("CIFAR-10", "train", 2000): (21.78, 19.45, 21.14, 27.92, 26.96, 94, 192, 517, 9.47),
    ("CIFAR-10", "train", 4000): (24.03, 21.73, 23.77, 30.08, 27.98, 96, 202, 581, 9.35),
    ("Extended Yale B", "", 2414): (6.67, 7.36, 8.45, 6.94, 7.30, 19, 48, 186, 3.79),
    ("COIL-20", "", 1440): (3.07, 3.35, 3.93, 6.28, 6.34, 40, 84, 262, 8.64),
}
REFERENCE = {
    (*key, *column): value
    for key, values in _MEASURED.items()
    for column, value in zip(_COLUMNS, values, strict=False)
}
"""``(set, split, examples, estimator, k, normaliser)`` to a value computed elsewhere."""


class Preset(NamedTuple):
    """Sizes of the experiment."""

    split: str
    num_examples: int | None
    num_local: int
    """Examples for local PCA, one eigenproblem each."""
    num_neighbors: int
    """Its k."""
    num_points: int
    num_sigmas: int


PRESETS = {
    "smoke": Preset("test", 500, 200, 50, 12, 4),
    "cpu": Preset("test", 10_000, 2000, 100, 300, 14),
    "paper": Preset("train", None, 2000, 100, 2000, 28),
}


class Row(NamedTuple):
    """One estimate; a field that does not apply is None or empty."""

    data: str
    split: str
    num_samples: int
    estimator: str
    k: int | None
    normalizer: str
    sigma: float | None
    true: int | None
    estimate: float
    std: float | None
    reference: float | None
    published: float | None


# ---- samples ------------------------------------------------------------------------------------


def image_sets(root: pathlib.Path | None, preset: Preset) -> dict[tuple[str, str], np.ndarray]:
    """Return ``(name, split)`` to ``[N, n]`` pixels in [0, 1]: the digits, and what is found."""
    found = {("digits", "train"): data.load("digits")}
    for name, folders in FOLDERS.items() if root is not None else ():
        folder = next((root / f for f in folders if (root / f).exists()), None)
        if folder is None:
            continue
        split = SPLITS.get(name, preset.split)
        found[name, split or ""] = _load(folder, split, PREFERRED.get(name))
    limit = preset.num_examples
    if root is not None and len(found) == 1:
        names = ", ".join(folders[0] for folders in FOLDERS.values())
        raise SystemExit(f"--data {root}: none of the folders {names} is there")
    sets = {}
    for (name, split), dataset in found.items():
        most = 4000 if name == "CIFAR-10" and limit == 10_000 else limit
        x = dataset.images[:most]
        x = x.reshape(len(x), -1).astype(np.float32)
        sets[name, split] = x / 255 if dataset.images.dtype == np.uint8 else (x + 1) / 2
    return sets


def _load(folder: pathlib.Path, split: str | None, preferred: str | None) -> data.Dataset:
    """What the folder holds, or, of several archives in it, the one that is meant."""
    try:
        return data.load(folder, split=split)
    except data.DataError:
        archives = sorted(folder.glob(preferred)) if preferred and folder.is_dir() else []
        if not archives:
            raise
        return data.load(archives[0], split=split)


@jax.jit
def _estimates(x: jax.Array) -> dict[tuple[str, int | None, str], jax.Array]:
    """One search and one eigenproblem for all: ``(estimator, k, normalizer)`` to a value."""
    near = dimension.neighbors(x, max(KS))
    values: dict[tuple[str, int | None, str], jax.Array] = {}
    for normalizer in ("k-1", "k-2"):
        several = dimension.mle(near, KS, normalizer=normalizer)
        values |= {("MLE, inverse mean", k, normalizer): several[i] for i, k in enumerate(KS)}
    for k in KS[2:]:  # at smaller k a few ties decide the mean
        values["MLE, mean", k, "k-2"] = dimension.mle(near, k, average="mean")
    values["TwoNN, fit", 2, "90 %"] = dimension.two_nn(near)
    values["TwoNN, maximum likelihood", 2, "N"] = dimension.two_nn(near, method="ml")
    for share in (90, 95, 99):
        count = dimension.global_pca(x, rule="ratio", threshold=share / 100)
        values[f"PCA, {share} % of variance", None, ""] = count
    values["PCA, participation ratio", None, ""] = dimension.global_pca(x, rule="participation")
    return values


def sample_estimates(name: str, split: str, x: np.ndarray, preset: Preset) -> list[Row]:
    """Every estimate that needs nothing but the samples, with what to compare it with."""
    rows = []
    values = _estimates(x)
    for estimator, k, normalizer in [
        *(("MLE, inverse mean", k, normalizer) for normalizer in ("k-1", "k-2") for k in KS),
        *(("MLE, mean", k, "k-2") for k in KS[2:]),
        *_COLUMNS[3:],
    ]:
        value = float(values[estimator, k, normalizer])
        reference = REFERENCE.get((name, split, len(x), estimator, k, normalizer))
        published = None
        if name in PUBLISHED and (estimator, normalizer) == ("MLE, inverse mean", "k-2"):
            published = PUBLISHED[name][KS.index(k)]
        row = (name, split, len(x), estimator, k, normalizer, None, None, value, None)
        rows.append(Row(*row, reference, published))
    few, k = x[: preset.num_local], preset.num_neighbors
    local = float(jax.jit(dimension.local_pca, static_argnums=1)(few, k))
    row = (name, split, len(few), "local PCA, over 5 % of the largest", k, "", None, None)
    return [*rows, Row(*row, local, None, None, None)]


# ---- denoiser -----------------------------------------------------------------------------------

RANKS = (3, 6, 9)
DIM = 50


def union(seed: int) -> MoLRG:
    """Three Gaussians on subspaces, variances .5 to 2, their means at distance 3 from 0."""
    frame_key, mean_key = jax.random.split(jax.random.key(seed))
    scales = np.zeros((len(RANKS), max(RANKS)))
    for i, rank in enumerate(RANKS):
        scales[i, :rank] = np.sqrt(np.linspace(0.5, 2, rank))
    means = jax.random.normal(mean_key, (len(RANKS), DIM))
    means = 3 * means / jnp.linalg.norm(means, axis=1, keepdims=True)
    frames = linalg.random_frames(frame_key, len(RANKS), DIM, max(RANKS))
    return MoLRG(frames, means=means, scales=jnp.asarray(scales))


DENOISER_ESTIMATORS = {
    "FLIPD": "flipd",
    "normal bundle": "normal_bundle",
    "Jacobian, root-energy rank": "jacobian_rank",
    "Jacobian, values over 1/2": "jacobian_above",
}
"""Name to file name."""


def denoiser_estimates(num_points: int, num_sigmas: int, seed: int) -> list[Row]:
    """Mean and spread of each estimator over points of each subspace, at each noise level."""
    p = union(seed)
    sample_key, noise_key = jax.random.split(jax.random.key(seed + 1))
    x, labels = p.sample(sample_key, num_points)
    schedule = schedules.VE(1e-3, 3.0)
    denoise_fn = p.denoiser(schedule)
    sigmas = jnp.geomspace(schedule.t_min, schedule.t_max, num_sigmas)

    def at(sigma: jax.Array) -> jax.Array:
        energy, above = (
            dimension.jacobian_rank(denoise_fn, schedule, x, sigma, rule=rule)
            for rule in ("energy", "above")
        )
        flipd = dimension.flipd(denoise_fn, schedule, x, sigma)
        normal = dimension.normal_bundle(noise_key, denoise_fn, schedule, x, sigma)
        return jnp.stack([flipd, *(a.astype(flipd.dtype) for a in (normal, energy, above))])

    values = np.asarray(jax.jit(lambda s: jax.lax.map(at, s))(sigmas))
    rows = []
    for i, rank in enumerate(RANKS):
        chosen = np.asarray(labels) == i
        for name, curve in zip(DENOISER_ESTIMATORS, values.swapaxes(0, 1), strict=True):
            for sigma, each in zip(np.asarray(sigmas).tolist(), curve[:, chosen], strict=True):
                row = (f"subspace of dimension {rank}", "", int(chosen.sum()), name, None, "")
                spread = float(each.std())
                rows.append(Row(*row, sigma, rank, float(each.mean()), spread, None, None))
    return rows


# ---- report -------------------------------------------------------------------------------------


def _legend_above(figure: Any) -> Any:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    figure.axes[0].legend(**place, ncols=3, fontsize=9, frameon=False)
    return figure


def figure_of_samples(rows: list[Row]) -> Any:
    """Estimates against k, unbiased and (dashed) as published."""
    lines, dashed = {}, {}
    for name in dict.fromkeys(row.data for row in rows):
        for curves, normalizer, label in ((lines, "k-1", name), (dashed, "k-2", f"_{name}")):
            mine = [r for r in rows if r.data == name and r.normalizer == normalizer]
            mine = [r for r in mine if r.estimator == "MLE, inverse mean"]
            curves[label] = ([r.k for r in mine], [r.estimate for r in mine])
    label = "number of neighbours k"
    figure = reporting.figures.curves(
        lines, xlabel=label, ylabel="estimated dimension", dashed=dashed
    )
    figure.axes[0].set_xticks(KS)
    figure.axes[0].set_ylim(0, None)
    published = [row for row in rows if row.published and row.num_samples >= 50_000]
    if published:
        points = [row.k for row in published], [row.published for row in published]
        figure.axes[0].plot(*points, "x", color=reporting.figures.INK, label="published")
    return _legend_above(figure)


def figure_of_denoiser(rows: list[Row], estimator: str) -> Any:
    """Estimates against the noise level, with the true dimension dashed."""
    lines, dashed = {}, {}
    for rank in RANKS:
        mine = [row for row in rows if row.estimator == estimator and row.true == rank]
        sigmas = [row.sigma for row in mine]
        spread = np.array([row.std for row in mine])
        lines[f"d = {rank}"] = (sigmas, [row.estimate for row in mine], spread)
        dashed[f"_{rank}"] = (sigmas, [rank] * len(mine))  # underscore: not in the legend
    figure = reporting.figures.curves(
        lines, xlabel="noise level σ", ylabel=estimator, xscale="log", dashed=dashed
    )
    figure.axes[0].set_ylim(0, 15)
    figure.axes[0].set_yticks((0, *RANKS, 12, 15))
    return _legend_above(figure)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value == round(value) else f"{value:.2f}"
    return "" if value is None else str(value)


def main() -> int:
    """Write ``intrinsic_dimension.csv``, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.intrinsic_dimension")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", type=pathlib.Path, help="folder with mnist/, cifar10/, ...")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/intrinsic_dimension")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    sets = image_sets(options.data, preset)
    out.mkdir(parents=True, exist_ok=True)

    samples: list[Row] = []
    for (name, split), x in sets.items():
        start = time.perf_counter()
        samples += sample_estimates(name, split, x, preset)
        seconds = time.perf_counter() - start
        print(f"{name} ({split}, {len(x)} x {x.shape[1]}): {seconds:.1f} s", flush=True)
    denoised = denoiser_estimates(preset.num_points, preset.num_sigmas, options.seed)

    with open(out / "intrinsic_dimension.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Row._fields, *samples, *denoised])

    report = reporting.Report("Intrinsic dimension", "from neighbours and from a denoiser")
    report.section(
        "Image sets",
        "Estimates from neighbours grow with the number of examples: compare equal sizes only. "
        "Reference: the same examples elsewhere in float64. Published: Pope et al. 2021 on whole "
        "training sets, whose normaliser is the inverse mean with k - 2.",
    )
    figure = figure_of_samples(samples)
    figure.savefig(out / "neighbours.png", dpi=150)
    report.figure(
        figure,
        caption="MLE, inverse mean, against k. Solid: with k - 1, unbiased. Dashed: with k - 2, as "
        "published, low by (k - 2)/(k - 1). Crosses: published, where the set is as large.",
    )
    columns = ["data", "examples", "estimator", "k", "normalizer", "estimate"]
    columns += ["reference", "published"]
    text = [
        [f"{r.data} {r.split}", *map(_text, (r.num_samples, r.estimator, r.k, r.normalizer))]
        + [_text(value) for value in (r.estimate, r.reference, r.published)]
        for r in samples
    ]
    report.table(columns, text)
    report.section(
        "Exact denoiser",
        f"Points on three subspaces of dimension {RANKS} in R^{DIM}, mean and standard deviation "
        "over points, dashed the truth. Each estimator is right where the noise is small beside "
        "the structure of the set; beyond, the normal bundle's largest gap may be anywhere.",
    )
    for estimator, name in DENOISER_ESTIMATORS.items():
        figure = figure_of_denoiser(denoised, estimator)
        figure.savefig(out / f"{name}.png", dpi=150)
        report.figure(figure, caption=estimator)
    report.write(out / "report.html")

    for row in [columns, *text]:
        left = "  ".join(f"{cell:<{w}}" for cell, w in zip(row, (19, 8, 34, 4, 10), strict=False))
        print(left, *(f"{cell:>9}" for cell in row[5:]))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
