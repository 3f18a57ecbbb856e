r"""Single-step methods of several stages: Runge-Kutta in rho, and DPM-Solver in log-SNR.

In ``y = x / alpha``, ``rho = sigma / alpha`` the probability-flow ODE is ``dy/drho = eps``. A stage
at the noise level ``rho_k`` starts from Euler's step to it and adds what the earlier stages found
to differ from the first,

.. math:: x_k = \alpha_k \hat x_0 + \sigma_k \epsilon_1
    + \sum_{1 < j < k} w_{kj}\,(\epsilon_j - \epsilon_1) ,

and so does the step itself. ``midpoint`` and ``rk4`` have the weights of their tableaus, times
``alpha_k (rho' - rho)``; ``dpm_solver`` places its stages evenly in ``lambda = log(alpha / sigma)``
and integrates ``d y / d lambda = -exp(-lambda) eps`` with the first factor exact. A step that
starts from pure noise, or ends on the clean example, is Euler's.

References:
    Lu, Zhou, Bao, Chen, Li, Zhu 2022, arXiv 2206.00927, algorithms 1 and 2;
    Zhang & Chen 2023, arXiv 2204.13902, section 3.3 (rho-RK).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice
from lowdim_diffusion._types import Array, DenoiseFn, Schedule
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    DrawFn,
    Grid,
    Solver,
    State,
    StepResult,
    carry_if,
    half_log_snr,
    memoryless,
    predict,
)

__all__ = ["dpm_solver", "midpoint", "rk4"]

_TABLEAUS = {
    "midpoint": [[1 / 2], [0, 1]],
    "rk4": [[1 / 2], [0, 1 / 2], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],
}
"""Rows of the Butcher tableau from the second stage on, the step's own last."""


class _Coefficients(NamedTuple):
    """Of the stages after the first, the last of them being the step's end."""

    t_first: Array
    alpha_first: Array
    sigma_first: Array
    noisy: Array
    t: Array
    alpha: Array
    sigma: Array
    weights: Array
    """``[num_steps, stages, stages - 1]``."""


def _step(
    denoise_fn: DenoiseFn,
    state: State,
    c: _Coefficients,
    draw: DrawFn | None,
    *,
    correct: CorrectFn | None = None,
    carry: Any = None,
    clean: bool = False,
) -> StepResult:
    del draw
    x0_hat, eps, carry = predict(
        denoise_fn, state.x, c.t_first, c.alpha_first, c.sigma_first, correct, carry
    )
    differences: list[Array] = []
    stages = c.t.shape[0]
    for k in range(stages - 1 if clean else 0, stages):
        x = c.alpha[k] * x0_hat + c.sigma[k] * eps
        for j, difference in enumerate(differences):
            x = x + c.weights[k, j] * difference
        if k == stages - 1:
            return StepResult(State(x), x0_hat, carry)
        _, later, new = predict(denoise_fn, x, c.t[k], c.alpha[k], c.sigma[k], correct, carry)
        carry = carry_if(c.noisy, new, carry)
        differences.append(later - eps)
    raise AssertionError("a step has a last stage")


def _assemble(
    schedule: Schedule, grid: Grid, places: Callable[..., Any], weigh: Callable[..., Any]
) -> _Coefficients:
    """Stages at the half log-SNRs ``places(first, last)``, ``weigh``ed where these are finite."""
    inside, half = half_log_snr(grid)
    noisy = inside[:-1] & inside[1:]
    t, alpha, sigma = (g[:-1] for g in grid)
    # Where there is no step of several stages, its stages stay where every denoiser is finite.
    first = half[:-1]
    last = jnp.where(noisy, half[1:], first)
    between = jnp.stack(places(first, last), axis=1)
    inner = jnp.where(noisy[:, None], schedule.t_from_log_snr(2 * between), t[:, None])
    # The end is the grid's: schedules have infinite slopes at the clean example.
    times, alphas, sigmas = (
        jnp.concatenate([stages, ends[1:, None]], axis=1)
        for stages, ends in zip(
            (inner, schedule.alpha(inner), schedule.sigma(inner)), grid, strict=True
        )
    )
    weights = jnp.where(noisy[:, None, None], weigh(first, last, alphas, sigmas), 0)
    return _Coefficients(t, alpha, sigma, noisy, times, alphas, sigmas, weights)


def _runge_kutta(tableau: list[list[float]]) -> Callable[..., _Coefficients]:
    stages = len(tableau)
    rows = np.zeros((stages, stages))
    for k, row in enumerate(tableau):
        rows[k, : len(row)] = row
    nodes = rows.sum(axis=1)[:-1]

    def places(first: Array, last: Array) -> list[Array]:
        start, end = jnp.exp(-first), jnp.exp(-last)
        return [-jnp.log(start + c * (end - start)) if c < 1 else last for c in nodes]

    def weigh(first: Array, last: Array, alpha: Array, sigma: Array) -> Array:
        del sigma
        step = (jnp.exp(-last) - jnp.exp(-first))[:, None, None]
        return alpha[:, :, None] * step * rows[None, :, 1:]

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
        del settings
        return _assemble(schedule, grid, places, weigh)

    return coefficients


def _exponential(order: int) -> Callable[..., _Coefficients]:
    def places(first: Array, last: Array) -> list[Array]:
        return [first + (last - first) * j / order for j in range(1, order)]

    def weigh(first: Array, last: Array, alpha: Array, sigma: Array) -> Array:
        del alpha
        h = last - first
        h = jnp.where(h == 0, 1, h)
        weights = jnp.zeros((*sigma.shape, order - 1), sigma.dtype)
        if order == 2:
            return weights.at[:, 1, 0].set(-sigma[:, 1] * jnp.expm1(h))
        slope = lambda h: jnp.expm1(h) / h - 1
        weights = weights.at[:, 1, 0].set(-2 * sigma[:, 1] * slope(2 / 3 * h))
        return weights.at[:, 2, 1].set(-1.5 * sigma[:, 2] * slope(h))

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
        del settings
        return _assemble(schedule, grid, places, weigh)

    return coefficients


@functools.cache
def _solver(name: str, order: int) -> Solver:
    exact = name == "dpm_solver"
    coefficients = _exponential(order) if exact else _runge_kutta(_TABLEAUS[name])
    return Solver(name, memoryless, _step, coefficients, order=order, num_evals=order)


def midpoint() -> Solver:
    """Return the midpoint rule in rho: order 2, two evaluations a step; deterministic."""
    return _solver("midpoint", 2)


def rk4() -> Solver:
    """Return the classical Runge-Kutta method in rho: order 4, four evaluations; deterministic.

    For references: exact where steps are short, but of little use with few of them.
    """
    return _solver("rk4", 4)


def dpm_solver(order: int = 2) -> Solver:
    """Return single-step DPM-Solver-2 or -3: ``order`` evaluations a step; deterministic.

    Args:
        order: 2 or 3.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu 2022, arXiv 2206.00927, algorithm 1 with r1 = 1/2, and
        algorithm 2 with r1 = 1/3, r2 = 2/3.
    """
    check_choice("dpm_solver", "order", order, (2, 3))
    return _solver("dpm_solver", order)
