"""Guidance by linear measurements beside the exact posterior: which methods are biased, how much.

- **posterior**: on a mixture of three rank-4 Gaussians and on one rank-12 Gaussian in 64 dimensions
  (an 8x8 picture) the law of x_0 given ``y = A x_0 + s n`` is known. Every method draws from it,
  for random matrices of 32, 16 and 8 rows, a mask, a blur and block means, without noise and with
  two levels of it; its draws are compared with exact ones.
- **steps**: error against the number of steps for noiseless measurements of the mixture, beside the
  published errors.
- **images**: digits, or a trained run of yours (``--run``): filling a box, random pixels,
  super-resolution, deblurring.

Columns of the table, lengths in units of the root mean square of x_0:

==============  ==================================================================================
error           of one draw to the truth; an exact draw has ``exact_error``
bias            of the mean of draws to the exact posterior mean (what few draws add is taken off)
variance_ratio  total variance of the draws over that of the exact posterior
weight_error    total variation between the shares of the components and their exact weights
distance        sliced Wasserstein-2 to exact draws; two sets of exact draws are ``floor`` apart
misfit          norm of ``y - A x`` over that of the noise; over that of y where there is none
nfe, vjps       evaluations of the denoiser, and of its derivative, for one draw
==============  ==================================================================================

References:
    Chung et al. 2023, arXiv 2209.14687 (DPS); Song et al. 2023 (PiGDM); Wang et al. 2023, arXiv
    2212.00490 (DDNM); Chung et al. 2024, arXiv 2303.05754 (DDS); Rozet et al. 2024, arXiv
    2405.13712 (MMPS); Song et al. 2024, arXiv 2307.08123 (ReSample); Lugmayr et al. 2022, arXiv
    2201.09865 (RePaint).
"""

import argparse
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import (
    distributions,
    guidance,
    linalg,
    reporting,
    sampling,
    schedules,
    sharding,
    solvers,
)
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli import main as lowdim
from lowdim_diffusion.cli.loading import LoadedRun, load_run
from lowdim_diffusion.editing import masks

PARTS = ("posterior", "steps", "images")
SCHEDULE = schedules.VPLinear()
SHAPE, DIM = (8, 8, 1), 64
DATA_STD = (7.5 / DIM) ** 0.5
MMPS_ITERS = 5


OF_IMAGES = (
    "MMPS, 1 iteration",
    "MMPS, GMRES",
    "PiGDM",
    "DPS",
    "DDNM",
    "DDS",
    "replacement x 10",
)
OF_POSTERIOR = ("MMPS", *OF_IMAGES[1:], "replacement", "ReSample", "DDS as denoiser", "no guidance")


class Preset(NamedTuple):
    """Sizes of the experiment."""

    methods: tuple[str, ...]
    priors: tuple[str, ...]
    noises: tuple[float, ...]
    num_problems: int
    num_draws: int
    num_steps: int
    max_steps: int
    """Of the comparison with the published errors."""
    train_steps: int
    num_images: int
    image_steps: int


PRIORS = ("mixture", "Gaussian")
PRESETS = {
    "smoke": Preset(("MMPS", "DDS", "no guidance"), PRIORS[:1], (0.1,), 4, 16, 5, 20, 30, 3, 5),
    "cpu": Preset(OF_POSTERIOR, PRIORS, (0.0, 0.1, 0.5), 16, 64, 100, 300, 3000, 8, 50),
    "paper": Preset(
        OF_POSTERIOR, PRIORS, (0.0, 0.02, 0.1, 0.5), 200, 256, 1000, 300, 20000, 16, 1000
    ),
}


# ---- methods ------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What a method is given."""

    denoise_fn: Any
    schedule: Any
    operator: guidance.LinearOperator
    y: jax.Array
    noise_std: Any
    """The number 0 where there is none, so that methods take their noiseless form."""
    data_std: float
    keys: jax.Array
    """One per example."""

    @property
    def noisy(self) -> bool:
        """Whether there is noise."""
        return not (isinstance(self.noise_std, float) and self.noise_std == 0)


class Method(NamedTuple):
    """A way to sample given a measurement."""

    make: Callable[[Setting], dict[str, Any]]
    """Arguments of ``sampling.sample``."""
    extra_evals: int = 0
    vjps: int = 0
    repeats: int = 1


def _dds(s: Setting) -> Any:
    gamma = s.data_std**2 / s.noise_std**2 if s.noisy else None
    return guidance.dds(s.operator, s.y, gamma=gamma)


def _ddnm(s: Setting) -> Any:
    return guidance.ddnm(s.schedule, s.operator, s.y, noise_std=s.noise_std)


def _wrapped(s: Setting) -> dict[str, Any]:
    hook = _dds(s)
    return {"denoise_fn": lambda x, t: hook(s.denoise_fn(x, t), x, t, None)[0]}


def _dps(s: Setting) -> dict[str, Any]:
    return {"correct": guidance.dps(s.denoise_fn, s.schedule, s.operator, s.y, step=0.3)}


def _pigdm(s: Setting) -> dict[str, Any]:
    levels = {"noise_std": s.noise_std, "data_std": s.data_std}
    return {"correct": guidance.pigdm(s.denoise_fn, s.schedule, s.operator, s.y, **levels)}


def _mmps(s: Setting, num_iters: int = MMPS_ITERS, solver: Any = "cg") -> dict[str, Any]:
    options = {"noise_std": s.noise_std, "num_iters": num_iters, "linear_solver": solver}
    return {"denoise_fn": guidance.mmps(s.denoise_fn, s.schedule, s.operator, s.y, **options)}


def _replacement(s: Setting, repeats: int = 1) -> dict[str, Any]:
    return {
        "correct": guidance.replacement(s.schedule, s.operator, s.y, noise_std=s.noise_std),
        "correct_carry": s.keys,
        "solver": guidance.repeated(solvers.ancestral(), repeats),
    }


METHODS = {
    "MMPS": Method(_mmps, vjps=MMPS_ITERS + 1),
    "MMPS, 1 iteration": Method(functools.partial(_mmps, num_iters=1), vjps=2),
    "MMPS, GMRES": Method(functools.partial(_mmps, solver="gmres"), vjps=MMPS_ITERS + 1),
    "PiGDM": Method(_pigdm, 1, 1),
    "DPS": Method(_dps, 1, 1),
    "DDNM": Method(lambda s: {"correct": _ddnm(s)}),
    "DDS": Method(lambda s: {"correct": _dds(s)}),
    "DDS as denoiser": Method(_wrapped),
    "ReSample": Method(lambda s: {"correct": _ddnm(s), "solver": guidance.resample()}),
    "replacement": Method(_replacement),
    "replacement x 10": Method(functools.partial(_replacement, repeats=10), repeats=10),
    "no guidance": Method(lambda s: {}),
    "DDS, eta .85": Method(lambda s: {"correct": _dds(s), "solver": solvers.ddim(0.85)}),
}


def draw(key: Any, method: str, setting: Setting, ts: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return samples ``shape`` given the setting's measurements."""
    options = {"denoise_fn": setting.denoise_fn, "solver": solvers.ddim()}
    options |= METHODS[method].make(setting)
    denoise_fn = options.pop("denoise_fn")
    return sampling.sample(key, denoise_fn, setting.schedule, ts, shape, **options).x


# ---- priors and operators -----------------------------------------------------------------------


def prior(name: str, key: Any) -> distributions.MoLRG:
    """Return three components of rank 4, or one of rank 12, of as much variance; floor 1e-3.

    Both in arrays of one shape, for which everything compiles once.
    """
    if name == "mixture":
        bases = jnp.pad(linalg.random_frames(key, 3, DIM, 4), ((0, 0), (0, 0), (0, 8)))
        scales = jnp.sqrt(jnp.pad(jnp.array([4, 2, 1, 0.5]), (0, 8)))
        return distributions.MoLRG(bases, scales=jnp.tile(scales, (3, 1)), noise_std=1e-3)
    bases = jnp.tile(linalg.random_frames(key, 1, DIM, 12), (3, 1, 1))
    scales = jnp.sqrt(jnp.array([4, 2, 1, 0.5]).repeat(3) / 3)
    return distributions.MoLRG(
        bases, jnp.eye(3)[0], scales=jnp.tile(scales, (3, 1)), noise_std=1e-3
    )


def operators(key: Any) -> dict[str, guidance.LinearOperator]:
    """Return what is measured."""
    random = lambda rows: guidance.matrix(
        jax.random.normal(jax.random.fold_in(key, rows), (rows, DIM)) / rows**0.5, SHAPE
    )
    return {
        "random 32": random(32),
        "random 16": random(16),
        "random 8": random(8),
        "mask 32": guidance.random_inpainting(key, SHAPE, 32),
        "blur": guidance.blur(SHAPE, 1.0),
        "means 2x2": guidance.downsampling(SHAPE, 2),
    }


# ---- against the exact posterior ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("method", "noisy", "num_steps"))
def _draws(
    key: Any, p: Any, a: Any, y: Any, noise_std: Any, *, method: str, noisy: bool, num_steps: int
) -> jax.Array:
    """Samples ``[b, n]``; one program for all operators, as matrices of one shape."""
    keys = sharding.example_keys(jax.random.fold_in(key, 1), jnp.arange(len(y)))
    setting = Setting(
        p.denoiser(SCHEDULE),
        SCHEDULE,
        guidance.matrix(a),
        y,
        noise_std if noisy else 0.0,
        DATA_STD,
        keys,
    )
    return draw(key, method, setting, schedules.log_snr_grid(SCHEDULE, num_steps), (len(y), DIM))


def sliced_distance(x: jax.Array, y: jax.Array, directions: jax.Array) -> jax.Array:
    """Return the sliced Wasserstein-2 distance ``[b]`` of draws ``[s, b, n]``, times sqrt(n)."""
    sides = (jnp.sort(jnp.einsum("sbn,nd->dbs", a, directions), -1) for a in (x, y))
    return jnp.sqrt(x.shape[-1] * jnp.mean((next(sides) - next(sides)) ** 2, (0, 2)))


@jax.jit
def _compare(key: Any, p: Any, given: Any, a: Any, y: Any, x: Any, x0: Any) -> dict[str, jax.Array]:
    """Statistics of draws ``x: [s, b, n]`` beside exact ones."""
    exact_key, other_key, direction_key = jax.random.split(key, 3)
    count = len(x)
    exact, other = (given.sample(k, count)[0] for k in (exact_key, other_key))
    directions = jax.random.normal(direction_key, (DIM, 128))
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    rms = jnp.sqrt(jnp.mean(jnp.sum(x0**2, -1)))
    mean = given.mean()
    spread = jnp.sum(jnp.var(x, axis=0, ddof=1), -1)
    off = jnp.sum((x.mean(0) - mean) ** 2, -1) - spread / count
    noise = jnp.asarray(0.05, x.dtype)
    labels = jnp.argmax(p.posterior_weights(x.reshape(-1, DIM), 1.0, noise), -1)
    shares = jax.nn.one_hot(labels, given.weights.shape[-1]).reshape(*x.shape[:2], -1).mean(0)
    size = lambda v: jnp.sqrt(jnp.mean(jnp.sum(v**2, -1)))
    square = lambda v: size(v - x0) / rms
    return {
        "error": square(x),
        "exact_error": square(exact),
        "mean_error": square(x.mean(0)),
        "exact_mean_error": square(mean),
        "bias": jnp.sqrt(jnp.maximum(jnp.mean(off), 0)) / rms,
        "variance_ratio": jnp.sum(spread) / jnp.sum(given.variance()),
        "weight_error": 0.5 * jnp.mean(jnp.sum(jnp.abs(shares - given.weights), -1)),
        "distance": jnp.mean(sliced_distance(x, exact, directions)) / rms,
        "floor": jnp.mean(sliced_distance(other, exact, directions)) / rms,
        "misfit": size(jnp.matmul(x, a.T, precision="highest") - y),
    }


@functools.partial(jax.jit, static_argnames="num_draws")
def _conditioned(p: Any, a: Any, y: Any, noise_std: Any, num_draws: int) -> tuple[Any, Any]:
    return distributions.condition(p, a, y, noise_std), jnp.tile(y, (num_draws, 1))


def measured(preset: Preset, seed: int) -> dict[tuple[str, float, str], tuple[Any, ...]]:
    """Return ``(p, a, y, x0, number of rows)`` of each problem.

    Rows of zeros, which say nothing, bring all operators to one shape.
    """
    p_key, x_key, a_key, key = jax.random.split(jax.random.key(seed), 4)
    problems = {}
    for name in preset.priors:
        p = prior(name, p_key)
        x0, _ = p.sample(x_key, preset.num_problems)
        for label, operator in operators(a_key).items():
            rows = math.prod(operator.measurement_shape)
            a = jnp.pad(operator.matrix(), ((0, DIM - rows), (0, 0)))
            for noise_std in preset.noises:
                y = guidance.measure(key, operator, x0.reshape(-1, *SHAPE), noise_std)
                y = jnp.pad(y.reshape(len(x0), -1), ((0, 0), (0, DIM - rows)))
                problems[name, noise_std, label] = (p, a, y, x0, rows)
    return problems


def posterior_rows(preset: Preset, seed: int, out: pathlib.Path) -> list[dict[str, Any]]:
    """Measure all methods on all problems; ``posterior.csv`` grows as they finish."""
    key, rows = jax.random.key(seed + 1), []
    problems = measured(preset, seed)
    for method in preset.methods:
        cost = METHODS[method]
        evals = 1 + (preset.num_steps - 1) * cost.repeats
        for (name, noise_std, label), (p, a, y, x0, num_rows) in problems.items():
            given, many = _conditioned(p, a, y, noise_std, preset.num_draws)
            options = {"method": method, "noisy": noise_std > 0, "num_steps": preset.num_steps}
            x = _draws(key, p, a, many, noise_std, **options)
            found = _compare(key, p, given, a, y, x.reshape(preset.num_draws, *x0.shape), x0)
            found = {column: float(value) for column, value in found.items()}
            of_noise = noise_std * num_rows**0.5
            found["misfit"] /= of_noise or float(jnp.sqrt(jnp.mean(jnp.sum(y**2, -1))))
            rows.append(
                {
                    "prior": name,
                    "operator": label,
                    "noise_std": noise_std,
                    "method": method,
                    "nfe": evals * (1 + cost.extra_evals),
                    "vjps": evals * cost.vjps,
                    **found,
                }
            )
        write_csv(out / "posterior.csv", rows)
        print(method, flush=True)
    return rows


COLUMNS = {
    "distance": ("Distance of draws to exact draws; last row: between two exact sets.", "floor"),
    "bias": ("Bias of the mean.", None),
    "variance_ratio": ("Variance over the exact one.", None),
    "weight_error": ("Weights of the components.", None),
    "error": ("Error of a draw to the truth; last row: of an exact draw.", "exact_error"),
}


def posterior(preset: Preset, options: Any, report: reporting.Report) -> None:
    """Write ``posterior.csv`` and its tables."""
    rows = posterior_rows(preset, options.seed, options.out)
    names = list(dict.fromkeys(row["operator"] for row in rows))
    for name in preset.priors:
        for noise_std in preset.noises:
            at = {
                (r["method"], r["operator"]): r
                for r in rows
                if (r["prior"], r["noise_std"]) == (name, noise_std)
            }
            report.section(f"{name}, noise {noise_std:g}")
            for column, (caption, exact) in COLUMNS.items():
                cells = [
                    [method, *(f"{at[method, o][column]:.3f}" for o in names)]
                    for method in preset.methods
                ]
                if exact:
                    cells.append(
                        ["exact", *(f"{at[preset.methods[0], o][exact]:.3f}" for o in names)]
                    )
                report.table(["method", *names], cells, caption=caption)


# ---- error against steps ------------------------------------------------------------------------

PUBLISHED = {
    "DDS, 32 rows": {20: 9.7e-2, 50: 1.8e-2, 100: 4.8e-3, 300: 2.5e-3},
    "DDS, 16 rows": {20: 0.57, 50: 0.22, 100: 5e-2, 300: 6e-3},
    "DDS, 8 rows": {20: 0.94, 50: 0.61, 100: 0.37},
    "DDS, 32 rows, eta .85": {100: 4.0e-2},
    "DDS as denoiser, 32 rows": {100: 0.218, 300: 0.141},
    "ReSample, 32 rows": {100: 0.074, 300: 0.031},
    "replacement, mask 32": {50: 0.152, 200: 0.123},
    "replacement x 10, mask 32": {50: 0.041},
    "DDS, mask 32": {50: 0.020, 100: 0.005, 200: 0.003},
}
"""Errors with noiseless measurements of the mixture, DDIM."""

GRIDS = {"uniform in t": schedules.uniform_grid, "log-SNR": schedules.log_snr_grid}


def steps_rows(preset: Preset, seed: int, num_problems: int) -> list[dict[str, Any]]:
    """Return errors against the number of steps, a matrix of its own for each example."""
    p_key, x_key, a_key, key = jax.random.split(jax.random.key(seed), 4)
    p = prior("mixture", p_key)
    x0, _ = p.sample(x_key, num_problems)
    relative = lambda x: float(jnp.linalg.norm(x - x0) / jnp.linalg.norm(x0))
    keys = jax.random.split(key, num_problems)

    @functools.partial(jax.jit, static_argnames=("method", "grid", "num_steps"))
    def run(a: Any, *, method: str, grid: str, num_steps: int) -> jax.Array:
        ts = GRIDS[grid](SCHEDULE, num_steps)

        def one(key: Any, a: Any, x: Any) -> jax.Array:
            operator, own = guidance.matrix(a), jax.random.split(key, 1)
            y = operator.apply(x[None])
            setting = Setting(p.denoiser(SCHEDULE), SCHEDULE, operator, y, 0.0, DATA_STD, own)
            return draw(key, method, setting, ts, (1, DIM))[0]

        return jax.vmap(one)(keys, a, x0)

    exact = jax.jit(jax.vmap(lambda a, x: distributions.condition(p, a, (a @ x)[None]).mean()[0]))
    mask = jnp.broadcast_to(operators(a_key)["mask 32"].matrix(), (num_problems, 32, DIM))
    rows = []
    for label, published in PUBLISHED.items():
        method, measured = label.split(", ", 1)
        method += ", eta .85" if "eta" in label else ""
        a = mask
        if measured.split()[0].isdigit():
            shape = (num_problems, int(measured.split()[0]), DIM)
            a = jax.random.normal(a_key, shape) / shape[1] ** 0.5
        lengths = [n for n in published if n <= preset.max_steps]
        oracle = relative(exact(a, x0)) if lengths else None
        for num_steps in lengths:
            row: dict[str, Any] = {"method": label, "steps": num_steps}
            row["published"] = published[num_steps]
            for grid in GRIDS:
                row[grid] = relative(run(a, method=method, grid=grid, num_steps=num_steps))
            rows.append({**row, "exact posterior mean": oracle})
        print(label, flush=True)
    return rows


def steps(preset: Preset, options: Any, report: reporting.Report) -> None:
    """Write ``steps.csv``, its table and figure."""
    rows = steps_rows(preset, options.seed, 16 if options.preset == "smoke" else 256)
    write_csv(options.out / "steps.csv", rows)
    report.section(
        "Error against steps",
        "Noiseless measurements of the mixture: norm of the error over that of x_0. The published "
        "errors are those of the grid that is uniform in t.",
    )
    cells = [[r["method"], r["steps"], *(f"{v:.2g}" for v in list(r.values())[2:])] for r in rows]
    report.table(list(rows[0]), cells)
    lines, dashed = {}, {}
    for label in dict.fromkeys(row["method"] for row in rows):
        if len(PUBLISHED[label]) < 3:
            continue
        mine = [row for row in rows if row["method"] == label]
        lines[label] = ([r["steps"] for r in mine], [r["uniform in t"] for r in mine])
        dashed[f"{label} (published)"] = tuple(zip(*PUBLISHED[label].items(), strict=True))
    names: dict[str, Any] = {"xlabel": "steps", "ylabel": "relative error"}
    log: dict[str, Any] = {"xscale": "log", "yscale": "log"}
    report.figure(reporting.figures.curves(lines, dashed=dashed, **names, **log))


# ---- images -------------------------------------------------------------------------------------


def image_operators(key: Any, shape: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
    """Return operators, and what shows a measurement as an image."""
    height, width, _ = shape
    box = masks.box(shape, height // 4, width // 4, height // 2, width // 2)
    fill = guidance.inpainting(~box)
    few = guidance.random_inpainting(key, shape, height * width // 3)
    small = guidance.downsampling(shape, 2 if height < 16 else 4)
    return {
        "box": (fill, fill.transpose),
        "random pixels": (few, few.transpose),
        "super-resolution": (small, small.solve),
        "deblurring": (guidance.blur(shape, height / 10, boundary="reflect"), lambda y: y),
    }


def images(preset: Preset, options: Any, report: reporting.Report) -> None:
    """Write ``images.csv`` and one picture per operator: truth, measurement, every method."""
    path = options.run or str(options.out / "digits")
    if not options.run:
        argv = ["--out", path, "--train.steps", str(preset.train_steps), "--devices", "1"]
        if lowdim(["train", "--preset", "demo", *argv]):
            raise SystemExit("training the digits failed")
    run: LoadedRun = load_run(path)
    model, schedule = run.model, run.model.schedule
    dataset = build.dataset(model.config.data)
    index = np.random.default_rng(options.seed).choice(
        dataset.num_examples, preset.num_images, replace=False
    )
    x0, std = jnp.asarray(dataset.floats(index)), float(model.config.loss.data_std or 1.0)
    key = jax.random.key(options.seed)
    levels = schedules.karras_grid(preset.image_steps, 0.01 * std, 20 * std)
    ts = np.asarray(schedules.times_from_sigmas(schedule, levels))
    keys = sharding.example_keys(key, jnp.arange(len(x0)))
    rows = []
    report.section("Images", f"{dataset.describe()} Noise {options.noise:g}.")
    for name, (operator, show) in image_operators(key, x0.shape[1:]).items():
        y = guidance.measure(key, operator, x0, options.noise)
        sheet, made = [x0, show(y)], []
        for method in OF_IMAGES:
            spectral = method.startswith(("DDNM", "replacement"))
            if spectral and operator.spectral_fn is None:
                continue

            @jax.jit
            def solve(params: Any, y: Any, method: str = method, operator: Any = operator) -> Any:
                denoise_fn = build.denoiser(model, params)
                given = Setting(denoise_fn, schedule, operator, y, options.noise, std, keys)
                return draw(key, method, given, ts, x0.shape)

            found = solve(run.averaged, y)
            mse = jnp.mean((jnp.clip(found, -1, 1) - x0) ** 2)
            misfit = jnp.sqrt(jnp.mean((operator.apply(found) - y) ** 2))
            rows.append(
                {
                    "operator": name,
                    "method": method,
                    "psnr_db": float(10 * jnp.log10(4 / mse)),
                    "misfit_rms": float(misfit),
                }
            )
            print(name, method, f"{rows[-1]['psnr_db']:.1f} dB", flush=True)
            sheet.append(found)
            made.append(method)
        picture = reporting.image_grid(np.concatenate(sheet), columns=len(x0), side=64)
        file = options.out / f"images_{name.replace(' ', '_')}.png"
        file.write_bytes(reporting.png(picture))
        report.picture(picture, f"{name}: truth, measurement, {', '.join(made)}.")
    write_csv(options.out / "images.csv", rows)
    cells = [[r["operator"], r["method"], *(f"{r[c]:.3g}" for c in list(r)[2:])] for r in rows]
    report.table(list(rows[0]), cells)


def main() -> int:
    """Write tables, pictures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.inverse_problems")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/inverse_problems")
    )
    parser.add_argument("--run", help="a trained run; digits are trained if none is given")
    parser.add_argument("--noise", type=float, default=0.05, help="of measured images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    report = reporting.Report("Linear inverse problems", f"preset {options.preset}")
    for part in options.part:
        {"posterior": posterior, "steps": steps, "images": images}[part](
            PRESETS[options.preset], options, report
        )
    report.write(options.out / "report.html")
    print(f"written to {options.out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
