r"""Search for the time grid, and the solver, that a denoiser is sampled best with.

With few steps the choice of the noise levels matters as much as the order of the solver. The search
moves the inner points of a grid to bring the ends of some trajectories near those of an accurate
run, by the cross-entropy method: candidates are drawn around a mean, all of them are run in one
scan, and the best fifth moves the mean. What is searched are the lengths of the steps in half the
log-SNR, as logarithms, so every candidate decreases from noise to data.

References:
    Li et al. 2023, arXiv 2309.10438 (AutoDiffusion); Liu, Ning, Yan, Li, Wang 2024, arXiv
    2312.07243 (unified sampling framework); Sabour, Fidler, Kreis 2024, arXiv 2404.14507 (align
    your steps); Rubinstein & Kroese 2004 (cross-entropy method).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import schedules
from lowdim_diffusion._checks import check_int, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.sampling.driver import evals_of, sample
from lowdim_diffusion.solvers import Solver, ends_clean, heun
from lowdim_diffusion.solvers._base import check_grid

__all__ = ["GridSearch", "SamplerSearch", "search_grid", "search_sampler"]

LEAST_GAP = 1e-3
"""Shortest step at the start, as a share of all."""
LEAST_HALF_LOG_SNR = -7.0
"""Where the search begins if the grid starts from pure noise."""

DistanceFn = Callable[[Array, Array], Array]


class GridSearch(NamedTuple):
    """A grid that was searched for.

    Attributes:
        ts: ``[num_steps + 1]``, the best grid found.
        error: its distance from the reference on the half of the starts not searched with.
        given_error: that of the grid given.
        errors: ``[num_generations]``, the least distance so far on the half searched with.
    """

    ts: Array
    error: Array
    given_error: Array
    errors: Array


class SamplerSearch(NamedTuple):
    """The best solver and grid of a budget, and what all others reached.

    Attributes:
        solver: name of the best solver.
        ts: ``[num_steps + 1]``, its grid.
        table: one row per solver: ``solver``, ``num_steps``, ``nfe``, ``start`` (the name of the
            best of the usual grids, where its search began), ``given_error`` and ``error``.
    """

    solver: str
    ts: np.ndarray
    table: list[dict[str, Any]]


def endpoint_error(x: Array, reference: Array) -> Array:
    """Return the root mean square over examples of their distances, a scalar."""
    return jnp.sqrt(jnp.mean(jnp.sum((x - reference) ** 2, axis=range(1, x.ndim))))


def search_grid(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_T: Float[Array, "b *data"],
    *,
    solver: Solver,
    reference: Float[Array, "b *data"] | None = None,
    distance_fn: DistanceFn | None = None,
    num_generations: int = 30,
    population: int = 48,
    spread: float = 0.5,
    batch_size: int = 8,
) -> GridSearch:
    """Return a better grid of as many steps, for one solver and denoiser.

    Args:
        key: typed random key.
        denoise_fn: ``(x_t, t) -> x0_hat``.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` times to start from; the first and the last one stay.
        x_T: ``[b, *data]`` starts at ``ts[0]``, from ``initial_noise``; the first half is searched
            with, the second half judges.
        solver: the method to be sampled with.
        reference: ``[b, *data]``, where these starts should end; default: 256 steps of Heun's
            method, uniform in log-SNR between the same ends.
        distance_fn: ``(x, reference) -> scalar``, to be minimised; default the root mean square
            distance of the ends, for deterministic solvers.
        num_generations: rounds of the search.
        population: candidates per round.
        spread: standard deviation of the first candidates' log step lengths.
        batch_size: candidates that are run side by side; memory is in proportion.

    Raises:
        ValueError: for fewer than two steps or starts, a bad grid, a reference of another shape, or
            a stochastic solver without ``distance_fn``.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import sampling, schedules, solvers
        >>> narrow = lambda x, t: 0.04 * x / (0.04 + t**2)  # data N(0, .04)
        >>> key, ve = jax.random.key(0), schedules.VE()
        >>> ts = schedules.karras_grid(6)
        >>> x_T = sampling.initial_noise(key, ve, ts[0], (16, 2))
        >>> run = {"solver": solvers.euler(), "num_generations": 5, "population": 16}
        >>> found = sampling.search_grid(key, narrow, ve, ts, x_T, **run)
        >>> bool(found.error < found.given_error)
        True
    """
    check_int("search_grid", "num_generations", num_generations)
    check_int("search_grid", "population", population, 5)
    ts = check_grid("search_grid", schedule, ts)
    if not is_concrete(ts):
        raise fail("search_grid", "the grid is traced", "known times", "a tracer")
    num_steps = len(ts) - 1
    if num_steps < 2:
        raise fail("search_grid", "nothing to search", "2 steps or more", num_steps)
    if len(x_T) < 2:
        raise fail("search_grid", "too few starts", "at least 2", len(x_T))
    if distance_fn is None:
        if solver.stochastic:
            fix = "give a distance_fn between distributions"
            what = "samples of a random solver have no end to compare"
            raise fail("search_grid", what, "a deterministic solver", solver.name, fix)
        distance_fn = endpoint_error
    if reference is None:
        reference = accurate_ends(denoise_fn, schedule, ts, x_T)
    check_shape("search_grid", "reference", reference, x_T.shape)
    half = len(x_T) // 2
    ends = jnp.asarray([ts[0], ts[-1]])
    low, high, start = _start(schedule, np.asarray(ts))
    run_key, key = jax.random.split(key)

    def grid(logits: Array) -> Array:
        gaps = jax.nn.softmax(logits)
        inner = low + (high - low) * jnp.cumsum(gaps)[:-1]
        times = schedule.t_from_log_snr(2 * inner)
        return jnp.concatenate([ends[:1], times, ends[1:]])

    def error(ts: Array, rows: slice) -> Array:
        # The same noise for all candidates of a random solver.
        made = sample(run_key, denoise_fn, schedule, ts, x_T[rows], solver=solver)
        found = distance_fn(made.x, reference[rows])
        return jnp.where(jnp.isfinite(found), found, jnp.inf)

    num_elite = max(population // 5, 2)

    def generation(carry: Any, key: Any) -> tuple[Any, Array]:
        mean, std, best, best_error = carry
        candidates = mean[None] + std[None] * jax.random.normal(key, (population, num_steps))
        candidates = candidates.at[0].set(best)
        errors = jax.lax.map(
            lambda logits: error(grid(logits), slice(None, half)), candidates, batch_size=batch_size
        )
        order = jnp.argsort(errors)
        elite = candidates[order[:num_elite]]
        new_mean = 0.2 * mean + 0.8 * elite.mean(0)
        new_std = 0.2 * std + 0.8 * elite.std(0) + 1e-3
        better = errors[order[0]] < best_error
        best = jnp.where(better, candidates[order[0]], best)
        best_error = jnp.minimum(errors[order[0]], best_error)
        return (new_mean, new_std, best, best_error), best_error

    carry = (start, jnp.full_like(start, spread), start, jnp.asarray(jnp.inf, start.dtype))
    keys = jax.random.split(key, num_generations)
    (_, _, best, _), errors = jax.lax.scan(generation, carry, keys)
    given, judges = jnp.asarray(ts).astype(start.dtype), slice(half, None)
    found = grid(best)
    return GridSearch(found, error(found, judges), error(given, judges), errors)


def search_sampler(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x_T: Float[Array, "b *data"],
    *,
    nfe: int,
    solvers: Mapping[str, Solver],
    t_max: Any = None,
    t_min: Any = None,
    clean: bool = True,
    **options: Any,
) -> SamplerSearch:
    """Return the solver and grid that come nearest to an accurate run, of a number of evaluations.

    For every solver, the best of the usual grids (uniform and quadratic in time, uniform in
    log-SNR, EDM's) with as many steps as ``nfe`` pays for is improved by :func:`search_grid`.

    Args:
        key: typed random key.
        denoise_fn: ``(x_t, t) -> x0_hat``.
        schedule: noise schedule.
        x_T: ``[b, *data]`` starts at ``t_max``.
        nfe: evaluations of the denoiser per sample, at most.
        solvers: names and deterministic solvers.
        t_max: first time; default the schedule's.
        t_min: last time but the clean end; default the schedule's.
        clean: whether grids end on the clean example.
        **options: of :func:`search_grid`.

    Raises:
        ValueError: if ``nfe`` pays for fewer than two steps of some solver.
    """
    check_int("search_sampler", "nfe", nfe, 2)
    if not solvers:
        raise fail("search_sampler", "no solvers", "at least one", dict(solvers))
    reference = options.pop("reference", None)
    distance_fn = options.get("distance_fn") or endpoint_error
    rows = []
    for name, solver in solvers.items():
        num_steps, cost = steps_for(solver, nfe, clean)
        if num_steps < 2:
            fix = "raise nfe or leave this solver out"
            raise fail("search_sampler", f"steps of {name}", "2 or more", num_steps, fix)
        grids = usual_grids(schedule, num_steps, t_min, t_max, clean=clean)
        if reference is None:
            reference = accurate_ends(denoise_fn, schedule, grids["log-snr"], x_T)

        @jax.jit
        def error(ts: Array, solver: Solver = solver, reference: Array = reference) -> Array:
            made = sample(key, denoise_fn, schedule, ts, x_T, solver=solver)
            return distance_fn(made.x, reference)

        first = {grid: float(error(jnp.asarray(ts))) for grid, ts in grids.items()}
        start = min(first, key=lambda grid: np.nan_to_num(first[grid], nan=np.inf))
        found = search_grid(
            key,
            denoise_fn,
            schedule,
            grids[start],
            x_T,
            solver=solver,
            reference=reference,
            **options,
        )
        row = {"solver": name, "num_steps": num_steps, "start": start, "nfe": cost}
        row |= {"given_error": float(found.given_error), "error": float(found.error)}
        rows.append((row, np.asarray(found.ts)))
    best, ts = min(rows, key=lambda pair: pair[0]["error"])
    return SamplerSearch(best["solver"], ts, [row for row, _ in rows])


def steps_for(solver: Solver, nfe: int, clean: bool) -> tuple[int, int]:
    """Return how many steps ``nfe`` evaluations pay for, and how many of them they take.

    Args:
        solver: the method.
        nfe: evaluations per sample, at most.
        clean: whether the last step goes to the clean example.
    """
    short_end = clean and solver.short_end
    num_steps = (nfe - short_end) // solver.num_evals + short_end
    return num_steps, evals_of(solver, num_steps, short_end)


def usual_grids(
    schedule: Schedule, num_steps: int, t_min: Any = None, t_max: Any = None, *, clean: bool = True
) -> dict[str, np.ndarray]:
    """Return the four usual grids by name, between the same ends.

    Args:
        schedule: noise schedule.
        num_steps: steps of each.
        t_min: last time, or the last but one if ``clean``; default the schedule's.
        t_max: first time; default the schedule's.
        clean: whether a last step goes to the clean example.
    """
    ends = {"t_min": t_min, "t_max": t_max}
    low, high = (
        schedules.noise_levels(schedule, getattr(schedule, name) if t is None else t)
        for name, t in ends.items()
    )
    points = num_steps if clean else num_steps + 1
    first = schedule.t_max if t_max is None else t_max
    # Pure noise has no level; EDM's largest stands for it.
    sigmas = schedules.karras_grid(points, float(low), float(jnp.minimum(high, 80.0)))
    found = {
        "uniform": schedules.uniform_grid(schedule, points, **ends),
        "quadratic": schedules.quadratic_grid(schedule, points, **ends),
        "log-snr": schedules.log_snr_grid(schedule, points, **ends),
        "karras": schedules.times_from_sigmas(schedule, sigmas).at[0].set(first),
    }
    return {name: np.asarray(ts if clean else ts[:-1]) for name, ts in found.items()}


def accurate_ends(
    denoise_fn: DenoiseFn, schedule: Schedule, ts: Any, x_T: Array, num_steps: int = 256
) -> Array:
    """Return where Heun's method ends with many steps, uniform in log-SNR between the same ends."""
    clean = ends_clean(schedule, ts)
    last = schedule.t_min if clean else ts[-1]
    fine = schedules.log_snr_grid(schedule, num_steps, t_min=last, t_max=ts[0])
    fine = fine if clean else fine[:-1]
    return sample(jax.random.key(0), denoise_fn, schedule, fine, x_T, solver=heun()).x


def _start(schedule: Schedule, ts: np.ndarray) -> tuple[Any, Any, Array]:
    """Both ends of half the log-SNR, and the grid's log step lengths between them."""
    clean = ends_clean(schedule, ts)
    half = lambda t: 0.5 * schedule.log_snr(jnp.asarray(t))
    low = jnp.maximum(half(ts[0]), LEAST_HALF_LOG_SNR)
    high = half(schedule.t_min if clean else ts[-1])
    inner = jnp.clip(half(ts[1:-1]), low, high)
    gaps = jnp.diff(jnp.concatenate([low[None], inner, high[None]])) / (high - low)
    return low, high, jnp.log(jnp.maximum(gaps, LEAST_GAP))
