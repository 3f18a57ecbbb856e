"""Features are best at an intermediate noise level: representation dynamics.

*Mixture.* Classes on orthogonal subspaces, with noise in those of the others. The class signal of
the denoised examples over the rest (the class-signal-to-noise ratio) against the noise level: of
the exact denoiser, of a low-rank autoencoder trained on samples, and by the theory's formula,
beside the published ratios of a trained one. Beside it the accuracy of a probe by nearest
neighbours on the autoencoder's gated features, and of the larger energy.

*Images.* A network is trained on N images without their labels, and probes are trained on its
features of noisy labelled images: accuracy on held-out images against the noise level, for each N,
early and late in training, with the share of copied samples that tells generalization from
memorization; the ratio of the features; and several levels together under label noise. Digits, or
``--data PATH`` (Fashion-MNIST, CIFAR-10, ...), by an MLP or a U-Net. Digits are nearly separable
without noise: there a linear probe hardly gains from noise.

References:
    Li et al. 2025, arXiv 2502.05743 (figures, table 4).
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._tables import write_csv
from lowdim_diffusion import (
    data,
    denoisers,
    distributions,
    generalization,
    linalg,
    losses,
    networks,
    reporting,
    sampling,
    schedules,
    solvers,
    training,
)

SCHEDULE = schedules.VE()
SIGMAS = (0.002, 0.008, 0.023, 0.06, 0.14, 0.296, 0.585, 1.088, 1.923)
OPTIMAL = {
    "K = 2": (25.1, 25.1, 25.4, 27.1, 36.3, 58.7, 21.8, 4.06, 1.62),
    "K = 3": (12.4, 12.4, 12.5, 13.4, 18.0, 30.4, 13.1, 2.46, 0.82),
    "K = 10": (1.23, 1.23, 1.24, 1.27, 1.45, 1.99, 1.81, 0.52, 0.17),
}
"""The exact denoiser's ratio, from 4000 samples per class."""
PUBLISHED = (24.88, 25.15, 26.95, 35.84, 58.27, 20.84, 4.05, 1.57)
"""Of a trained autoencoder, K = 2, from the second level on (table 4)."""
PUBLISHED_CIFAR = (93.7, 94.9, 95.2, 94.1, 91.4, 85.3, 73.0, 56.2)
"""Accuracy of logistic regression on EDM's features of CIFAR-10, from the second level on."""
PUBLISHED_ENSEMBLE = {
    0.0: (67.2, 72.0),
    0.2: (62.9, 67.8),
    0.4: (59.2, 64.7),
    0.6: (53.2, 60.0),
    0.8: (40.1, 48.2),
}
"""Share of wrong labels to accuracy of the best level and of five together (EDM, miniImageNet)."""


class Mixture(NamedTuple):
    """Classes on orthogonal subspaces."""

    num_classes: int
    dim: int
    rank: int
    cross_std: float


MIXTURES = {
    "K = 2": Mixture(2, 50, 5, 0.2),
    "K = 3": Mixture(3, 50, 5, 0.2),
    "K = 10": Mixture(10, 100, 5, 0.3),
}


class Preset(NamedTuple):
    """Sizes of the experiment."""

    mixtures: tuple[str, ...]
    starts: int
    """Trainings of an autoencoder, of which that of least loss is kept."""
    mixture_steps: int
    num_judged: int
    """Samples of a mixture that the ratio is taken over."""
    counts: tuple[int, ...]
    """N, images to train on."""
    width: int
    """Of the MLP; the U-Net has a quarter of it as channels."""
    checkpoints: tuple[int, ...]
    """Training steps after which features are probed."""
    num_labelled: int
    num_seeds: int
    """Splits of the images, each with networks of its own."""
    num_samples: int
    """Drawn to be compared with the training images."""


PRESETS = {
    "smoke": Preset(("K = 2",), 2, 60, 2000, (50, 200), 32, (20, 60), 100, 1, 50),
    "cpu": Preset(
        *(("K = 2", "K = 3"), 3, 1500, 20_000),
        *((100, 400, 1600), 128, (500, 6000), 200, 2, 100),
    ),
    "paper": Preset(
        *(("K = 2", "K = 3", "K = 10"), 8, 9400, 100_000),
        *((256, 1024, 4096, 16_384, 32_768), 512, (4000, 40_000, 400_000), 10_000, 1, 1000),
    ),
}

# ---- mixture ------------------------------------------------------------------------------------


def train_autoencoder(
    key: Any, x: jax.Array, case: Mixture, preset: Preset
) -> tuple[networks.Network, Any]:
    """Return the low-rank autoencoder of the noisy mixture and its parameters, of least loss.

    From some starts two subspaces share what belongs to one, and training stays there.
    """
    net = networks.make(
        "lowrank",
        data_shape=x.shape[1:],
        num_components=case.num_classes,
        rank=case.rank,
        joint=True,
        cross_std=case.cross_std,
    )
    loss_fn = losses.make_loss(
        *(net, SCHEDULE),
        parametrization="x0",
        weight=losses.uniform_weight(),
        level=losses.log_uniform(0.05, 3.0),
    )
    steps = preset.mixture_steps

    def batch(key: Any, step: Any) -> dict[str, jax.Array]:
        return {"x": x[jax.random.randint(jax.random.fold_in(key, step), (256,), 0, len(x))]}

    def start(key: Any) -> tuple[Any, jax.Array]:
        init_key, fit_key = jax.random.split(key)
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, steps))
        params, metrics = training.fit(
            fit_key, net.init(init_key), loss_fn, optimizer, batch, steps
        )
        return params, metrics["loss"][-max(steps // 10, 1) :].mean()

    params, loss = jax.lax.map(start, jax.random.split(key, preset.starts))
    return net, jax.tree.map(lambda leaf: leaf[jnp.argmin(loss)], params)


def study_mixture(key: Any, case: Mixture, preset: Preset) -> dict[str, jax.Array]:
    """Return ratios and accuracies, ``[levels]`` each."""
    keys = jax.random.split(key, 5)
    bases = linalg.random_frames(keys[0], *case[:3], orthogonal=True)
    p = distributions.MoLRG.noisy(bases, case.cross_std)
    net, params = train_autoencoder(keys[1], p.sample(keys[2], 12_000)[0], case, preset)
    x, labels = p.sample(keys[3], preset.num_judged)
    ratio = lambda fn: (
        generalization.denoiser_snr(keys[4], fn, SCHEDULE, SIGMAS, x, labels, bases).overall
    )
    half = min(len(x) // 2, 4000)
    parts = x[:half], labels[:half], x[half : 2 * half], labels[half : 2 * half], case.num_classes
    judge = lambda features_fn, fit: (
        generalization.probe_curve(keys[4], features_fn, SCHEDULE, SIGMAS, *parts, fit=fit).accuracy
    )
    inside = lambda x_t, t: jnp.einsum("knd,bn->bkd", bases, x_t, precision="highest")
    energies = lambda x_t, t: jnp.sum(inside(x_t, t) ** 2, axis=-1)
    gated = functools.partial(denoisers.features, net, params, SCHEDULE, taps="gated")
    return {
        "exact": ratio(p.denoiser(SCHEDULE)),
        "trained": ratio(denoisers.from_network(net, params, SCHEDULE)),
        "neighbors": judge(gated, generalization.neighbor_probe),
        "energies": judge(energies, lambda *unused: lambda scores: scores),
    }


def mixture(report: reporting.Report, options: argparse.Namespace) -> None:
    """Write ``mixture.csv``, figures and a section."""
    preset, out = PRESETS[options.preset], options.out
    report.section(
        "Mixture",
        "Class signal over the rest of the denoised examples (a ratio of expectations). The "
        "reference is Monte Carlo, with 4000 samples per class; published is a trained "
        "autoencoder. The formula is good below the peak only.",
    )
    rows = []
    for name in preset.mixtures:
        start, case = time.perf_counter(), MIXTURES[name]
        study = jax.jit(lambda key, case=case: study_mixture(key, case, preset))
        found = {k: np.asarray(v) for k, v in study(jax.random.key(options.seed)).items()}
        formula = generalization.approximate_class_snr(
            SIGMAS, case.num_classes, case.rank, case.cross_std
        )
        found["formula"] = np.asarray(formula)
        published = (np.nan, *PUBLISHED) if name == "K = 2" else (np.nan,) * len(SIGMAS)
        mine = [
            {"mixture": name, "sigma": sigma, "reference": OPTIMAL[name][i]}
            | {"published": published[i]}
            | {key: float(value[i]) for key, value in found.items()}
            for i, sigma in enumerate(SIGMAS)
        ]
        rows += mine
        shown = ("reference", "published", "exact", "trained", "formula")
        percent = ("neighbors", "energies")
        table = [
            [f"{row['sigma']:g}", *(f"{row[k]:.3g}" for k in shown)]
            + [f"{row[k]:.1%}" for k in percent]
            for row in mine
        ]
        report.text(f"{name}, n = {case.dim}, d = {case.rank}, δ = {case.cross_std}:")
        report.table(["σ", *shown, *percent], table)
        off = np.abs(found["trained"] / found["exact"] - 1).max()
        seconds = time.perf_counter() - start
        print(f"{name}: trained within {off:.1%} of the exact ratio ({seconds:.0f} s)", flush=True)
        lines = {label: (SIGMAS, found[label]) for label in ("exact", "trained")}
        figure = reporting.figures.curves(
            lines,
            xlabel="noise level σ",
            ylabel="class signal / noise",
            xscale="log",
            yscale="log",
        )
        axes = figure.axes[0]
        axes.lines[1].set_linestyle("--")  # it lies on the first
        ring: Any = {"markersize": 9, "markerfacecolor": "none"}
        draw: Any = functools.partial(axes.plot, SIGMAS)
        ink = {"color": reporting.figures.INK}
        draw(OPTIMAL[name], marker="o", linestyle="", label="reference", **ring, **ink)
        draw(published, marker="x", linestyle="", label="published, trained", **ink)
        draw(formula, linestyle=":", label="formula", **ink)
        axes.legend()
        stem = f"mixture_{case.num_classes}"
        figure.savefig(out / f"{stem}.png", dpi=150)
        report.figure(figure, caption=f"{name}: the ratio peaks at an intermediate noise level.")
    write_csv(out / "mixture.csv", rows)


# ---- images -------------------------------------------------------------------------------------

TAPS = {"mlp": "hidden_1", "unet": "decoder_0_0"}
"""Where features are read unless ``--tap`` says otherwise."""
NOISY_LABELS = tuple(PUBLISHED_ENSEMBLE)
HELD_OUT = 50  # at least so many images judge the probes
FAR = 1e4  # rows moved here are nobody's neighbours


class Images(NamedTuple):
    """Images in [-1, 1] with their classes."""

    name: str
    x: np.ndarray
    """``[N, h, w, c]``."""
    labels: np.ndarray
    num_classes: int


def load(options: argparse.Namespace, preset: Preset) -> Images:
    """Return the digits, or as many images of ``--data`` as the preset wants."""
    wanted = max(preset.counts) + 1000
    if options.data is None:
        found = data.load("digits")
    else:
        found = data.load(options.data, size=options.size, num_examples=wanted, seed=options.seed)
    if found.labels is None:
        raise SystemExit(f"{options.data}: probes need labels, and these images have none")
    labels = np.asarray(found.labels).astype(np.int32)
    return Images(found.name, found.floats(), labels, int(labels.max()) + 1)


class Model(NamedTuple):
    """How a network is made and trained."""

    net: networks.Network
    data_std: float
    tap: str


def model_of(options: argparse.Namespace, images: Images, preset: Preset) -> Model:
    """Return the network of the preset for these images."""
    shape, data_std = images.x.shape[1:], float(images.x.std())
    if options.network == "mlp":
        net = networks.make("mlp", data_shape=shape, width=preset.width, depth=3)
    else:
        net = networks.make("unet", data_shape=shape, channels=preset.width // 4)
    return Model(net, data_std, options.tap or TAPS[options.network])


def train(key: Any, model: Model, x: jax.Array, count: Any, at: tuple[int, ...]) -> Any:
    """Return the averaged parameters after each of the numbers of steps ``at``, on x[:count]."""
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    loss_fn = losses.make_loss(model.net, SCHEDULE, data_std=model.data_std)
    optimizer, average = optax.adam(1e-3), training.ema.classic(0.999)
    step = training.make_train_step(loss_fn, optimizer, ema=average)

    def update(state: Any) -> Any:
        rows = jax.random.randint(jax.random.fold_in(batch_key, state.step), (64,), 0, count)
        return step(state, {"x": x[rows]}, jax.random.fold_in(loss_key, state.step))[0]

    def until(state: Any, stop: Any) -> tuple[Any, Any]:
        state = jax.lax.while_loop(lambda state: state.step < stop, update, state)
        return state, state.averaged

    start = training.init_state(model.net.init(init_key), optimizer, ema=average)
    return jax.lax.scan(until, start, jnp.asarray(at))[1]


def study_images(
    point: dict[str, Any], images: Images, model: Model, preset: Preset
) -> dict[str, jax.Array]:
    """Train on ``count`` images; probe features at each level.

    The last ``num_labelled`` images to train on have labels for the probes, and those that no
    network is trained on judge them. Results are ``[checkpoints, levels]`` and, under label noise,
    ``linear [checkpoints, shares, levels]`` and ``ensemble [checkpoints, shares]``.
    """
    key = jax.random.fold_in(jax.random.key(point["seed"]), 1)
    most, count = max(preset.counts), point["count"]
    order = jax.random.permutation(key, len(images.x))
    x, y = jnp.asarray(images.x)[order], jnp.asarray(images.labels)[order]
    labelled = slice(most - preset.num_labelled, most)
    given, held_out = (x[labelled], y[labelled]), (x[most:], y[most:])
    train_key, probe_key, sample_key, label_key = jax.random.split(key, 4)
    averaged = train(jax.random.fold_in(train_key, count), model, x, count, preset.checkpoints)

    def wrong(share: jax.Array) -> jax.Array:
        flip_key, class_key = jax.random.split(label_key)
        flipped = jax.random.uniform(flip_key, given[1].shape) < share
        others = jax.random.randint(class_key, flipped.shape, 1, images.num_classes)
        return jnp.where(flipped, (given[1] + others) % images.num_classes, given[1])

    def look(params: Any) -> dict[str, jax.Array]:
        kind: Any = {"data_std": model.data_std}

        def features(x_t: jax.Array, t: Any) -> jax.Array:
            h = denoisers.features(model.net, params, SCHEDULE, x_t, t, taps=model.tap, **kind)
            return generalization.pool_features(h)

        def probe(labels: jax.Array, fit: Any) -> generalization.ProbeCurve:
            return generalization.probe_curve(
                *(probe_key, features, SCHEDULE, SIGMAS, given[0], labels),
                *(*held_out, images.num_classes),
                fit=fit,
            )

        def linear(share: jax.Array) -> tuple[jax.Array, jax.Array]:
            curve = probe(wrong(share), generalization.linear_probe)
            together = generalization.ensemble_scores(curve.scores, jnp.argmax(curve.accuracy))
            return curve.accuracy, generalization.probe_accuracy(together, held_out[1])

        def ratio(sigma: jax.Array) -> jax.Array:
            x_t = held_out[0] + sigma * jax.random.normal(probe_key, held_out[0].shape)
            h = features(x_t, sigma)
            return generalization.feature_snr(h, held_out[1], images.num_classes).overall

        denoise_fn = denoisers.from_network(model.net, params, SCHEDULE, **kind)
        made = sampling.sample(
            *(sample_key, denoise_fn, SCHEDULE, schedules.karras_grid(18)),
            (preset.num_samples, *model.net.data_shape),
            solver=solvers.heun(),
        ).x
        used = jnp.arange(len(x)) < count
        near = generalization.nearest(made, jnp.where(used[:, None, None, None], x, FAR), k=2)
        by_share, ensemble = jax.lax.map(linear, jnp.asarray(NOISY_LABELS))
        return {
            "linear": by_share,
            "ensemble": ensemble,
            "neighbors": probe(given[1], generalization.neighbor_probe).accuracy,
            "snr": jax.lax.map(ratio, jnp.asarray(SIGMAS)),
            "copied": jnp.mean(generalization.is_memorized(near), dtype=x.dtype),
        }

    return jax.lax.map(look, averaged)


def rows_of_images(values: dict[str, np.ndarray], preset: Preset) -> list[dict[str, Any]]:
    """Tidy rows, one per N, seed, checkpoint and noise level."""
    rows = []
    for n, seed, c in np.ndindex(values["copied"].shape):
        about = {"N": preset.counts[n], "seed": seed, "step": preset.checkpoints[c]}
        about["copied"] = float(values["copied"][n, seed, c])
        for i, sigma in enumerate(SIGMAS):
            found = {name: float(values[name][n, seed, c, i]) for name in ("neighbors", "snr")}
            linear = float(values["linear"][n, seed, c, 0, i])
            rows.append({**about, "sigma": sigma, "linear": linear, **found})
    return rows


def peak(curve: np.ndarray) -> tuple[float, float, float]:
    """Return where a curve is highest, how high, and how far above its value at least noise."""
    best = int(np.argmax(curve))
    return SIGMAS[best], float(curve[best]), float(curve[best] - curve[0])


def images(report: reporting.Report, options: argparse.Namespace) -> None:
    """Train, probe, and write ``images.csv``, ``label_noise.csv``, figures and a section."""
    preset, out = PRESETS[options.preset], options.out
    found = load(options, preset)
    counts = tuple(n for n in preset.counts if n + HELD_OUT <= len(found.x))
    if not counts:
        least = min(preset.counts) + HELD_OUT
        raise SystemExit(f"{found.name}: {len(found.x)} images, at least {least} are needed")
    most = max(counts)
    preset = preset._replace(counts=counts, num_labelled=min(preset.num_labelled, most))
    model = model_of(options, found, preset)
    values = training.sweep(
        functools.partial(study_images, images=found, model=model, preset=preset),
        {"count": preset.counts, "seed": range(preset.num_seeds)},
        batch_size=1,
        chunk=1,
        path=out / "chunks",
        progress=f"{found.name}, {options.network}",
    ).values
    write_csv(out / "images.csv", rows_of_images(values, preset))
    report.section(
        "Images",
        f"{found.name}: a network trained on N images without labels; probes on its features of "
        f"{preset.num_labelled} noisy labelled images, judged on {len(found.x) - most} others, "
        f"mean of {preset.num_seeds} splits.",
    )
    columns = ["probe", "N", "steps", "copied", "σ of the peak", "peak", "above σ = .002"]
    curves = {name: values[name] for name in ("neighbors", "snr")}
    curves = {"linear": values["linear"][..., 0, :], **curves}  # [N, seeds, checkpoints, levels]
    text = []
    for probe, curve in curves.items():
        for n, c in np.ndindex(len(preset.counts), len(preset.checkpoints)):
            sigma, height, gain = peak(curve[n, :, c].mean(0))
            shown = [f"{height:.1%}", f"{100 * gain:+.1f} points"]
            if probe == "snr":
                shown = [f"{height:.2f}", f"{gain:+.2f}"]
            copied = f"{values['copied'][n, :, c].mean():.0%}"
            where = [str(preset.counts[n]), str(preset.checkpoints[c]), copied]
            text.append([probe, *where, f"{sigma:g}", *shown])
    report.table(columns, text)
    published = ", ".join(
        f"{accuracy:g} ({sigma:g})"
        for sigma, accuracy in zip(SIGMAS[1:], PUBLISHED_CIFAR, strict=True)
    )
    report.text(f"Published in % (at σ), EDM's on all of CIFAR-10, linear: {published}.")
    for row in [columns, *text]:
        print("  ".join(f"{cell:>14}" for cell in row))
    names = ("accuracy, linear probe", "accuracy, nearest neighbours", "class signal / noise")
    for (probe, curve), name in zip(curves.items(), names, strict=True):
        mean, spread = curve.mean(1), curve.std(1)
        panels = {
            f"{step} steps": {
                f"N = {count}": (SIGMAS, mean[n, c], spread[n, c])
                for n, count in enumerate(preset.counts)
            }
            for c, step in enumerate(preset.checkpoints)
        }
        figure = reporting.figures.curve_panels(
            panels, xlabel="noise level σ", ylabels=[name] * len(panels), xscale="log"
        )
        figure.savefig(out / f"images_{probe}.png", dpi=150)
        report.figure(figure, caption=f"{name}, at {model.tap}: mean and spread over the splits.")
    label_noise(report, values, preset, out)


def label_noise(
    report: reporting.Report,
    values: dict[str, np.ndarray],
    preset: Preset,
    out: pathlib.Path,
) -> None:
    """Write ``label_noise.csv`` and a table: the best level and five together."""
    rows, text = [], []
    for i, share in enumerate(NOISY_LABELS):
        best = values["linear"][-1, :, -1, i].max(-1).mean()  # of the largest N, trained longest
        together = values["ensemble"][-1, :, -1, i].mean()
        published = PUBLISHED_ENSEMBLE[share]
        rows.append({"wrong": share, "best": float(best), "ensemble": float(together)})
        text.append(
            [f"{share:.0%}", f"{best:.1%}", f"{together:.1%}", *(f"{a:.1f} %" for a in published)]
        )
    write_csv(out / "label_noise.csv", rows)
    columns = ["wrong labels", "best level", "five together", "published, best", "published, five"]
    report.text(
        f"Linear probes fitted to some wrong labels, on the network of N = {preset.counts[-1]}. "
        "Published: EDM's on miniImageNet."
    )
    report.table(columns, text)
    for row in [columns, *text]:
        print("  ".join(f"{cell:>15}" for cell in row))


PARTS = {"mixture": mixture, "images": images}


def main() -> int:
    """Write the tables, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.representation_dynamics")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/representation_dynamics")
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--data", help="file or folder of labelled images; digits by default")
    parser.add_argument("--size", type=int, default=None, help="side of the images of --data")
    parser.add_argument("--network", choices=TAPS, default="mlp")
    parser.add_argument("--tap", help="where features are read; 'hidden_1' of the MLP by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = reporting.Report(
        "Representation dynamics", "features are best at an intermediate noise level"
    )
    for part in options.part:
        PARTS[part](report, options)
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
