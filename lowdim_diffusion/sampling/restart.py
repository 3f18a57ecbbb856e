r"""Restart sampling: climb back to a higher noise level and come down again, several times.

An ODE carries the error of its first steps to the end; a random solver forgets it, but makes more
error in every step. Restarts do both: at a low level ``l`` of the run, noise takes the examples
back to a higher level ``h``, all at once and exactly, and the solver brings them down again. Each
time what was wrong at ``l`` shrinks by the contraction of the flow between the two levels.

References:
    Xu, Deng, Cheng, Tian, Liu, Jaakkola 2023, arXiv 2306.14878, algorithms 1-2.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import schedules
from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, DenoiseFn, Int, PRNGKey, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.sampling.driver import SampleResult, sample
from lowdim_diffusion.sharding import example_keys
from lowdim_diffusion.solvers import Solver
from lowdim_diffusion.solvers._base import check_grid

__all__ = ["Restart", "sample_restart"]


class Restart(NamedTuple):
    """One interval of noise levels ``sigma / alpha`` that is passed again.

    Attributes:
        low: where the climb begins; the grid's level nearest to it (in logarithm) is taken.
        high: where it ends, above ``low``.
        num_steps: steps from ``high`` back to ``low``, on EDM's grid.
        repeats: how often.
    """

    low: float
    high: float
    num_steps: int
    repeats: int = 1


def sample_restart(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    *,
    solver: Solver,
    restarts: Sequence[Restart],
    index: Int[Array, " b"] | None = None,
) -> SampleResult:
    """Return samples of a run along ``ts`` with restarts on the way.

    Args:
        key: typed random key.
        denoise_fn: ``(x_t, t) -> x0_hat``.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` known times, noise to data.
        shape_or_x_T: as for :func:`sample`.
        solver: any; the paper's is ``heun()``.
        restarts: intervals, the highest ``low`` first. On CIFAR-10 the paper takes
            ``Restart(.06, .30, 3, 10)``, after 18 steps of Heun's method.
        index: global indices ``[b]`` of the examples; default ``arange(b)``.

    Returns:
        A :class:`SampleResult` without trajectory.

    Raises:
        ValueError: if ``ts`` is traced, or an interval is empty, leaves the schedule's range or
            does not follow the ones before.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)
        >>> ts, heun = schedules.karras_grid(18), solvers.heun()
        >>> again = [Restart(0.06, 0.3, 3, 10)]
        >>> run = {"solver": heun, "restarts": again}
        >>> sample_restart(jax.random.key(0), white, schedules.VE(), ts, (4, 3), **run).nfe
        95
    """
    ts = check_grid("sample_restart", schedule, ts)
    if not is_concrete(ts):
        raise fail("sample_restart", "the grid is traced", "known times", "a tracer")
    ts = np.asarray(ts)
    with jax.ensure_compile_time_eval():
        levels = np.asarray(schedules.noise_levels(schedule, ts[:-1]), np.float64)
    places = [0, *(_place(restart, levels) for restart in restarts), len(ts) - 1]
    if any(a >= b for a, b in itertools.pairwise(places)):
        got = [restart.low for restart in restarts]
        fix = "two of them need a step of the grid between"
        raise fail("sample_restart", "order of the restarts", "decreasing low", got, fix)

    keys = [jax.random.fold_in(key, i) for i in range(2 * len(restarts) + 1)]
    run = functools.partial(sample, denoise_fn=denoise_fn, schedule=schedule, solver=solver)
    start, nfe = shape_or_x_T, 0
    for i, (a, b) in enumerate(itertools.pairwise(places)):
        made = run(keys[2 * i], ts=ts[a : b + 1], shape_or_x_T=start, index=index)
        start, nfe = made.x, nfe + made.nfe
        if i == len(restarts):
            return SampleResult(made.x, None, None, None, nfe)
        high, steps, repeats = restarts[i].high, restarts[i].num_steps, restarts[i].repeats
        with jax.ensure_compile_time_eval():
            grid = schedules.karras_grid(steps + 1, float(levels[b]), high)[:-1]
            down = np.array(schedules.times_from_sigmas(schedule, grid))
        down[-1] = ts[b]
        rows = jnp.arange(start.shape[0]) if index is None else index

        def again(x: Array, key: Array, down: Any = down, rows: Any = rows) -> Any:
            noise_key, run_key = jax.random.split(key)
            x = _climb(noise_key, schedule, down[-1], down[0], x, rows)
            return run(run_key, ts=down, shape_or_x_T=x, index=index).x, None

        start, _ = jax.lax.scan(again, start, jax.random.split(keys[2 * i + 1], repeats))
        nfe += repeats * steps * solver.num_evals
    raise AssertionError("a run has a last part")


def _place(restart: Restart, levels: np.ndarray) -> int:
    """The grid point where a restart begins its climb."""
    check_int("sample_restart", "num_steps", restart.num_steps)
    check_int("sample_restart", "repeats", restart.repeats)
    if not 0 < restart.low < restart.high <= levels[0]:
        expected = f"0 < low < high <= {levels[0]:.4g}, the grid's first level"
        raise fail("sample_restart", "levels of a restart", expected, tuple(restart[:2]))
    place = int(np.argmin(np.abs(np.log(levels[1:] / restart.low)))) + 1
    if levels[place] >= restart.high:
        fix = (
            f"the grid's level nearest to low is {levels[place]:.4g}; raise high or take more steps"
        )
        raise fail("sample_restart", "an empty restart", "low < high", tuple(restart[:2]), fix)
    return place


def _climb(key: PRNGKey, schedule: Schedule, low: Any, high: Any, x: Array, rows: Array) -> Array:
    """Noise of the forward process, from time ``low`` to ``high``; each example's own."""
    alpha, sigma = (f(jnp.array([low, high], x.dtype)) for f in (schedule.alpha, schedule.sigma))
    ratio = alpha[1] / alpha[0]
    std = safe_sqrt(sigma[1] ** 2 - (ratio * sigma[0]) ** 2)
    draw = lambda key: jax.random.normal(key, x.shape[1:], x.dtype)
    return ratio * x + std * jax.vmap(draw)(example_keys(key, rows))
