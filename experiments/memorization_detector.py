"""Two detectors that need one model: of copies by features, of hallucinations by predictions.

*Copies.* A network is trained on digits, half of each batch from a few images shown over and over,
half from many shown rarely: it memorizes the former and generalizes on the latter. Samples are
labelled by their nearest training images, copies and new ones, and scored by the spread of the
network's features at every tap and noise level, and by its negative (*low spread*), since late
layers of networks in EDM's parametrization spread less on copies. Beside it stand a measure of how
spiky the features are whatever their size, and a baseline without features, how little denoising
changes the sample.
Tap and level are chosen on one half of the samples and judged on the other. Real images check it:
the copied ones, and as control those shown rarely, against held-out ones. All for a network that
predicts the clean image, as the theory's does, and for one in EDM's parametrization.

*Hallucinations.* A network trained on a mixture of narrow Gaussians also samples between its modes;
the variance of its predictions over the last steps tells which.

References:
    Zhang et al. 2025, arXiv 2512.20963 (copies); Aithal et al. 2024, arXiv 2406.09358
    (hallucinations).
"""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._tables import write_csv
from lowdim_diffusion import (
    corruption,
    data,
    denoisers,
    generalization,
    losses,
    networks,
    reporting,
    safety,
    sampling,
    schedules,
    solvers,
    training,
)

SIGMAS = (0.02, 0.06, 0.17, 0.3, 0.6, 1.0, 2.0)
PUBLISHED = {
    "LAION, Stable Diffusion 1.4": (0.987, 0.961, 0.067),
    "ImageNet, DiT": (0.995, 0.912, 0.015),
    "CIFAR-10, EDM": (0.998, 0.984, 0.020),
}
"""AUROC, true positives at 1 % false ones, seconds per sample; sigma about 0.17."""


class Preset(NamedTuple):
    """Sizes of the experiment."""

    num_copied: int
    num_once: int
    width: int
    num_steps: int
    num_samples: int
    num_judged: int
    """At most so many copies and so many new samples."""
    mixture_steps: int
    mixture_samples: int
    mixtures: tuple[str, ...]


PRESETS = {
    "smoke": Preset(8, 200, 64, 300, 200, 20, 300, 2000, ("1, 2, 3",)),
    "cpu": Preset(32, 900, 256, 6000, 4000, 200, 10_000, 40_000, ("1, 2, 3", "1, 2, 4, 5")),
    "paper": Preset(
        *(32, 900, 512, 30_000, 10_000, 500, 10_000, 100_000),
        ("1, 2, 3", "1, 2, 4, 5", "5 x 5 grid"),
    ),
}

# ---- copies -------------------------------------------------------------------------------------


MOST_OF_ONE = 5
"""Copies of one image that are judged: a model may copy one far more often than the others."""
SCORES = ("spread", "low spread", "spikiness", "stillness")
PARAMETRIZATIONS: tuple[corruption.Parametrization, ...] = ("x0", "edm")
SCHEDULE = schedules.VE()


class Digits(NamedTuple):
    """Digits in three parts, ``[N, 64]`` in [-1, 1]."""

    copied: np.ndarray
    once: np.ndarray
    held_out: np.ndarray


class Model(NamedTuple):
    """A trained network."""

    net: Any
    params: Any
    data_std: float
    parametrization: corruption.Parametrization

    def denoiser(self) -> Any:
        """Return what it stands for."""
        return denoisers.from_network(
            *(self.net, self.params, SCHEDULE),
            parametrization=self.parametrization,
            data_std=self.data_std,
        )

    def features(self, x: Any, sigma: Any, taps: Any) -> Any:
        """Return features of examples without noise, shown as if they were noisy at sigma."""
        return denoisers.features(
            *(self.net, self.params, SCHEDULE, x, sigma), taps=taps, data_std=self.data_std
        )


def digits(preset: Preset, seed: int) -> Digits:
    """Return the digits, shuffled and split."""
    images = data.digits().images
    x = (images.astype(np.float32) / 127.5 - 1).reshape(len(images), -1)
    x = x[np.random.default_rng(seed).permutation(len(x))]
    return Digits(*np.split(x, [preset.num_copied, preset.num_copied + preset.num_once]))


def train(
    parts: Digits, parametrization: corruption.Parametrization, preset: Preset, seed: int
) -> tuple[Model, np.ndarray]:
    """Return a network that half of its batches have shown the same few digits, and its samples."""
    data_std = float(np.concatenate(parts).std())
    net = networks.make("mlp", data_shape=parts.once.shape[1:], width=preset.width, depth=3)
    loss_fn = losses.make_loss(net, SCHEDULE, parametrization=parametrization, data_std=data_std)
    copied, once = jnp.asarray(parts.copied), jnp.asarray(parts.once)

    def batch_fn(key: Any, step: Any) -> dict[str, Any]:
        keys = jax.random.split(jax.random.fold_in(key, step))
        draw = lambda k, a: a[jax.random.randint(k, (64,), 0, len(a))]
        return {"x": jnp.concatenate([draw(keys[0], copied), draw(keys[1], once)])}

    init_key, fit_key, sample_key = jax.random.split(jax.random.key(seed), 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, preset.num_steps))
    ema = training.ema.classic(0.999)
    params, _ = jax.jit(
        lambda p: training.fit(fit_key, p, loss_fn, optimizer, batch_fn, preset.num_steps, ema=ema)
    )(net.init(init_key))
    model = Model(net, params, data_std, parametrization)
    shape, ts = (preset.num_samples, *net.data_shape), schedules.karras_grid(18)
    draw = lambda k: sampling.sample(
        k, model.denoiser(), SCHEDULE, ts, shape, solver=solvers.heun()
    )
    return model, np.asarray(jax.jit(lambda k: draw(k).x)(sample_key))


class Labelled(NamedTuple):
    """Samples known to be copies, and known not to be."""

    x: np.ndarray
    is_copy: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray


def label(samples: np.ndarray, parts: Digits, num_judged: int) -> Labelled:
    """Return copies (nearest training image 3 times nearer than the next) and new samples.

    Samples between the two, with the nearest at 1/3 to 1/2 of the next, are left out, and so are
    further copies of an image that many samples copy.
    """
    reference = np.concatenate([parts.copied, parts.once])
    near = generalization.nearest(samples, reference, k=2)
    distance, index = np.asarray(near.distance), np.asarray(near.index)[:, 0]
    is_copy = np.asarray(generalization.is_memorized(near))
    first = [np.flatnonzero(is_copy & (index == i))[:MOST_OF_ONE] for i in np.unique(index)]
    chosen = np.random.default_rng(0).permutation(np.concatenate(first))[:num_judged]
    new = np.flatnonzero(distance[:, 0] > distance[:, 1] / 2)[:num_judged]
    rows = np.concatenate([chosen, new])
    kinds = np.arange(len(rows)) < len(chosen)
    return Labelled(samples[rows], kinds, reference[index[rows]], distance[rows, 0])


def scores(model: Model, x: np.ndarray) -> dict[tuple[str, str, float], np.ndarray]:
    """Return ``(score, tap, sigma)`` to one number per example, high for a suspected copy."""

    def spikiness(h: jax.Array) -> jax.Array:
        return jnp.mean(h**4, axis=1) / jnp.mean(h**2, axis=1) ** 2

    @jax.jit
    def at(x: jax.Array, sigma: jax.Array) -> Any:
        found = model.features(x, sigma, model.net.taps)
        spread = {tap: safety.representation_spread(h) for tap, h in found.items()}
        spikes = {tap: spikiness(h) for tap, h in found.items()}
        return (
            spread,
            jax.tree.map(jnp.negative, spread),
            spikes,
            -jnp.mean((model.denoiser()(x, sigma) - x) ** 2, axis=1),
        )

    table = {}
    for sigma in SIGMAS:
        found = jax.tree.map(np.asarray, at(jnp.asarray(x), jnp.asarray(sigma)))
        for score, values in zip(SCORES, found, strict=True):
            by_tap = values if isinstance(values, dict) else {"": values}
            table |= {(score, tap, sigma): value for tap, value in by_tap.items()}
    return table


def judge(model: Model, x: np.ndarray, is_copy: np.ndarray, pair: str) -> list[dict[str, Any]]:
    """Return AUROC and true positive rate of every score, on all examples and on either half."""
    rows = []
    first = np.arange(len(is_copy)) % 2 == 0
    rates = jax.jit(lambda s, y: (safety.auroc(s, y), safety.true_positive_rate(s, y)))
    for (score, tap, sigma), values in scores(model, x).items():
        row = {"predicts": model.parametrization, "pair": pair, "score": score, "tap": tap}
        row |= {"sigma": sigma, "copies": int(is_copy.sum()), "others": int((~is_copy).sum())}
        for name, part in (("", first | True), ("_chosen_on", first), ("_judged_on", ~first)):
            found = rates(values[part], is_copy[part])
            row |= {f"auroc{name}": float(found[0]), f"tpr{name}": float(found[1])}
        rows.append(row)
    return rows


def seconds_per_sample(model: Model, x: np.ndarray, tap: str) -> float:
    """Return the time of one compiled spread at one tap, divided by the number of samples."""
    run = jax.jit(lambda x: safety.representation_spread(model.features(x, 0.17, tap)))
    run(x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) / len(x)


def figure_of_taps(rows: list[dict[str, Any]], score: str) -> Any:
    """AUROC against the noise level, one line per tap; dashed the baseline without features."""
    pick = lambda score, tap: [
        row["auroc"] for row in rows if (row["score"], row["tap"]) == (score, tap)
    ]
    taps = dict.fromkeys(row["tap"] for row in rows if row["tap"])
    figure = reporting.figures.curves(
        {tap: (SIGMAS, pick(score, tap)) for tap in taps},
        xlabel="noise level σ",
        ylabel=f"AUROC of the {score}",
        xscale="log",
        level=0.5,
    )
    axes = figure.axes[0]
    axes.plot(SIGMAS, pick("stillness", ""), "--", color=reporting.figures.INK, label="stillness")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def chosen_scores(model: Model, rows: list[dict[str, Any]], x: np.ndarray) -> list[list[str]]:
    """Return text: each score at the tap and level that are best on half of the first pair."""
    text = []
    for score in SCORES:
        of_score = [row for row in rows if row["score"] == score]
        names = list(dict.fromkeys(row["pair"] for row in of_score))
        first = [row for row in of_score if row["pair"] == names[0]]
        best = max(first, key=lambda row: row["auroc_chosen_on"])
        seconds = f"{seconds_per_sample(model, x, best['tap']):.1e}" if best["tap"] else ""
        for row in of_score:
            if (row["tap"], row["sigma"]) == (best["tap"], best["sigma"]):
                part = "_judged_on" if row["pair"] == names[0] else ""
                numbers = [f"{row[f'{rate}{part}']:.3f}" for rate in ("auroc", "tpr")]
                where = [score, row["tap"], f"{row['sigma']:g}"]
                text.append([model.parametrization, row["pair"], *where, *numbers, seconds])
    return text


def copies(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Train, score and judge; write ``copies.csv``, figures and a section."""
    parts = digits(preset, seed)
    held_out = parts.held_out[: preset.num_judged]
    rows, text = [], []
    report.section(
        "Copies",
        f"{preset.num_copied} digits shown in half of all batches, {preset.num_once} in the rest. "
        "Copies: samples whose nearest training image is 3 times nearer than the next; new: less "
        f"than 2 times; at most {MOST_OF_ONE} copies of one image. AUROC above 1/2: copies score "
        "higher.",
    )
    for parametrization in PARAMETRIZATIONS:
        start = time.perf_counter()
        model, samples = train(parts, parametrization, preset, seed)
        seconds = time.perf_counter() - start
        found = label(samples, parts, preset.num_judged)
        images = len(np.unique(found.nearest[found.is_copy], axis=0))
        counts = f"{found.is_copy.sum()} copies of {images} images and {(~found.is_copy).sum()} new"
        report.text(f"Network predicting {parametrization}: {counts}.")
        print(f"{parametrization}: trained and sampled in {seconds:.0f} s, {counts}", flush=True)
        pairs = {
            "copies, new samples": (found.x[found.is_copy], found.x[~found.is_copy]),
            "copied, held-out images": (parts.copied, held_out),
            "seen once, held-out images": (parts.once[: preset.num_judged], held_out),
        }
        mine = []
        for pair, (x, others) in pairs.items():
            if min(len(x), len(others)) < 4:  # two in each half
                report.note(f"{parametrization}, {pair}: {counts}, too few to judge.")
                continue
            both = np.concatenate([x, others])
            mine += judge(model, both, np.arange(len(both)) < len(x), pair)
        rows += mine
        text += chosen_scores(model, mine, found.x)
        generated = [row for row in mine if row["pair"] == "copies, new samples"]
        if generated:
            draw_copies(report, out, parametrization, generated, found)
    columns = ["predicts", "pair", "score", "tap", "σ", "AUROC", "TPR at 1 %", "s / sample"]
    for name, values in PUBLISHED.items():
        numbers = (f"{value:.3f}" for value in values)
        text.append(["published", name, "spread", "", "0.17", *numbers])
    report.table(columns, text)
    report.text(
        "Tap and σ are chosen on one half of the first pair and judged on its other half, and on "
        "the other pairs as they are."
    )
    write_csv(out / "copies.csv", rows)
    for row in [columns, *text]:
        widths = (9, 27, 10, 8, 5, 6, 10, 10)
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)))


def draw_copies(
    report: reporting.Report,
    out: pathlib.Path,
    parametrization: str,
    rows: list[dict[str, Any]],
    found: Labelled,
) -> None:
    """Write AUROC curves and examples of both kinds."""
    for score in ("spread", "spikiness"):
        figure = figure_of_taps(rows, score)
        figure.savefig(out / f"{parametrization}_{score}.png", dpi=150)
        caption = f"Network predicting {parametrization}: {score} at each tap, copies and new."
        report.figure(figure, caption=caption)
    kinds = (found.is_copy, ~found.is_copy)
    shown = np.concatenate([np.flatnonzero(kind)[:6] for kind in kinds])
    pictures = lambda x: x[shown].reshape(-1, 8, 8, 1)
    figure = reporting.figures.nearest_pairs(
        pictures(found.x), pictures(found.nearest), found.distance[shown]
    )
    figure.savefig(out / f"{parametrization}_samples.png", dpi=150)
    report.figure(figure, caption="Copies, then new samples, above their nearest training images.")


# ---- hallucinations -----------------------------------------------------------------------------


def modes_of(name: str) -> tuple[np.ndarray, float]:
    """Return the modes ``[K, n]`` of a mixture and their standard deviation."""
    if (
        name == "5 x 5 grid"
    ):  # modes at -4 .. 4, standard deviation .05, all scaled to unit variance
        side = 2 * np.arange(-2, 3) / 8**0.5
        return np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), 0.05 / 8**0.5
    return np.array([[float(mode)] for mode in name.split(",")]), 0.05


class Run(NamedTuple):
    """Samples of a mixture and the predictions of the last steps."""

    x: np.ndarray
    hallucinated: np.ndarray
    x0_hats: np.ndarray
    sigmas: np.ndarray


NUM_STEPS, LAST = 250, 30


def sample_mixture(name: str, preset: Preset, seed: int) -> Run:
    """Train on a mixture as published, with fewer steps of diffusion, and sample."""
    modes, std = modes_of(name)
    schedule = schedules.VPLinear(1.0, 20.0)  # beta from .004 to .08 in 250 steps
    net = networks.make("mlp", data_shape=modes.shape[1:], width=80, depth=2)
    loss_fn = losses.make_loss(
        *(net, schedule),
        parametrization="eps",
        weight=losses.snr_weight(),
        level=losses.uniform(),
        data_std=1.0,
    )
    mode_key, noise_key, init_key, fit_key, sample_key = jax.random.split(jax.random.key(seed), 5)
    x = jnp.asarray(modes)[jax.random.randint(mode_key, (20_000,), 0, len(modes))]
    x = x + std * jax.random.normal(noise_key, x.shape)

    def batch_fn(key: Any, step: Any) -> dict[str, Any]:
        return {"x": x[jax.random.randint(jax.random.fold_in(key, step), (256,), 0, len(x))]}

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, preset.mixture_steps))
    params, _ = jax.jit(
        lambda p: training.fit(fit_key, p, loss_fn, optimizer, batch_fn, preset.mixture_steps)
    )(net.init(init_key))
    denoise_fn = denoisers.from_network(net, params, schedule, parametrization="eps", data_std=1.0)
    ts = schedules.uniform_grid(schedule, NUM_STEPS, t_min=1 / NUM_STEPS, t_max=1.0)

    @jax.jit
    def draw(key: Any) -> Any:
        result = sampling.sample_batched(
            *(key, denoise_fn, schedule, ts, (preset.mixture_samples, modes.shape[1])),
            solver=solvers.ancestral(1.0),
            batch_size=4000,
            save="denoised",
        )
        assert result.trajectory is not None and result.ts is not None
        last = result.ts[-LAST:]
        return result.x, result.trajectory[-LAST:], schedule.sigma(last) / schedule.alpha(last)

    samples, x0_hats, sigmas = jax.tree.map(np.asarray, draw(sample_key))
    gaps = np.linalg.norm(samples[:, None] - modes[None], axis=-1).min(1)
    return Run(samples, gaps > 6 * std, x0_hats, sigmas)


def hallucinations(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Train, sample and filter; write ``hallucinations.csv``, a figure and a section."""
    report.section(
        "Hallucinations",
        "Samples more than 6 standard deviations from every mode. The score is the variance of the "
        "predicted clean sample over the last steps; the share removed is at a threshold that "
        "keeps 96 % of the other samples. Published: over 95 %.",
    )
    rows, lines = [], {}
    rates = jax.jit(lambda s, y: (safety.auroc(s, y), safety.true_positive_rate(s, y, 0.04)))
    for name in preset.mixtures:
        start = time.perf_counter()
        run = sample_mixture(name, preset, seed)
        share = float(run.hallucinated.mean())
        seconds = time.perf_counter() - start
        print(f"modes {name}: {share:.2%} hallucinated ({seconds:.0f} s)", flush=True)
        if not 0 < share < 1:
            continue
        mine = []
        for count in range(2, LAST + 1):
            score = safety.trajectory_variance(run.x0_hats[-count:])
            area, removed = rates(score, run.hallucinated)
            mine.append(
                {
                    "modes": name,
                    "last_steps": count,
                    "sigma": float(run.sigmas[-count]),
                    "hallucinated": share,
                    "auroc": float(area),
                    "removed": float(removed),
                }
            )
        rows += mine
        lines[f"modes {name}"] = [[row[key] for row in mine] for key in ("last_steps", "removed")]
    if not rows:
        report.note("No hallucinations, or nothing else: train longer, or draw more samples.")
        return
    write_csv(out / "hallucinations.csv", rows)
    figure = reporting.figures.curves(
        lines, xlabel="last steps in the window", ylabel="share removed", level=0.95
    )
    figure.axes[0].set_ylim(0, 1.02)
    figure.savefig(out / "hallucinations.png", dpi=150)
    report.figure(figure, caption="Hallucinations removed when 96 % of the others are kept.")
    columns = ["modes", "hallucinated", "last steps", "up to σ", "AUROC", "removed"]
    text = []
    for row in rows:
        if row["last_steps"] in (4, 5, 6, 7, 10, 25):
            where = (f"{row['hallucinated']:.2%}", str(row["last_steps"]), f"{row['sigma']:.3f}")
            text.append([row["modes"], *where, f"{row['auroc']:.3f}", f"{row['removed']:.1%}"])
    report.table(columns, text)
    for row in [columns, *text]:
        print("  ".join(f"{cell:>12}" for cell in row))


def main() -> int:
    """Write the tables, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.memorization_detector")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/memorization_detector")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = reporting.Report(
        "Detectors that need one model", "copies by features, hallucinations by predictions"
    )
    for part in options.part:
        PARTS[part](report, PRESETS[options.preset], options.out, options.seed)
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


PARTS = {"copies": copies, "hallucinations": hallucinations}


if __name__ == "__main__":
    raise SystemExit(main())
