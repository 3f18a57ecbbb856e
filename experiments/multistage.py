"""Does a decoder per interval of noise levels train a diffusion model for less?

*Intervals.* How alike the optimal denoiser of the training images is at a noise level and at either
end divides the levels into three stages. *Networks.* Three networks of equal mean cost per call are
trained on the same draws: one for all levels (unified), one encoder with a decoder per stage
(multi-decoder, the low-noise decoder wide and the high-noise one narrow), and one network per stage
(separate). Their loss on held-out images against the floating-point operations spent says what the
multi-decoder network saves until it is as good as the unified one is in the end.

Times are uniform and stratified over the batch, so the number of examples of each stage is the same
in every batch, and no decoder runs for an example of another stage.

References:
    Zhang, Lu, Zhang, Qu 2023, arXiv 2312.09181.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _generators as generators
from experiments._tables import write_csv
from lowdim_diffusion import (
    distributions,
    losses,
    networks,
    reporting,
    schedules,
    training,
)

SCHEDULE = schedules.VPLinear()
PUBLISHED = {
    "CIFAR-10, DPM-Solver": ("0.442", "0.631", "59 %", "FID 2.71, unified 2.73"),
    "CelebA 32, EDM": ("", "", "82 %", "FID 1.44, unified 1.55"),
    "CelebA 256, LDM": ("", "", "30 %", "FID 8.38, unified 8.29"),
}
"""t1, t2, training cost that remains, quality there. At equal training, FID on CIFAR-10: unified
2.73, separate 2.87, multi-decoder 2.35."""
REMAINING = 0.59
NARROW = 0.125
"""Width of the high-noise decoder over that of the encoder, as published (16 over 128 channels).
The middle one is as wide as the encoder; what the narrow one saves goes to the low-noise one."""
STAGES = ("low noise", "middle", "high noise")


class Preset(NamedTuple):
    """Sizes of the experiment."""

    network: str
    width: int
    """Of the unified network and of the encoder."""
    options: dict[str, Any]
    """Of the unified network; the MLP's last block belongs to the decoders."""
    step: int
    """Widths of decoders are multiples of this."""
    batch_size: int
    num_steps: int
    num_evals: int
    num_seeds: int
    num_train: int
    num_held_out: int
    num_draws: int
    learning_rate: float = 1e-3


PRESETS = {
    "smoke": Preset("mlp", 32, {"depth": 2}, 4, 64, 60, 3, 2, 600, 128, 256),
    "cpu": Preset("mlp", 128, {"depth": 3}, 8, 128, 2000, 10, 5, 10_000, 1024, 2048),
    "unet": Preset("unet", 16, {}, 4, 128, 4000, 20, 5, 50_000, 1024, 10_000),
    "paper": Preset(
        *("unet", 128, {"channel_mult": (2, 2, 2), "num_blocks": 4, "attention": (16,)}),
        *(16, 128, 450_000, 45, 5, 50_000, 4096, 50_000, 2e-4),
    ),
}


# ---- intervals ----------------------------------------------------------------------------------


def similarities(x: np.ndarray, preset: Preset, seed: int) -> training.StageSimilarity:
    """Return how alike the optimal denoiser of the images is at any level and at both ends."""
    draw = jax.jit(
        lambda key, p: training.stage_similarity(key, p, SCHEDULE, num_draws=preset.num_draws)
    )
    return draw(jax.random.key(seed), distributions.Empirical(x.reshape(len(x), -1)))


def figure_of_intervals(found: training.StageSimilarity, times: tuple[float, float]) -> Any:
    """Similarity to both ends against the time, and the stages."""
    bins = np.array_split(np.arange(len(found.t)), 32)
    mean = lambda values: np.array([np.asarray(values)[rows].mean() for rows in bins])
    figure = reporting.figures.curves(
        {
            "to the denoiser at t = 0": (mean(found.t), mean(found.to_clean)),
            "to the denoiser at t = 1": (mean(found.t), mean(found.to_noise)),
        },
        xlabel="t",
        ylabel="similarity",
        level=0.9,
    )
    axes = figure.axes[0]
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    for t in times:
        axes.axvline(t, color=reporting.figures.INK, linewidth=1)
    for t in (0.442, 0.631):
        axes.axvline(t, color=reporting.figures.INK, linewidth=1, linestyle=":")
    return figure


# ---- networks -----------------------------------------------------------------------------------


def stage_sizes(times: tuple[float, float], batch_size: int) -> tuple[int, ...]:
    """Return how many of a batch's stratified times fall into each stage, at least one."""
    t1, t2 = (round(t * batch_size) for t in times)
    t1 = min(max(t1, 1), batch_size - 2)
    t2 = min(max(t2, t1 + 1), batch_size - 1)
    return (t1, t2 - t1, batch_size - t2)


def separate(net: networks.Network, sizes: tuple[int, ...]) -> networks.Network:
    """Return one network per stage, for batches whose examples are ordered by stage."""

    def init(key: Any) -> Any:
        return [net.init(k) for k in jax.random.split(key, len(sizes))]

    def apply(params: Any, x: Any, c_noise: Any, cond: Any = None) -> Any:
        edges = pairwise(accumulate(sizes, initial=0))
        parts = zip(params, edges, strict=True)
        return jnp.concatenate([net.apply(p, x[a:b], c_noise[a:b], cond) for p, (a, b) in parts])

    return networks.Network("separate", net.data_shape, init, apply)


def flops_per_call(net: networks.Network, batch_size: int) -> float:
    """Return the mean cost of one example: products and convolutions of the program."""
    x = jax.ShapeDtypeStruct((batch_size, *net.data_shape), jnp.float32)
    c_noise = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0))
    return _flops(net.apply, params, x, c_noise) / batch_size


def _flops(fn: Any, *inputs: Any) -> float:
    return sum(training.throughput.count_flops(jax.make_jaxpr(fn)(*inputs)).values())


def contenders(
    preset: Preset, data_shape: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, networks.Network]:
    """Return the networks, of equal mean cost per call."""
    edges = np.cumsum(sizes)[:-1] / preset.batch_size
    bounds = tuple(np.asarray(schedules.noise_levels(SCHEDULE, edges), float).tolist())
    name = {"mlp": "width", "unet": "channels"}[preset.network]
    options = {"data_shape": data_shape, name: preset.width, **preset.options}
    unified = networks.make(preset.network, **options)
    if preset.network == "mlp":
        options["depth"] -= 1

    def multi(wide: int) -> networks.Network:
        narrow = max(round(preset.width * NARROW / preset.step), 1)
        widths = (wide * preset.step, preset.width, narrow * preset.step)
        own = {f"decoder_{name}s" if name == "width" else f"decoder_{name}": widths}
        net = networks.make(f"multistage_{preset.network}", **options, bounds=bounds, **own)
        return dataclasses.replace(net, apply=functools.partial(net.apply, sizes=sizes))

    target = flops_per_call(unified, preset.batch_size)
    low, high = preset.width // preset.step, 4 * preset.width // preset.step
    while high - low > 1:
        middle = (low + high) // 2
        fits = flops_per_call(multi(middle), preset.batch_size) <= target
        low, high = (middle, high) if fits else (low, middle)
    return {
        "unified": unified,
        "multi-decoder": multi(low),
        "separate": separate(unified, sizes),
    }


# ---- training -----------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What one network reached, by the seed."""

    flops: np.ndarray
    """``[num_evals]``: spent on training steps so far."""
    loss: np.ndarray
    """``[num_seeds, num_evals, stages]``: mean held-out loss of each stage."""
    per_call: float
    """Mean cost of one example, forward."""


def train(
    net: networks.Network, images: Any, preset: Preset, sizes: tuple[int, ...], seed: int
) -> Curve:
    """Train with every seed; the same seeds see the same batches, times and noises."""
    size = preset.batch_size
    loss_fn = losses.make_loss(
        *(net, SCHEDULE),
        parametrization="edm",
        weight=losses.snr_weight(),
        level=losses.uniform(),
        data_std=float(images.x.std()),
        num_strata=size,
    )
    optimizer = optax.adam(preset.learning_rate)
    average = training.ema.power(training.ema.gamma_from_std(0.05))
    step_fn = training.make_train_step(loss_fn, optimizer, ema=average)
    start = lambda key: training.init_state(net.init(key), optimizer, ema=average)
    x, held_out = jnp.asarray(images.x), jnp.asarray(images.held_out)
    held_out = held_out[: len(held_out) // size * size].reshape(-1, size, *net.data_shape)
    groups = list(pairwise(accumulate(sizes, initial=0)))
    every = preset.num_steps // preset.num_evals

    def evaluate(params: Any, held_out: Any) -> Any:
        keys = jax.random.split(jax.random.key(1), len(held_out))
        each = jax.lax.map(lambda kx: loss_fn(params, kx[1], kx[0]), (keys, held_out)).mean(0)
        return jnp.stack([each[a:b].mean() for a, b in groups])

    @jax.jit
    def run(key: Any, x: Any, held_out: Any) -> Any:
        init_key, batch_key, loss_key = jax.random.split(key, 3)

        def update(state: Any, _: None) -> Any:
            at = jax.random.fold_in(batch_key, state.step)
            batch = x[jax.random.randint(at, (size,), 0, len(x))]
            return step_fn(state, batch, jax.random.fold_in(loss_key, state.step))[0], None

        def stretch(state: Any, _: None) -> Any:
            state, _ = jax.lax.scan(update, state, None, length=every)
            return state, evaluate(state.averaged, held_out)

        return jax.lax.scan(stretch, start(init_key), None, length=preset.num_evals)[1]

    state = jax.eval_shape(start, jax.random.key(0))
    batch = jax.ShapeDtypeStruct((size, *net.data_shape), jnp.float32)
    cost = _flops(step_fn, state, batch, jax.random.key(0))
    seeds = range(seed, seed + preset.num_seeds)
    loss = np.stack([run(jax.random.key(s), x, held_out) for s in seeds])
    flops = cost * every * np.arange(1, preset.num_evals + 1)
    return Curve(flops, loss, flops_per_call(net, size))


# ---- comparison ---------------------------------------------------------------------------------


def total(curve: Curve, sizes: tuple[int, ...]) -> np.ndarray:
    """Return the loss over all stages, ``[num_seeds, num_evals]``."""
    return curve.loss @ np.array(sizes) / sum(sizes)


def cost_until(mine: np.ndarray, flops: np.ndarray, goal: float) -> float:
    """Return the operations at which a falling curve reaches ``goal``, infinity if it does not."""
    best = np.minimum.accumulate(mine)
    if best[-1] > goal:
        return float("inf")
    i = int(np.argmax(best <= goal))
    if i == 0:
        return float(flops[0])
    share = (best[i - 1] - goal) / (best[i - 1] - best[i])
    return float(flops[i - 1] + share * (flops[i] - flops[i - 1]))


def compare(curves: dict[str, Curve], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return one row per network: final losses, difference to the unified one, cost to equal it.

    What remains of the cost is that until the unified network's lowest loss, over its own.
    """
    rows = []
    reference = total(curves["unified"], sizes)
    goal = reference.mean(0).min()
    cost = cost_until(reference.mean(0), curves["unified"].flops, goal)
    for name, curve in curves.items():
        losses_of = total(curve, sizes)
        change = losses_of[:, -1] / reference[:, -1] - 1  # paired: same seeds, same batches
        error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else float("nan")
        row = {"network": name, "flops_per_call": curve.per_call, "loss": losses_of[:, -1].mean()}
        row |= {f"loss_{s}": m for s, m in enumerate(curve.loss[:, -1].mean(0))}
        row |= {"change": change.mean(), "standard_error": error}
        row["remaining"] = cost_until(losses_of.mean(0), curve.flops, goal) / cost
        rows.append(row)
    return rows


def figures_of_curves(curves: dict[str, Curve], sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Loss against operations: over all levels, and in each stage."""
    budget = curves["unified"].flops[-1]

    def lines(of: Any) -> dict[str, Any]:
        found = {}
        for name, curve in curves.items():
            values = of(curve)
            error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
            found[name] = (curve.flops / budget, values.mean(0), error)
        return found

    goal = total(curves["unified"], sizes).mean(0).min()
    whole = reporting.figures.curves(
        lines(lambda curve: total(curve, sizes)),
        xlabel="operations, in parts of the unified network's",
        ylabel="held-out error of the noise",
        yscale="log",
        level=goal,
    )
    whole.axes[0].axvline(REMAINING, color=reporting.figures.INK, linewidth=1, linestyle=":")
    parts = {
        f"{stage}, {share:.0%} of the levels": lines(lambda curve, s=s: curve.loss[:, :, s])
        for s, (stage, share) in enumerate(zip(STAGES, np.array(sizes) / sum(sizes), strict=True))
    }
    split = reporting.figures.curve_panels(
        parts,
        xlabel="operations, in parts of the unified network's",
        ylabels=["held-out error of the noise"] + [""] * (len(parts) - 1),
        yscale="log",
    )
    return whole, split


def write(
    report: reporting.Report, name: str, images: Any, preset: Preset, out: pathlib.Path, seed: int
) -> None:
    """Find the stages of one data set, train on it, and write tables, figures and a section."""
    start = time.perf_counter()
    found = similarities(images.x, preset, seed)
    times = training.find_stages(found)
    sizes = stage_sizes(times, preset.batch_size)
    report.section(
        name,
        f"{len(images.x)} images to train on, {len(images.held_out)} held out. Stages: t1 = "
        f"{times[0]:.3f}, t2 = {times[1]:.3f} (CIFAR-10, published: 0.442, 0.631), so that of "
        f"{preset.batch_size} examples {', '.join(map(str, sizes))} are in each.",
    )
    figure = figure_of_intervals(found, times)
    figure.savefig(out / f"{name}_intervals.png", dpi=150)
    report.figure(
        figure,
        caption="Share of coordinates in which the optimal denoiser agrees with that at an end. "
        "Lines: the stages; dotted: those published for CIFAR-10.",
    )
    print(f"{name}: t1 {times[0]:.3f}, t2 {times[1]:.3f}", end=" ", flush=True)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    curves = {}
    for kind, net in contenders(preset, images.x.shape[1:], sizes).items():
        start = time.perf_counter()
        curves[kind] = train(net, images, preset, sizes, seed)
        seconds = time.perf_counter() - start
        final = total(curves[kind], sizes)[:, -1].mean()
        print(f"{name}: {kind}: loss {final:.5f} ({seconds:.0f} s)", flush=True)
    rows = [
        {
            "network": kind,
            "seed": seed + i,
            "flops": curve.flops[j],
            "loss": total(curve, sizes)[i, j],
        }
        | {f"loss_{s}": value for s, value in enumerate(curve.loss[i, j])}
        for kind, curve in curves.items()
        for i in range(preset.num_seeds)
        for j in range(preset.num_evals)
    ]
    write_csv(out / f"{name}_curves.csv", rows)
    summary = compare(curves, sizes)
    write_csv(out / f"{name}.csv", summary)
    for figure, what in zip(figures_of_curves(curves, sizes), ("loss", "stages"), strict=True):
        figure.savefig(out / f"{name}_{what}.png", dpi=150)
        report.figure(
            figure,
            caption="Mean over seeds, with its standard error, against the operations spent."
            + (" Dotted: the published cost at equal FID." if what == "loss" else ""),
        )
    columns = ["network", "FLOPs / call", "loss", *STAGES, "to unified", "cost at equal loss"]
    text = []
    for row in summary:
        values = [f"{row[key]:.5f}" for key in ("loss", "loss_0", "loss_1", "loss_2")]
        change = f"{row['change']:+.2%} ± {row['standard_error']:.2%}"
        share = f"{row['remaining']:.0%}" if np.isfinite(row["remaining"]) else "not reached"
        text.append([row["network"], f"{row['flops_per_call']:.4g}", *values, change, share])
    report.table(columns, text)
    for row in [columns, *text]:
        widths = (14, 13, 9, 9, 9, 11, 18, 12)
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)))


def main() -> int:
    """Write the tables, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.multistage")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/multistage"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", nargs="+", default=["digits"], help="digits, or paths")
    parser.add_argument("--size", type=int, help="resize the images of files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[options.preset]
    report = reporting.Report(
        "A decoder per interval of noise levels", "loss against operations spent on training"
    )
    for path in options.data:
        images = generators.load(path, options.size, preset.num_train, preset.num_held_out)
        name = pathlib.Path(path).name
        write(report, name, images, preset, options.out, options.seed)
    report.section("Published", "Cost that remains until the quality of the unified network.")
    report.table(
        ["data", "t1", "t2", "cost", "quality there"],
        [[name, *values] for name, values in PUBLISHED.items()],
    )
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
