r"""DPM-Solver++: exponential integrators in half the log-SNR that extrapolate the prediction.

With ``lambda = log(alpha / sigma)`` and ``h = lambda' - lambda`` the two-step method is

.. math:: x' = \frac{\sigma'}{\sigma} x + \alpha'(1 - e^{-h})
   \Big[\hat x_0 + \frac{h}{2 h_{prev}}(\hat x_0 - \hat x_0^{prev})\Big].

Without the second term in brackets it is Euler's (DDIM's) step. That is what the first step does,
the step to the clean example, and the steps next to pure noise, where lambda is minus infinity.

References:
    Lu, Zhou, Bao, Chen, Li, Zhu 2022, arXiv 2211.01095, algorithm 2.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._types import Array, DenoiseFn, Schedule
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    Grid,
    Solver,
    State,
    StepResult,
    half_log_snr,
    predict,
    step_from,
)

__all__ = ["dpmpp_2m"]


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    extrapolation: Array


def _init(x: Array) -> State:
    return State(x, jnp.zeros_like(x))


def _mean(
    denoise_fn: DenoiseFn, state: State, c: _Coefficients, correct: CorrectFn | None, carry: Any
) -> StepResult:
    x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
    x = c.alpha_next * x0_hat + c.sigma_next * eps
    x = x + c.extrapolation * (x0_hat - state.history)
    return StepResult(State(x, x0_hat), x0_hat, carry)


_step = step_from(_mean)


def _coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
    del settings, schedule
    inside, half = half_log_snr(grid)
    h = jnp.diff(half)
    both = inside[:-2] & inside[1:-1] & inside[2:]
    ratio = jnp.where(both, h[1:] / jnp.where(both, h[:-1], 1), 0)
    ratio = jnp.concatenate([jnp.zeros_like(h[:1]), ratio])
    t, alpha, sigma = (g[:-1] for g in grid)
    _, alpha_next, sigma_next = (g[1:] for g in grid)
    extrapolation = 0.5 * ratio * (alpha_next - alpha * sigma_next / sigma)
    return _Coefficients(t, alpha, sigma, alpha_next, sigma_next, extrapolation)


def dpmpp_2m() -> Solver:
    """Return DPM-Solver++(2M): order 2 with one evaluation a step; deterministic.

    Accurate with few steps; prefers grids that are smooth in log-SNR (``karras_grid``,
    ``log_snr_grid``) and suffers on a uniform one.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu 2022, arXiv 2211.01095, algorithm 2.
    """
    return Solver("dpmpp_2m", _init, _step, _coefficients, order=2)
