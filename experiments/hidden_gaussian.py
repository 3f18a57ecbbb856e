"""Networks that generalize denoise as a Gaussian does: the hidden Gaussian structure.

Residual MLPs with EDM's preconditioning are trained on N images and compared, on noisy images that
they have not seen, with three other denoisers made from the same N images or from the network:

- **D_G**, the Gaussian with their mean and covariance (the Wiener filter);
- **D_L**, the best linear fit of the network, by least squares in closed form;
- **D_M**, the posterior mean of the N images themselves, which memorizes (compared on noisy
  versions of these images as well: elsewhere it is far from everything).

Three parts (``--part`` takes some of them): ``samples`` sweeps N and trains on disjoint halves,
``widths`` sweeps the width at N = 100, ``time`` looks at one network along its training. Digits are
built in; other images by ``--data PATH --size 14``.

References:
    Li, Dai, Qu 2024, arXiv 2410.24060, figures 1-8.
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
    losses,
    networks,
    reporting,
    sampling,
    schedules,
    solvers,
    training,
)

PARTS = ("samples", "widths", "time")
SIGMAS = np.asarray(schedules.karras_grid(10)[:-1])
MIDDLE = (SIGMAS > 0.1) & (SIGMAS < 20)
FAR = 1e4  # rows moved here have no weight in the posterior mean of the others
THREE = (2 / 3, 2 / 3, -1 / 3)  # keeps noise level and mean: affine denoisers score 1
SHOWN = 8


class Preset(NamedTuple):
    """Sizes of the experiment."""

    counts: tuple[int, ...]
    halves: tuple[int, ...]
    """Numbers of images that two networks get each, disjoint."""
    width: int
    widths: tuple[int, ...]
    num_steps: int
    checkpoints: tuple[int, ...]
    """Training steps at which the network of ``time`` is looked at."""
    batch_size: int
    num_draws: int
    num_samples: int
    num_seeds: int


PRESETS = {
    "smoke": Preset((30, 200), (30,), 16, (8, 16), 40, (20, 40), 32, 2, 16, 1),
    "cpu": Preset(
        (30, 100, 300, 1000, 1700),
        (30, 100, 300, 850),
        128,
        (16, 48, 128),
        4000,
        (125, 250, 500, 1000, 2000, 4000, 8000, 16000),
        64,
        16,
        100,
        1,
    ),
    "paper": Preset(
        (30, 100, 300, 1000, 1700),
        (30, 100, 300, 850),
        512,
        (16, 32, 64, 128, 256, 512),
        20000,
        (125, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000),
        256,
        32,
        1000,
        3,
    ),
}


def images(options: Any, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """Return the images to train on, in random order, and those kept apart."""
    most = max(*preset.counts, *(2 * half for half in preset.halves))
    if options.data is None:
        found = data.load("digits")
    else:
        wanted = most + 1000
        found = data.load(options.data, size=options.size, num_examples=wanted, seed=options.seed)
    x = found.floats(np.random.default_rng(options.seed).permutation(found.num_examples))
    apart = min(1000, len(x) - most)
    return x[:-apart], x[-apart:]


# ---- one network beside its three relatives -----------------------------------------------------


def train(key: Any, net: Any, loss_fn: Any, x: Any, count: Any, at: Any, size: int) -> Any:
    """Return the averaged parameters after each of the numbers of steps ``at``, on x[:count]."""
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    optimizer, average = optax.adam(1e-3), training.ema.classic(0.999)
    step = training.make_train_step(loss_fn, optimizer, ema=average)

    def update(state: Any) -> Any:
        rows = jax.random.randint(jax.random.fold_in(batch_key, state.step), (size,), 0, count)
        return step(state, {"x": x[rows]}, jax.random.fold_in(loss_key, state.step))[0]

    def until(state: Any, stop: Any) -> tuple[Any, Any]:
        state = jax.lax.while_loop(lambda state: state.step < stop, update, state)
        return state, state.averaged

    start = training.init_state(net.init(init_key), optimizer, ema=average)
    return jax.lax.scan(until, start, jnp.asarray(at))[1]


def gaussian_of(x: Any, used: Any) -> distributions.Gaussian:
    """Return the Gaussian of the used rows, whose number may be traced."""
    rows = jnp.where(used[:, None], x.reshape(len(x), -1), 0)
    mean = rows.sum(0) / used.sum()
    centred = jnp.where(used[:, None], rows - mean[None], 0) / jnp.sqrt(used.sum())
    return distributions.Gaussian(mean, jnp.linalg.qr(centred, mode="r").T)


def study(
    point: dict[str, Any], x: Any, apart: Any, preset: Preset, *, width: int, at: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Train on ``count`` images of one half; compare the four denoisers at each checkpoint.

    All results are ``[checkpoints, ...]``; those per noise level ``[checkpoints, 10]``.
    """
    count, half, schedule, std = point["count"], point["half"], schedules.VE(), float(np.std(x))
    x = jnp.where(half == 0, x, x[::-1])  # the two halves begin at the two ends
    used = jnp.arange(len(x)) < count
    key = jax.random.key(point["seed"])
    train_key, eval_key = jax.random.split(jax.random.fold_in(key, count + half * 100_000))
    noise_key = jax.random.fold_in(key, 1)  # the same noises for every network
    net = networks.make("mlp", data_shape=x.shape[1:], width=width, depth=3)
    loss_fn = losses.make_loss(net, schedule, data_std=std)
    averaged = train(train_key, net, loss_fn, x, count, at, preset.batch_size)

    gaussian = gaussian_of(x, used)
    wiener = generalization.wiener_filter(gaussian, schedule, SIGMAS)
    far = jnp.where(used[:, None, None, None], x, FAR)
    memory = distributions.Empirical(far).denoiser(schedule)
    ts, num = schedules.karras_grid(10), preset.num_samples
    start = sampling.initial_noise(noise_key, schedule, ts[0], (num, *x.shape[1:]))
    few, heun = start[:SHOWN], solvers.heun()
    draw = functools.partial(sampling.sample, noise_key, solver=heun)
    own = x[jnp.arange(len(apart)) % count]
    rmse = functools.partial(
        generalization.denoiser_rmse, eval_key, schedule=schedule, ts=SIGMAS, num_draws=4
    )
    score = functools.partial(
        generalization.linearity_score, eval_key, schedule=schedule, ts=SIGMAS, x=apart
    )

    def look(params: Any) -> dict[str, jax.Array]:
        model = denoisers.from_network(net, params, schedule, data_std=std)
        linear = generalization.distill_linear(
            eval_key, model, schedule, SIGMAS, apart, num_draws=preset.num_draws
        )
        weights = generalization.compare_weights(linear, wiener, rank=10)
        return {
            "model_gaussian": rmse(model, gaussian.denoiser(schedule), x=apart),
            "model_linear": rmse(model, linear, x=apart),
            "model_memory": rmse(model, memory, x=apart),
            "model_memory_own": rmse(model, memory, x=own),
            "linear_gaussian": rmse(linear, gaussian.denoiser(schedule), x=apart),
            "linearity": score(model).cosine,
            "linearity_affine": score(model, coefficients=THREE, about=apart.mean(0)).cosine,
            "weight_nmse": weights.nmse,
            "affinity": weights.affinity,
            "samples": draw(model, schedule, ts, start).x,
            "linear_samples": draw(linear, schedule, ts, few).x,
        }

    found = jax.lax.map(look, averaged)
    found["gaussian_samples"] = gaussian.flow(start, 1.0, ts[0], 1.0, 0.0)
    found["memory_samples"] = draw(memory, schedule, schedules.karras_grid(72), few).x
    return found


LEVELWISE = (
    "model_gaussian",
    "model_linear",
    "model_memory",
    "model_memory_own",
    "linear_gaussian",
    "linearity",
    "linearity_affine",
    "weight_nmse",
    "affinity",
)


class Model(NamedTuple):
    """One trained network and what was found about it, at each checkpoint."""

    part: str
    count: int
    half: int
    width: int
    seed: int
    at: tuple[int, ...]
    found: dict[str, np.ndarray]

    def rows(self, x: np.ndarray) -> list[dict[str, Any]]:
        """Tidy rows: one per checkpoint and noise level."""
        about = {"part": self.part, "N": self.count, "half": self.half, "width": self.width}
        rows = []
        for c, step in enumerate(self.at):
            copied = self.copied(x, c)
            for i, sigma in enumerate(SIGMAS):
                levelwise = {name: float(self.found[name][c, i]) for name in LEVELWISE}
                rows.append(
                    {**about, "seed": self.seed, "step": step, "sigma": float(sigma)}
                    | levelwise
                    | copied
                )
        return rows

    def copied(self, x: np.ndarray, c: int = -1) -> dict[str, float]:
        """How near the samples are to the training images."""
        mine = (x if self.half == 0 else x[::-1])[: self.count]
        near = generalization.nearest(self.found["samples"][c], mine, k=2)
        return {
            "pixel_novelty": float(generalization.pixel_novelty(self.found["samples"][c], mine)),
            "memorized": float(np.mean(generalization.is_memorized(near))),
        }

    def middle(self, name: str, c: int = -1) -> float:
        """Mean over the noise levels at which denoising is not linear."""
        return float(self.found[name][c][MIDDLE].mean())


def run(
    part: str, cases: Any, x: Any, apart: Any, preset: Preset, out: pathlib.Path, **settings: Any
) -> list[Model]:
    """Return the networks of cases ``(N, half)``: one program, each kept when it is done."""
    width, at = settings["width"], settings["at"]
    cases = [(*case, seed) for case in cases for seed in range(preset.num_seeds)]
    table = dict(zip(("count", "half", "seed"), np.array(cases).T, strict=True))

    def fn(point: dict[str, Any]) -> dict[str, jax.Array]:
        case = {name: jnp.asarray(column)[point["case"]] for name, column in table.items()}
        return study(case, x, apart, preset, width=width, at=at)

    found = training.sweep(
        fn,
        {"case": range(len(cases))},
        batch_size=1,
        chunk=1,
        path=out / "chunks" / f"{part}-{width}",
        progress=f"{part}, width {width}",
    )
    return [
        Model(part, count, half, width, seed, at, {k: v[i] for k, v in found.values.items()})
        for i, (count, half, seed) in enumerate(cases)
    ]


def run_part(part: str, x: Any, apart: Any, preset: Preset, out: pathlib.Path) -> list[Model]:
    """Return the networks of one part."""
    last = (preset.num_steps,)
    go = functools.partial(run, part, x=x, apart=apart, preset=preset, out=out)
    few = sorted(preset.counts)[min(1, len(preset.counts) - 1)]
    match part:
        case "samples":
            cases = [(count, 0) for count in sorted({*preset.counts, *preset.halves})]
            cases += [(count, 1) for count in preset.halves]
            return go(cases, width=preset.width, at=last)
        case "widths":
            return [m for width in preset.widths for m in go([(few, 0)], width=width, at=last)]
        case _:
            return go([(few, 0)], width=preset.width, at=preset.checkpoints)


# ---- report -------------------------------------------------------------------------------------


def mean_of(models: list[Model], name: str, c: int = -1) -> np.ndarray:
    """Mean over seeds, per noise level."""
    return np.mean([m.found[name][c] for m in models], axis=0)


def levelwise(
    title: str, lines: dict[str, Any], ylabel: str, out: pathlib.Path, **style: Any
) -> Any:
    """Return a figure of curves against sigma, written to ``title.png``."""
    figure = reporting.figures.curves(
        {label: (SIGMAS, y) for label, y in lines.items()},
        xlabel="noise level σ",
        ylabel=ylabel,
        xscale="log",
        **style,
    )
    figure.savefig(out / f"{title}.png", dpi=150)
    return figure


NAMES = {
    "model_gaussian": "network, Gaussian",
    "model_linear": "network, linear fit",
    "model_memory": "network, optimum",
    "model_memory_own": "same, training images",
    "linear_gaussian": "linear fit, Gaussian",
}


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Mean correlation of the pixels of images made from the same noises."""
    a, b = (np.asarray(generalization.pixel_embedding(x)) for x in (a, b))
    return float(np.mean(np.sum(a * b, axis=1)))


def report_samples(report: Any, models: list[Model], x: Any, preset: Preset, out: Any) -> None:
    """Distances, linearity and images against N; disjoint halves."""
    by_count = {
        count: [m for m in models if m.count == count and m.half == 0] for count in preset.counts
    }
    low, high = min(by_count), max(by_count)
    report.section(
        "From memorizing to generalizing",
        "Root mean square distance per pixel on noisy images that no denoiser has seen; to the "
        "optimum that memorizes also on its own. Published, "
        "where networks generalize (64x64 faces): below .05 for sigma in [20, 80] and [.002, .1], "
        "the linear fit within .05 of the Gaussian everywhere, the memorizing optimum farthest, up "
        "to about .3; where they memorize, the fit leaves the Gaussian.",
    )
    for count in (low, high):
        lines = {label: mean_of(by_count[count], name) for name, label in NAMES.items()}
        figure = levelwise(f"rmse_N{count}", lines, "RMSE", out)
        report.figure(figure, caption=f"N = {count}.")
    lines = {
        NAMES[name]: (
            list(by_count),
            [np.mean([m.middle(name) for m in same]) for same in by_count.values()],
        )
        for name in NAMES
    }
    figure = reporting.figures.curves(
        lines, xlabel="training images N", ylabel="RMSE, mean over 0.1 < σ < 20", xscale="log"
    )
    figure.savefig(out / "rmse.png", dpi=150)
    report.figure(figure, caption="With more images the network nears the Gaussian.")
    for name, ylabel, caption in (
        (
            "linearity",
            "linearity score",
            "As published: the cosine of denoised sums. Published: above .96 at every level for "
            "good models; at sigma = 10 .98 for N = 70000, .85 for 1094, .75 for 68.",
        ),
        (
            "linearity_affine",
            "linearity score about the mean",
            "The same with three images and about the data's mean, 1 for every affine denoiser.",
        ),
        ("weight_nmse", "squared error of the weights", "Linear fit against the Gaussian's."),
        ("affinity", "affinity of 10 principal directions", "Of the two weight matrices."),
    ):
        lines = {f"N = {count}": mean_of(same, name) for count, same in by_count.items()}
        style = {"yscale": "log"} if name == "weight_nmse" else {}
        report.figure(levelwise(name, lines, ylabel, out, **style), caption=caption)

    report.section("Images from the same noises")
    for count in sorted({low, *preset.halves[1:2], high}):
        model = next(m for m in models if m.count == count and m.half == 0)
        rows = [
            model.found["samples"][-1][:SHOWN],
            model.found["linear_samples"][-1],
            model.found["gaussian_samples"][:SHOWN],
            model.found["memory_samples"],
        ]
        picture = reporting.image_grid(np.concatenate(rows), columns=SHOWN)
        (out / f"images_N{count}.png").write_bytes(reporting.png(picture))
        report.picture(
            picture,
            f"N = {count}, top to bottom: network, its linear fit, the Gaussian, the memorizing "
            "optimum.",
        )

    report.section(
        "Disjoint halves",
        "Two networks, and two Gaussians, each from N images that the other has not seen: mean "
        "correlation of their images from the same noises. Published: two halves of 35000 faces "
        "give nearly the same images, and their Gaussians agree from about 1000 images on.",
    )
    rows = []
    for count in preset.halves:
        pairs = [
            [m for m in models if (m.count, m.seed) == (count, seed)]
            for seed in range(preset.num_seeds)
        ]
        cells = [
            np.mean([agreement(a.found[name][-1], b.found[name][-1]) for a, b in pairs])
            if name == "samples"
            else np.mean([agreement(a.found[name], b.found[name]) for a, b in pairs])
            for name in ("samples", "gaussian_samples")
        ]
        rows.append([count, *(f"{cell:.2f}" for cell in cells)])
    report.table(["N", "networks", "Gaussians"], rows)
    rows = []
    for count, same in by_count.items():
        copied = [m.copied(x) for m in same]
        cells = [np.mean([c[name] for c in copied]) for name in ("memorized", "pixel_novelty")]
        rows.append([count, *(f"{cell:.2f}" for cell in cells)])
    report.table(
        ["N", "memorized", "pixel novelty"],
        rows,
        caption="Share of copies among the samples; distance to the nearest training image over "
        "the norm (the paper's GL).",
    )


def report_widths(report: Any, models: list[Model], out: pathlib.Path) -> None:
    """Distance to the Gaussian against the width."""
    report.section(
        "Capacity",
        f"N = {models[0].count}. Published: narrower networks are nearer to the Gaussian between "
        "sigma = .116 and 20, and farther at the highest noise, which training rarely visits.",
    )
    widths = sorted({m.width for m in models})
    by_width = {width: [m for m in models if m.width == width] for width in widths}
    lines = {f"width {w}": mean_of(same, "model_gaussian") for w, same in by_width.items()}
    report.figure(levelwise("widths", lines, "RMSE, network to Gaussian", out))
    lines = {
        NAMES[name]: (widths, [np.mean([m.middle(name) for m in by_width[w]]) for w in widths])
        for name in ("model_gaussian", "model_memory_own")
    }
    figure = reporting.figures.curves(
        lines, xlabel="width", ylabel="RMSE, mean over 0.1 < σ < 20", xscale="log"
    )
    figure.savefig(out / "widths_middle.png", dpi=150)
    report.figure(figure, caption="Between the ends.")


def report_time(report: Any, models: list[Model], x: Any, out: pathlib.Path) -> None:
    """Distance to the Gaussian along training."""
    at = models[0].at
    report.section(
        "Training time",
        f"N = {models[0].count}. Published: the network nears the Gaussian, then leaves it for the "
        "memorizing optimum; stopped in between it generalizes.",
    )
    mean = lambda name: [np.mean([m.middle(name, c) for m in models]) for c in range(len(at))]
    lines = {NAMES[name]: (at, mean(name)) for name in ("model_gaussian", "model_memory_own")}
    figure = reporting.figures.curves(
        lines, xlabel="training steps", ylabel="RMSE, mean over 0.1 < σ < 20", xscale="log"
    )
    figure.savefig(out / "time.png", dpi=150)
    report.figure(figure, caption="Distances along training.")
    near = [np.mean([m.copied(x, c)["pixel_novelty"] for m in models]) for c in range(len(at))]
    figure = reporting.figures.curves(
        {"samples": (at, near)},
        xlabel="training steps",
        ylabel="distance to nearest training image",
        xscale="log",
    )
    figure.savefig(out / "time_novelty.png", dpi=150)
    report.figure(figure, caption="Over the norm of the sample: what it makes nears its data.")


def main() -> int:
    """Run the parts; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.hidden_gaussian")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/hidden_gaussian"))
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--data", help="file or folder of images; digits by default")
    parser.add_argument("--size", type=int, default=14, help="side of the images of --data")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    x, apart = images(options, preset)
    name = options.data or "digits"
    title = f"{pathlib.Path(name).name}, {x.shape[1]}x{x.shape[2]}, preset {options.preset}"
    report = reporting.Report("Hidden Gaussian structure", title)
    rows = []
    for part in options.part:
        models = run_part(part, x, apart, preset, out)
        rows += [row for model in models for row in model.rows(x)]
        match part:
            case "samples":
                report_samples(report, models, x, preset, out)
            case "widths":
                report_widths(report, models, out)
            case _:
                report_time(report, models, x, out)
    write_csv(out / "hidden_gaussian.csv", rows)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
