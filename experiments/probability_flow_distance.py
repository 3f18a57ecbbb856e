"""From memorization to generalization by the probability flow distance of teacher and student.

A teacher makes the training data of its students; everyone carries the same noises to data. With
``E_gen``, a student's distance to the teacher, and ``E_mem``, its distance to the optimal denoiser
of its N training examples (which replays them):

- ``mixture``: exact teachers, two subspaces of dimension d in R^48; MLP students over the samples
  per dimension ``N_k / d``, several training sets each. E_gen falls, and where it crosses E_mem a
  student is nearer to the truth than to its data. Bias and variance of the students.
- ``time``: the same students along training, at few samples: they come near the teacher first and
  turn to their data later.
- ``digits``: the teacher is a network trained on all 8x8 digits; its samples train the students.

Distances are divided by the root mean square norm of the teacher's samples about their mean:
unrelated samples are sqrt(2) apart.

References:
    Zhang et al. 2025, arXiv 2505.20123.
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
from lowdim_diffusion.distributions import Empirical, MoLRG

DIM, NUM_COMPONENTS, MAX_RANK = 48, 2, 6
PARTS = ("mixture", "time", "digits")
VE = schedules.VE()
TS = schedules.karras_grid(72)

REFERENCE = {
    (3, "e_gen"): (0.96, 0.71, 0.51, 0.35, 0.29, 0.25, 0.21),
    (6, "e_gen"): (0.96, 0.76, 0.54, 0.42, 0.34, 0.30, 0.30),
    (3, "e_mem"): (0.25, 0.31, 0.32, 0.33, 0.31, 0.30, 0.25),
    (6, "e_mem"): (0.41, 0.46, 0.52, 0.54, 0.54, 0.49, 0.45),
}
"""``(d, error)`` at the ratios below: one model each of the same student, 6000 steps, another
program."""
RATIOS = (2, 6, 15, 30, 60, 120, 400)


class Preset(NamedTuple):
    """Sizes of the experiment."""

    ratios: tuple[int, ...]
    """Samples per dimension, N_k / d."""
    num_seeds: int
    num_steps: int
    width: int
    num_noises: int
    checkpoints: tuple[int, ...]
    """Steps at which students are looked at in ``time``."""
    time_ratios: tuple[int, ...]
    digit_counts: tuple[int, ...]
    digit_steps: int


PRESETS = {
    "smoke": Preset((2, 60), 2, 60, 32, 40, (10, 60), (2,), (16, 64), 60),
    "cpu": Preset(
        RATIOS,
        2,
        6000,
        128,
        500,
        (100, 200, 400, 800, 1500, 3000, 6000, 12_000),
        (2, 15),
        (16, 64, 256, 1024, 4096),
        4000,
    ),
    "paper": Preset(
        RATIOS,
        5,
        6000,
        256,
        10_000,
        (100, 200, 400, 800, 1500, 3000, 6000, 12_000, 24_000, 48_000),
        (2, 6, 15, 30),
        (16, 64, 256, 1024, 4096, 16_384),
        12_000,
    ),
}


# ---- teachers, students, and what they make of the noises ---------------------------------------


def flow(denoise_fn: Any, x_T: Any) -> jax.Array:
    """Return the samples of the noises: 72 Heun steps, for everyone the same."""
    return sampling.sample_batched(
        jax.random.key(0), denoise_fn, VE, TS, x_T, solver=solvers.heun(), batch_size=256
    ).x


def noises(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Return the noises that everyone starts from."""
    return sampling.initial_noise(jax.random.key(seed), VE, TS[0], shape)


@functools.partial(jax.jit, static_argnames="count")
def mixture(key: Any, rank: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """Return frames ``[K, n, 6]``, zero beyond ``rank``, and ``count`` samples, K in turn.

    The frames are the same for every key: students of one teacher differ in their data.
    """
    frames = linalg.random_frames(jax.random.key(0), NUM_COMPONENTS, DIM, MAX_RANK, orthogonal=True)
    frames = frames * (jnp.arange(MAX_RANK) < rank)[None, None, :]
    inner = jax.random.normal(key, (count, MAX_RANK))
    of = jnp.arange(count) % NUM_COMPONENTS
    return frames, jnp.einsum("bnd,bd->bn", frames[of], inner, precision="highest")


def train(key: Any, net: Any, x: jax.Array, total: Any, data_std: Any, steps: Any) -> Any:
    """Return the averaged parameters after each of ``steps``, trained on ``total`` rows of x."""
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    optimizer, ema = optax.adam(1e-3), training.ema.classic(0.999)
    loss_fn = losses.make_loss(net, VE, data_std=data_std)
    step = training.make_train_step(loss_fn, optimizer, ema=ema)

    def update(_: Any, state: training.TrainState) -> training.TrainState:
        rows = jax.random.randint(jax.random.fold_in(batch_key, state.step), (256,), 0, total)
        return step(state, {"x": x[rows]}, jax.random.fold_in(loss_key, state.step))[0]

    def stretch(state: training.TrainState, count: Any) -> tuple[Any, Any]:
        state = jax.lax.fori_loop(0, count, update, state)
        return state, state.averaged

    state = training.init_state(net.init(init_key), optimizer, ema=ema)
    return jax.lax.scan(stretch, state, jnp.diff(jnp.asarray((0, *steps))))[1]


def flows_of(net: Any, stacked: Any, data_std: Any, x_T: jax.Array) -> jax.Array:
    """Return ``[checkpoints, noises, *data]``, what each of the stacked parameters makes."""

    def one(params: Any) -> jax.Array:
        return flow(denoisers.from_network(net, params, VE, data_std=data_std), x_T)

    return jax.lax.map(one, stacked)


def keys_of(point: dict[str, Any], *names: str) -> jax.Array:
    """Return two keys of a point, for the data and for the training."""
    key = jax.random.key(point["seed"])
    for name in names:
        key = jax.random.fold_in(key, point[name])
    return jax.random.split(key)


def mixture_student(
    point: dict[str, Any], width: int, steps: tuple[int, ...], most: int, x_T: jax.Array
) -> jax.Array:
    """Train an MLP on ``N_k = ratio d`` samples of each subspace; return its flows."""
    rank = point["rank"]
    data_key, fit_key = keys_of(point, "rank", "ratio")
    x = mixture(data_key, rank, most)[1]
    total, data_std = NUM_COMPONENTS * rank * point["ratio"], jnp.sqrt(rank / DIM)
    net = networks.make("mlp", data_shape=(DIM,), width=width, depth=3)
    return flows_of(net, train(fit_key, net, x, total, data_std, steps), data_std, x_T)


def mixture_replay(
    point: dict[str, Any], rank: int, ratio: int, most: int, x_T: jax.Array
) -> jax.Array:
    """Return the flow of the optimal denoiser of the same training set."""
    data_key, _ = keys_of(point | {"rank": rank, "ratio": ratio}, "rank", "ratio")
    x = mixture(data_key, rank, most)[1][: NUM_COMPONENTS * rank * ratio]
    return flow(Empirical(x).denoiser(VE), x_T)


def digit_student(
    point: dict[str, Any], net: Any, steps: int, x: jax.Array, std: Any, x_T: jax.Array
) -> jax.Array:
    """Train on the ``count`` rows of the teacher's samples that belong to the seed."""
    _, fit_key = keys_of(point, "count")
    rows = jnp.roll(x, -point["seed"] * (len(x) // 2), axis=0)
    return flows_of(net, train(fit_key, net, rows, point["count"], std, (steps,)), std, x_T)[0]


def digit_teacher(point: dict[str, Any], net: Any, steps: int, x: jax.Array, std: Any) -> Any:
    """Return the parameters of a network trained on all of ``x``."""
    return jax.tree.map(
        lambda leaf: leaf[0], train(jax.random.key(point["seed"]), net, x, len(x), std, (steps,))
    )


# ---- errors -------------------------------------------------------------------------------------


@jax.jit
def errors(true: jax.Array, replay: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """Return E_gen and E_mem of one student's samples with their standard errors, relative."""
    about_mean = lambda x: x - true.mean(0)[None]
    gen = generalization.rms_distance(true, made, embed=about_mean)
    mem = generalization.rms_distance(replay, made, embed=about_mean)
    found = {"e_gen": gen.distance, "e_gen_error": gen.std_error}
    found |= {"e_mem": mem.distance, "e_mem_error": mem.std_error}
    return {name: value / gen.scale for name, value in found.items()}


@jax.jit
def parts_of(true: jax.Array, made: jax.Array) -> dict[str, jax.Array]:
    """Return bias^2 and variance of several students' samples, relative."""
    scale = jnp.sum((true - true.mean(0)[None]) ** 2) / len(true)
    parts = generalization.bias_variance(true, made)
    return {"squared_bias": parts.squared_bias / scale, "variance": parts.variance / scale}


def rounded(found: dict[str, Any]) -> dict[str, float]:
    """Return numbers for a table."""
    return {name: round(float(value), 4) for name, value in found.items()}


def crossing(rows: list[dict[str, Any]], along: str) -> float | None:
    """Return where the mean E_gen falls below the mean E_mem, interpolated in the logarithm."""
    where = sorted({r[along] for r in rows})
    gap = [np.mean([r["e_gen"] - r["e_mem"] for r in rows if r[along] == q]) for q in where]
    for i in range(1, len(where)):
        if gap[i - 1] > 0 >= gap[i]:
            share = gap[i - 1] / (gap[i - 1] - gap[i])
            return float(where[i - 1] * (where[i] / where[i - 1]) ** share)
    return None


# ---- the parts ----------------------------------------------------------------------------------


def mixture_truth(rank: int, x_T: jax.Array) -> jax.Array:
    """Return the exact teacher's samples."""
    frames = mixture(jax.random.key(0), rank, 1)[0][..., :rank]
    return jax.jit(lambda x: flow(MoLRG(frames).denoiser(VE), x))(x_T)


def replays(rank: int, ratio: int, seeds: Any, most: int, x_T: Any, out: pathlib.Path) -> Any:
    """Return ``[seeds, noises, n]``, kept on disk."""
    fn = functools.partial(mixture_replay, rank=rank, ratio=ratio, most=most, x_T=x_T)
    path = out / "chunks" / f"replay-{rank}-{ratio}-{len(x_T)}"
    return training.sweep(fn, {"seed": seeds}, batch_size=1, chunk=1, path=path).values


def run_mixture(preset: Preset, out: pathlib.Path, seed: int, ranks: Any) -> tuple[Any, Any]:
    """Return tidy rows of errors, and of bias and variance."""
    x_T = noises(seed, (preset.num_noises, DIM))
    most = NUM_COMPONENTS * MAX_RANK * max(preset.ratios)
    seeds = seed + np.arange(preset.num_seeds)
    rows, parts = [], []
    for rank in ranks:
        made = training.sweep(
            functools.partial(
                mixture_student,
                width=preset.width,
                steps=(preset.num_steps,),
                most=most,
                x_T=x_T,
            ),
            {"rank": (rank,), "ratio": preset.ratios, "seed": seeds},
            batch_size=1,
            chunk=1,
            path=out / "chunks" / f"mixture-{rank}",
            progress=f"students, d = {rank}",
        ).values[0, :, :, 0]
        true = mixture_truth(rank, x_T)
        for i, ratio in enumerate(preset.ratios):
            replay = replays(rank, ratio, seeds, most, x_T, out)
            about = {"rank": rank, "ratio": ratio, "num_train": NUM_COMPONENTS * rank * ratio}
            for j, s in enumerate(seeds):
                found = rounded(errors(true, replay[j], made[i, j]))
                rows.append({**about, "seed": int(s), "steps": preset.num_steps, **found})
            if len(seeds) > 1:
                parts.append({**about, **rounded(parts_of(true, made[i]))})
    return rows, parts


def run_time(preset: Preset, out: pathlib.Path, seed: int) -> list[dict[str, Any]]:
    """Return tidy rows of errors along training, d = 6, one seed."""
    x_T = noises(seed, (max(preset.num_noises // 2, 2), DIM))
    most = NUM_COMPONENTS * MAX_RANK * max(preset.time_ratios)
    made = training.sweep(
        functools.partial(
            mixture_student, width=preset.width, steps=preset.checkpoints, most=most, x_T=x_T
        ),
        {"rank": (MAX_RANK,), "ratio": preset.time_ratios, "seed": (seed,)},
        batch_size=1,
        chunk=1,
        path=out / "chunks" / "time",
        progress="students along training",
    ).values[0, :, 0]
    true, rows = mixture_truth(MAX_RANK, x_T), []
    for ratio, along in zip(preset.time_ratios, made, strict=True):
        replay = replays(MAX_RANK, ratio, (seed,), most, x_T, out)[0]
        for steps, samples in zip(preset.checkpoints, along, strict=True):
            about = {"rank": MAX_RANK, "ratio": ratio, "seed": seed, "steps": steps}
            rows.append({**about, **rounded(errors(true, replay, samples))})
    return rows


class Digits(NamedTuple):
    """What the digits' teacher and students make of the noises."""

    rows: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    true: np.ndarray
    made: np.ndarray
    """``[counts, seeds, noises, 8, 8, 1]``."""
    replay: dict[int, np.ndarray]
    """``{count: [seeds, noises, 8, 8, 1]}``."""


def run_digits(preset: Preset, out: pathlib.Path, seed: int) -> Digits:
    """Train the teacher, draw from it, train the students; two disjoint training sets each."""
    x = jnp.asarray(data.load("digits").floats())
    std = float(x.std())
    net = networks.make("mlp", data_shape=x.shape[1:], width=preset.width, depth=3)
    once: dict[str, Any] = {"batch_size": 1, "chunk": 1}
    teach = functools.partial(digit_teacher, net=net, steps=preset.digit_steps, x=x, std=std)
    path = out / "chunks" / "digits-teacher"
    params = training.sweep(teach, {"seed": (seed,)}, path=path, progress="teacher", **once).values
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params)
    teacher = jax.jit(lambda x_T: flow(denoisers.from_network(net, params, VE, data_std=std), x_T))
    seeds, shape = np.arange(2), x.shape[1:]
    drawn = teacher(noises(seed + 1, (2 * max(preset.digit_counts), *shape)))
    x_T = noises(seed, (preset.num_noises, *shape))
    true = np.asarray(teacher(x_T))
    learn = functools.partial(
        digit_student, net=net, steps=preset.digit_steps, x=drawn, std=std, x_T=x_T
    )
    grid = {"count": preset.digit_counts, "seed": seeds}
    path = out / "chunks" / "digits"
    made = training.sweep(learn, grid, path=path, progress="students of digits", **once).values
    rows, parts, replay = [], [], {}
    half = len(drawn) // 2
    for i, count in enumerate(preset.digit_counts):
        optimum = lambda s, count=count: Empirical(drawn[s * half : s * half + count])
        run = jax.jit(lambda p, x_T: flow(p.denoiser(VE), x_T))
        replay[count] = np.stack([np.asarray(run(optimum(s), x_T)) for s in seeds])
        for s in seeds:
            found = rounded(errors(true, replay[count][s], made[i, s]))
            rows.append({"num_train": count, "seed": int(s), "steps": preset.digit_steps, **found})
        parts.append({"num_train": count, **rounded(parts_of(true, made[i]))})
    return Digits(rows, parts, true, made, replay)


# ---- the report ---------------------------------------------------------------------------------


def lines_of(rows: list[dict[str, Any]], column: str, along: str) -> tuple[Any, Any, Any]:
    """Return ``(x, mean, standard deviation over seeds)`` of a column."""
    where = sorted({r[along] for r in rows})
    values = [[r[column] for r in rows if r[along] == q] for q in where]
    return where, [np.mean(v) for v in values], [np.std(v) for v in values]


def error_curves(rows: list[dict[str, Any]], along: str, label: str, **options: Any) -> Any:
    """Return the figure of E_gen and E_mem."""
    lines = {
        "E_gen, to the teacher": lines_of(rows, "e_gen", along),
        "E_mem, to the training data": lines_of(rows, "e_mem", along),
    }
    return reporting.figures.curves(
        lines, xlabel=label, ylabel="flow distance / norm", xscale="log", **options
    )


def part_curves(parts: list[dict[str, Any]], along: str, label: str) -> Any:
    """Return the figure of bias^2 and variance."""
    x = [p[along] for p in parts]
    lines = {
        "bias²": (x, [p["squared_bias"] for p in parts]),
        "variance": (x, [p["variance"] for p in parts]),
        "E_gen²": (x, [p["squared_bias"] + p["variance"] for p in parts]),
    }
    return reporting.figures.curves(
        lines, xlabel=label, ylabel="share of the squared norm", xscale="log"
    )


def crosses(rows: list[dict[str, Any]], along: str, what: str) -> str:
    """Return a sentence on the transition."""
    at = crossing(rows, along)
    return f"The errors cross at {what} = {at:.3g}." if at else "The errors do not cross here."


def report_mixture(report: Any, rows: Any, parts: Any, preset: Preset, out: pathlib.Path) -> None:
    """Curves and tables beside the reference values."""
    label = "samples per dimension N_k / d"
    for rank in sorted({r["rank"] for r in rows}):
        mine = [r for r in rows if r["rank"] == rank]
        here = [p for p in parts if p["rank"] == rank]
        report.section(f"Exact teacher, d = {rank}", crosses(mine, "ratio", "N_k / d"))
        dashed = {
            f"{e}, reference": (RATIOS, REFERENCE[rank, e.lower()]) for e in ("E_gen", "E_mem")
        }
        figure = error_curves(mine, "ratio", label, dashed=dashed)
        figure.savefig(out / f"mixture_{rank}.png", dpi=150)
        report.figure(
            figure,
            f"Students of width {preset.width} after {preset.num_steps} steps; band: standard "
            "deviation over training sets. Reference: one student of width 256, 6000 steps.",
        )
        if here:
            figure = part_curves(here, "ratio", label)
            figure.savefig(out / f"bias_variance_{rank}.png", dpi=150)
            report.figure(figure, "The squared error of the students and its two parts, unbiased.")
        cells = []
        for ratio in sorted({r["ratio"] for r in mine}):
            cell: list[Any] = [ratio]
            for column in ("e_gen", "e_mem"):
                values = [r[column] for r in mine if r["ratio"] == ratio]
                known = dict(zip(RATIOS, REFERENCE[rank, column], strict=True))
                cell += [round(float(np.mean(values)), 3), round(float(np.std(values)), 3)]
                cell.append(known.get(ratio, ""))
            cell.append(max(r["e_gen_error"] for r in mine if r["ratio"] == ratio))
            cells.append(cell)
        columns = ["N_k / d", "E_gen", "std", "reference", "E_mem", "std", "reference"]
        report.table([*columns, "error of E_gen from the noises"], cells)


def report_time(report: Any, rows: Any, out: pathlib.Path) -> None:
    """Curves along training."""
    report.section("Along training, d = 6")
    for ratio in sorted({r["ratio"] for r in rows}):
        mine = [r for r in rows if r["ratio"] == ratio]
        figure = error_curves(mine, "steps", "training steps")
        figure.savefig(out / f"time_{ratio}.png", dpi=150)
        best = min(mine, key=lambda r: r["e_gen"])
        last = mine[-1]
        report.figure(
            figure,
            f"N_k / d = {ratio}: nearest to the teacher after {best['steps']} steps "
            f"({best['e_gen']:.2f}), after {last['steps']} at {last['e_gen']:.2f}.",
        )


def report_digits(report: Any, found: Digits, preset: Preset, out: pathlib.Path) -> None:
    """Curves, and pictures of the same noises."""
    report.section("A network as teacher, digits", crosses(found.rows, "num_train", "N"))
    figure = error_curves(found.rows, "num_train", "training examples N")
    figure.savefig(out / "digits.png", dpi=150)
    report.figure(figure, f"Students after {preset.digit_steps} steps, two disjoint sets each.")
    figure = part_curves(found.parts, "num_train", "training examples N")
    figure.savefig(out / "bias_variance_digits.png", dpi=150)
    report.figure(figure, "The squared error of the students and its two parts, unbiased.")
    shown = min(12, len(found.true))
    few, many = 0, len(preset.digit_counts) - 1
    strips = [found.true[:shown]]
    strips += [found.made[i, 0, :shown] for i in range(few, many + 1)]
    strips.append(found.replay[preset.digit_counts[few]][0, :shown])
    picture = reporting.image_grid(np.concatenate(strips), columns=shown, side=40)
    (out / "digits_samples.png").write_bytes(reporting.png(picture))
    counts = ", ".join(map(str, preset.digit_counts))
    report.picture(
        picture,
        f"One noise a column. Rows: teacher; students of N = {counts}; replay of the "
        f"{preset.digit_counts[few]} examples.",
    )


def main() -> int:
    """Run the parts; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.probability_flow_distance")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/probability_flow_distance")
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--ranks", type=int, choices=(3, 6), nargs="+", default=[3, 6])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    report = reporting.Report("Probability flow distance", f"preset {options.preset}")
    if "mixture" in options.part:
        rows, parts = run_mixture(preset, out, options.seed, options.ranks)
        write_csv(out / "mixture.csv", rows)
        write_csv(out / "mixture_parts.csv", parts)
        report_mixture(report, rows, parts, preset, out)
    if "time" in options.part:
        rows = run_time(preset, out, options.seed)
        write_csv(out / "time.csv", rows)
        report_time(report, rows, out)
    if "digits" in options.part:
        found = run_digits(preset, out, options.seed)
        write_csv(out / "digits.csv", found.rows)
        write_csv(out / "digits_parts.csv", found.parts)
        report_digits(report, found, preset, out)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
