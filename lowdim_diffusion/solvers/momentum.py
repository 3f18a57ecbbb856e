r"""Momentum: Adams-Bashforth steps along an averaged direction, for stability with few steps.

Both methods solve ``dy/drho = eps`` (``y = x / alpha``, ``rho = sigma / alpha``) with a velocity
that is a moving average, ``v <- (1 - beta) v + beta u``:

==============  =================================================  ===================
factory         u, and the step                                    order
==============  =================================================  ===================
``heavy_ball``  u: the Adams-Bashforth slope; step along v         1 (if beta < 1)
``ghvb``        u: eps; step along a combination of the last v's   up to 2
==============  =================================================  ===================

The averages widen the region of stability on the real axis, by ``(2 - beta) / beta`` for
``heavy_ball``. The combinations are those of equal steps, as published, on any grid, so that more
than two values raise the accuracy but not the order; the first steps have fewer values. ``beta =
1`` leaves the Adams-Bashforth method.

References:
    Wizadwongsa, Chinchuthakun, Khungurn, Raj, Suwajanakorn 2024, arXiv 2307.11118, sections 4-5.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_range
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    Grid,
    Solver,
    State,
    StepResult,
    predict,
    step_from,
)

__all__ = ["ghvb", "heavy_ball"]

MAX_ORDER = 4


class _Beta(NamedTuple):
    beta: Any


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    length: Array
    """``alpha' (rho' - rho)``, zero where y or the end of the step is not finite."""
    first: Array
    beta: Array
    weights: Array
    """``[num_steps, order]``, newest value first."""


def _slopes(order: int, beta: Any) -> Array:
    """``[order, order]``, one row per number of values known; ``beta = 1`` is Adams-Bashforth."""
    b = jnp.asarray(beta)
    zero, one = jnp.zeros_like(b), jnp.ones_like(b)
    rows = [
        [one, zero, zero, zero],
        [(2 + b) / (2 * b), -(2 - b) / (2 * b), zero, zero],
        [(18 + 5 * b) / (12 * b), -(24 - 8 * b) / (12 * b), (6 - b) / (12 * b), zero],
        [
            (46 + 9 * b) / (24 * b),
            -(78 - 19 * b) / (24 * b),
            (42 - 5 * b) / (24 * b),
            -(10 - b) / (24 * b),
        ],
    ]
    return jnp.stack([jnp.stack(row[:order]) for row in rows[:order]])


@functools.cache
def _functions(order: int, average_first: bool) -> tuple[Callable[..., Any], ...]:
    """``(init, step, coefficients)``, the same objects for the same method."""

    def init(x: Array) -> State:
        return State(x, (jnp.zeros_like(x),) * order)

    def mean(
        denoise_fn: DenoiseFn, state: State, c: _Coefficients, correct: CorrectFn | None, carry: Any
    ) -> StepResult:
        x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
        average = lambda old, new: jnp.where(c.first, new, (1 - c.beta) * old + c.beta * new)
        if average_first:
            values = (average(state.history[0], eps), *state.history[: order - 1])
            velocity = sum(c.weights[j] * value for j, value in enumerate(values))
            history = values
        else:
            values = (eps, *state.history[: order - 1])
            slope = sum(c.weights[j] * value for j, value in enumerate(values))
            velocity = average(state.history[-1], slope)
            history = (*values[: order - 1], velocity)
        x = c.alpha_next * x0_hat + c.sigma_next * eps + c.length * (velocity - eps)
        return StepResult(State(x, history), x0_hat, carry)

    def coefficients(settings: _Beta, schedule: Schedule, grid: Grid) -> _Coefficients:
        del schedule
        t, alpha, sigma = (g[:-1] for g in grid)
        _, alpha_next, sigma_next = (g[1:] for g in grid)
        inside = (alpha > 0) & (sigma_next > 0)
        length = sigma_next - alpha_next * sigma / jnp.where(inside, alpha, 1)
        # Values count from the first step that has a finite y.
        steps = jnp.cumsum(alpha > 0) - 1
        known = jnp.clip(steps, 0, order - 1)
        beta = settings.beta if average_first else 1.0
        return _Coefficients(
            t,
            alpha,
            sigma,
            alpha_next,
            sigma_next,
            jnp.where(inside, length, 0),
            steps <= 0,
            jnp.broadcast_to(settings.beta, t.shape),
            _slopes(order, beta)[known],
        )

    return init, step_from(mean), coefficients


def _solver(name: str, order: int, beta: Scalar, average_first: bool) -> Solver:
    check_choice(name, "order", order, range(1, MAX_ORDER + 1))
    check_range(name, "beta", beta, 0, 1, low_open=True)
    init, step, coefficients = _functions(order, average_first)
    order = min(order, 2) if average_first else 1  # weights for equal steps
    return Solver(name, init, step, coefficients, _Beta(beta), order=order)


def heavy_ball(order: int = 2, beta: Scalar = 0.8) -> Solver:
    """Return Polyak's heavy-ball method on an Adams-Bashforth slope; one evaluation a step.

    Args:
        order: values in the slope, 1 to 4.
        beta: in (0, 1], weight of the new slope; smaller is more stable and less accurate; may be
            traced.

    References:
        Wizadwongsa et al. 2024, arXiv 2307.11118, section 4.1.
    """
    return _solver("heavy_ball", order, beta, False)


def ghvb(order: int = 2, beta: Scalar = 0.8) -> Solver:
    """Return the generalized heavy-ball method, which keeps its order; one evaluation a step.

    Args:
        order: velocities in use, 1 to 4; with ``beta`` .7 and order 3, the paper's "2.7".
        beta: in (0, 1], weight of the new prediction; may be traced.

    References:
        Wizadwongsa et al. 2024, arXiv 2307.11118, section 4.2.
    """
    return _solver("ghvb", order, beta, True)
