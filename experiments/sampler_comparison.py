"""Which sampler, on which grid, for how many evaluations? Every solver on targets that are known.

Deterministic solvers are judged by where single starts end, against an accurate run of the same
flow: root mean square distance over that of the data to their mean. Random ones are judged by the
law of their samples: sliced Wasserstein distance to fresh data, in the same unit, beside the
distance of two sets of data (the floor). Both against NFE, the evaluations of the denoiser, on
four grids: uniform and quadratic in time, uniform in log-SNR, EDM's.

Targets: a mixture of low-rank Gaussians in eight dimensions with its exact denoiser, under a
variance-preserving, a variance-exploding and a rectified-flow schedule; and a trained network
(``--run DIR``; without one, digits are trained here first), whose data are samples of an accurate
run. The network is compared on fewer grids and starts where each evaluation is dear (``cpu``). A
last part searches grids for a few steps (``sampling.search_sampler``).

References:
    Lu et al. 2022, arXiv 2211.01095, figures 2-3; Zhang & Chen 2023, arXiv 2204.13902, table 2;
    Karras et al. 2022, arXiv 2206.00364, figure 2; Liu et al. 2024, arXiv 2312.07243.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import distributions, linalg, reporting, sampling, schedules, solvers
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli import main as lowdim
from lowdim_diffusion.cli.loading import load_run
from lowdim_diffusion.sampling.search import accurate_ends, steps_for, usual_grids

SOLVERS: dict[str, dict[str, solvers.Solver]] = {
    "one step": {
        "Euler (DDIM)": solvers.euler(),
        "Heun": solvers.heun(),
        "midpoint": solvers.midpoint(),
        "RK4": solvers.rk4(),
        "DPM-Solver-2": solvers.dpm_solver(2),
        "DPM-Solver-3": solvers.dpm_solver(3),
        "BDIA": solvers.bdia(),
    },
    "several steps": {
        "DPM-Solver++(2M)": solvers.dpmpp_2m(),
        "DPM-Solver++(3M)": solvers.dpmpp_3m(),
        "UniPC-2": solvers.unipc(2),
        "UniPC-3": solvers.unipc(3),
        "DEIS-3": solvers.deis(3),
        "DEIS-4": solvers.deis(4),
        "GHVB-2": solvers.ghvb(2),
    },
    "random": {
        "ancestral": solvers.ancestral(),
        "SDE-DPM++(2M)": solvers.dpmpp_2m_sde(),
        "SDE-DPM++(3M)": solvers.dpmpp_3m_sde(),
        "Euler-Maruyama": solvers.euler_maruyama(),
        "SDE-Heun": solvers.sde_heun(),
        "Langevin": solvers.predictor_corrector(solvers.ancestral(), snr=0.1),
        "Heun, churned": solvers.heun(churn=10.0),
    },
}
SEARCHED = ("Euler (DDIM)", "Heun", "DPM-Solver++(2M)", "UniPC-3", "DEIS-3")


class Sizes(NamedTuple):
    """How large the comparison on one target is."""

    budgets: tuple[int, ...]
    grids: tuple[str, ...]
    num_starts: int
    num_samples: int
    num_directions: int
    reference_steps: int
    """Of Heun's method in the accurate run."""
    searched: tuple[int, ...]
    num_generations: int


class Preset(NamedTuple):
    """Sizes of the experiment."""

    per_family: int
    """Solvers of each family, at most."""
    mixture: Sizes
    network: Sizes
    train_steps: int


GRIDS = ("uniform", "quadratic", "log-snr", "karras")
FINE = (4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 250)
PRESETS = {
    "smoke": Preset(
        2,
        Sizes((6,), GRIDS, 32, 256, 16, 40, (4,), 2),
        Sizes((6,), GRIDS[2:], 4, 16, 16, 40, (), 0),
        30,
    ),
    "cpu": Preset(
        99,
        Sizes((5, 10, 20, 50, 100), GRIDS, 256, 4096, 128, 200, (4, 6, 10), 25),
        Sizes((5, 10, 20, 50), GRIDS[2:], 64, 256, 128, 100, (6, 10), 8),
        2500,
    ),
    "paper": Preset(
        99,
        Sizes(FINE, GRIDS, 2048, 50_000, 512, 1000, (4, 6, 10), 60),
        Sizes(FINE, GRIDS, 512, 2048, 512, 1000, (4, 6, 10), 60),
        20_000,
    ),
}


class Target(NamedTuple):
    """What is sampled."""

    name: str
    sizes: Sizes
    schedule: Any
    denoise_fn: Callable[..., Any]
    x_T: jax.Array
    """``[num_starts, *data]``."""
    t_min: float
    clean: bool
    """Whether runs end on the clean example; else at ``t_min``, and ends are divided by alpha."""
    data: jax.Array
    """``[num_samples, *data]``, and another set of them."""
    other: jax.Array

    def scale(self) -> Any:
        """What ends are divided by."""
        return 1.0 if self.clean else self.schedule.alpha(self.t_min)


def mixtures(sizes: Sizes, key: jax.Array) -> list[Target]:
    """Return the exact mixture under three schedules, noised to sigma / alpha = .01."""
    bases = linalg.random_frames(jax.random.key(0), 2, 8, 2)
    means = jnp.stack([0.6 * bases[0, :, 0], -0.6 * bases[0, :, 0]])
    scales = jnp.asarray([[1.0, 0.5], [0.5**0.5] * 2])
    p = distributions.MoLRG(bases, means=means, scales=scales, noise_std=0.1)
    found = []
    for name, schedule in (
        ("variance preserving", schedules.VPLinear()),
        ("variance exploding", schedules.VE()),
        ("rectified flow", schedules.RectifiedFlow()),
    ):
        keys = jax.random.split(key, 5)
        t_min = float(schedules.times_from_sigmas(schedule, 0.01))
        noisy = lambda k: (
            p.sample(k, sizes.num_samples)[0]
            + 0.01 * jax.random.normal(jax.random.fold_in(k, 1), (sizes.num_samples, 8))
        )
        x_0, _ = p.sample(keys[0], sizes.num_starts)
        t = schedule.t_max
        noise = jax.random.normal(keys[1], x_0.shape)
        x_T = schedule.alpha(t) * x_0 + schedule.sigma(t) * noise
        found.append(
            Target(
                f"mixture, {name}",
                sizes,
                schedule,
                p.denoiser(schedule),
                x_T,
                t_min,
                False,
                noisy(keys[2]),
                noisy(keys[3]),
            )
        )
    return found


def network(path: str, sizes: Sizes, key: jax.Array) -> Target:
    """Return a trained network; what it makes with many steps are its data."""
    run = load_run(path)
    schedule = run.model.schedule
    denoise_fn = build.denoiser(run.model, run.averaged)
    shape = run.model.net.data_shape
    low = max(0.002, float(schedules.noise_levels(schedule, schedule.t_min)))
    t_min = float(schedules.times_from_sigmas(schedule, low))
    grid = np.asarray(schedules.log_snr_grid(schedule, 64, t_min=t_min))
    noise = lambda k, count: sampling.initial_noise(k, schedule, schedule.t_max, (count, *shape))
    keys = jax.random.split(key, 3)
    data, other = (
        jax.jit(lambda x: accurate_ends(denoise_fn, schedule, grid, x, 64))(noise(k, count))
        for k, count in zip(keys, (sizes.num_samples,) * 2, strict=False)
    )
    x_T = noise(keys[2], sizes.num_starts)
    return Target(f"network {path}", sizes, schedule, denoise_fn, x_T, t_min, True, data, other)


def families(per_family: int) -> dict[str, dict[str, solvers.Solver]]:
    """Return the solvers that are compared, by family, at most so many of each."""
    few = lambda members: dict(itertools.islice(members.items(), per_family))
    return {family: few(members) for family, members in SOLVERS.items()}


def sliced_distance(x: jax.Array, y: jax.Array, directions: jax.Array) -> jax.Array:
    """Return the sliced Wasserstein-2 distance of two sets, along unit ``directions: [m, n]``."""
    projected = (jnp.sort(a.reshape(len(a), -1) @ directions.T, axis=0) for a in (x, y))
    along = jnp.linspace(0, 1, min(len(x), len(y)))
    at = lambda a: jax.vmap(
        lambda column: jnp.interp(along, jnp.linspace(0, 1, len(column)), column), 1, 1
    )(a)
    one, two = (at(a) for a in projected)
    return jnp.sqrt(jnp.mean((one - two) ** 2) * directions.shape[1])


def spread_of(x: jax.Array) -> float:
    """Return the root mean square distance of examples from their mean."""
    return float(jnp.sqrt(jnp.sum(jnp.var(x, axis=0))))


def reference_ends(target: Target) -> jax.Array:
    """Return where an accurate run carries the starts."""
    grid = usual_grids(target.schedule, 8, target.t_min, clean=target.clean)["log-snr"]
    num_steps = target.sizes.reference_steps
    run = lambda x: accurate_ends(target.denoise_fn, target.schedule, grid, x, num_steps)
    return jax.jit(run)(target.x_T)


def compare(
    target: Target, reference: jax.Array, per_family: int, key: jax.Array
) -> list[dict[str, Any]]:
    """Return tidy rows: one per solver, grid and budget."""
    spread = spread_of(target.data)
    schedule, dim = target.schedule, target.x_T[0].size
    directions = jax.random.normal(key, (target.sizes.num_directions, dim))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    floor = float(sliced_distance(target.other, target.data, directions)) / spread
    rows = []
    for family, members in families(per_family).items():
        for name, solver in members.items():
            for nfe in target.sizes.budgets:
                num_steps, cost = steps_for(solver, nfe, target.clean)
                if num_steps < 2:
                    continue
                grids = usual_grids(schedule, num_steps, target.t_min, clean=target.clean)

                @jax.jit
                def errors(ts: Any, x_T: Any, data: Any, solver: solvers.Solver = solver) -> Any:
                    def one(ts: Any) -> Any:
                        start = target.data.shape if solver.stochastic else x_T
                        made = sampling.sample(
                            key, target.denoise_fn, schedule, ts, start, solver=solver
                        ).x
                        if solver.stochastic:
                            made = made / target.scale()
                            return sliced_distance(made, data, directions)
                        error = (made - reference) / target.scale()
                        return jnp.sqrt(jnp.mean(error**2) * dim)

                    return jax.lax.map(one, ts)

                every = jnp.stack([jnp.asarray(grids[grid]) for grid in target.sizes.grids])
                found = errors(every, target.x_T, target.data)
                for grid, error in zip(target.sizes.grids, found.tolist(), strict=True):
                    row = {"target": target.name, "family": family, "solver": name, "grid": grid}
                    row |= {"budget": nfe, "num_steps": num_steps, "nfe": cost}
                    row["measure"] = "law" if solver.stochastic else "ends"
                    rows.append(row | {"error": error / spread, "floor": floor})
    return rows


def search(
    target: Target, reference: jax.Array, per_family: int, key: jax.Array
) -> list[dict[str, Any]]:
    """Return what searched grids reach with few evaluations, on starts kept apart."""
    members = {name: s for family in families(per_family).values() for name, s in family.items()}
    members = {name: solver for name, solver in members.items() if name in SEARCHED}
    rows = []
    for nfe in target.sizes.searched:
        pays = lambda solver, nfe=nfe: steps_for(solver, nfe, target.clean)[0] > 1
        found = sampling.search_sampler(
            key,
            target.denoise_fn,
            target.schedule,
            target.x_T,
            nfe=nfe,
            solvers={name: solver for name, solver in members.items() if pays(solver)},
            t_min=target.t_min,
            clean=target.clean,
            reference=reference,
            num_generations=target.sizes.num_generations,
        )
        rows += [{"target": target.name, "budget": nfe, **row} for row in found.table]
    return rows


def best_curves(rows: list[dict[str, Any]], family: str) -> dict[str, tuple[list, list]]:
    """Return, per solver, NFE and the error on the best of the grids."""
    lines = {}
    rows = [row for row in rows if row["family"] == family and np.isfinite(row["error"])]
    for name in dict.fromkeys(row["solver"] for row in rows):
        mine = [row for row in rows if row["solver"] == name]
        nfes = sorted({row["nfe"] for row in mine})
        lines[name] = (nfes, [min(r["error"] for r in mine if r["nfe"] == n) for n in nfes])
    return lines


def show(report: reporting.Report, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Add a target's figure and table to the report."""
    name = rows[0]["target"]
    panels = {family: best_curves(rows, family) for family in SOLVERS}
    figure = reporting.figures.curve_panels(
        panels,
        xlabel="NFE",
        ylabels=["error of ends", "error of ends", "error of the law"],
        xscale="log",
        yscale="log",
        levels=[None, None, rows[0]["floor"]],
    )
    figure.savefig(
        out / f"{name.replace('/', '_').replace(', ', '-').replace(' ', '_')}.png", dpi=150
    )
    report.section(name, "Each solver on the best of the grids; the table has all of them.")
    report.figure(
        figure,
        "Left and middle: distance of the ends of single starts from those of an accurate run, "
        "over the spread of the data. Right: sliced Wasserstein distance of the samples to data, "
        "in the same unit; the line is that of two sets of data.",
        wide=True,
    )
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    columns = ["solver", "grid", *(f"NFE up to {n}" for n in budgets)]
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        at = cells.setdefault((row["solver"], row["grid"]), {})
        at[row["budget"]] = f"{row['error']:.1e}"
    table = [[*names, *(found.get(n, "") for n in budgets)] for names, found in cells.items()]
    report.table(columns, table)


def main() -> int:
    """Write tables, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sampler_comparison")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--run", help="a trained run, or a pretrained network")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/sampler_comparison")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(options.seed)
    if options.run is None:
        options.run = str(out / "digits")
        command = ["train", "--preset", "digits", "--out", options.run]
        command += ["--train.steps", str(preset.train_steps)]
        if lowdim(command) != 0:
            return 1

    report = reporting.Report(
        "Samplers compared", "error against evaluations of the denoiser, solver by solver"
    )
    rows, searched = [], []
    targets = [*mixtures(preset.mixture, key), network(options.run, preset.network, key)]
    for target in targets:
        start = time.perf_counter()
        reference = reference_ends(target)
        mine = compare(target, reference, preset.per_family, key)
        rows += mine
        show(report, mine, out)
        searched += search(target, reference, preset.per_family, key)
        print(f"{target.name}: {time.perf_counter() - start:.0f} s", flush=True)
    report.section("Searched grids", "Error before and after, on starts not searched with.")
    columns = ["target", "budget", "solver", "num_steps", "start", "given_error", "error"]
    show_cell = lambda value: f"{value:.3g}" if isinstance(value, float) else value
    report.table(columns, [[show_cell(row[c]) for c in columns] for row in searched])
    write_csv(out / "sampler_comparison.csv", rows)
    write_csv(out / "searched_grids.csv", searched)
    report.write(out / "report.html")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
