r"""Heun's method of EDM, with or without churn.

In ``y = x / alpha``, ``rho = sigma / alpha``, with ``kappa = 1 / rho``, the trapezoidal rule on
``dy/drho = eps`` is

.. math:: \tilde x = \alpha' \hat x_0 + \sigma' \epsilon, \qquad
   x' = \tilde x + w\,(\hat x_0(\tilde x, t') - \hat x_0), \qquad
   w = \tfrac12\sigma'(\kappa'-\kappa)\,\kappa'/\kappa.

At pure noise ``kappa = 0``, and y has no finite value; there the step takes the trapezoidal rule of
the dual form ``d(x / sigma)/dkappa = x0_hat``, for which the last factor of w is 1. So does a step
that changes a noise level above 1 more than eightfold (the first one of a cosine or rectified-flow
grid, not of EDM's), where the rule in rho would extrapolate far. A step onto the clean example is
Euler's. Churn first raises the noise level from rho to ``(1 + gamma) rho`` with
``gamma = min(churn / num_steps, sqrt(2) - 1)``.

References:
    Karras, Aittala, Aila, Laine 2022, arXiv 2206.00364, algorithms 1 and 2.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_range
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    DrawFn,
    Grid,
    Solver,
    State,
    StepResult,
    carry_if,
    memoryless,
    predict,
)

__all__ = ["heun"]

MAX_RATIO = 8.0
"""Largest change of the noise level, above 1, that a step in rho makes."""


class _Churn(NamedTuple):
    churn: Any
    churn_min: Any
    churn_max: Any
    noise_std: Any


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    t_next: Array
    alpha_next: Array
    sigma_next: Array
    weight: Array


class _ChurnCoefficients(NamedTuple):
    scale: Array
    std: Array
    heun: _Coefficients


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
    x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
    x = c.alpha_next * x0_hat + c.sigma_next * eps
    if clean:
        return StepResult(State(x), x0_hat, carry)
    # The rule needs only x0_hat of the second prediction; its eps is for the hook to see.
    noisy = c.sigma_next > 0
    sigma = jnp.where(noisy, c.sigma_next, c.sigma)
    second, _, later = predict(denoise_fn, x, c.t_next, c.alpha_next, sigma, correct, carry)
    carry = carry_if(noisy, later, carry)
    return StepResult(State(x + c.weight * (second - x0_hat)), x0_hat, carry)


def _churned_step(
    denoise_fn: DenoiseFn, state: State, c: _ChurnCoefficients, draw: DrawFn, **hook: Any
) -> StepResult:
    x = c.scale * state.x + c.std * draw(0)
    return _step(denoise_fn, State(x), c.heun, None, **hook)


def _coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
    del settings, schedule
    return _from_to(*(g[:-1] for g in grid), *(g[1:] for g in grid))


def _from_to(
    t: Array, alpha: Array, sigma: Array, t_next: Array, alpha_next: Array, sigma_next: Array
) -> _Coefficients:
    clean = sigma_next == 0
    kappa = alpha / sigma
    kappa_next = alpha_next / jnp.where(clean, 1, sigma_next)
    low, high = jnp.minimum(kappa, kappa_next), jnp.maximum(kappa, kappa_next)
    dual = (low == 0) | ((high < 1) & (high > MAX_RATIO * low))
    factor = jnp.where(dual, 1, kappa_next / jnp.where(dual, 1, kappa))
    weight = jnp.where(clean, 0, 0.5 * sigma_next * (kappa_next - kappa) * factor)
    # If the grid is traced, a step onto the clean example makes the second evaluation too, with
    # weight 0 and at a time where every denoiser is finite.
    t_next = jnp.where(clean, t, t_next)
    return _Coefficients(t, alpha, sigma, t_next, alpha_next, sigma_next, weight)


def _churn_coefficients(settings: _Churn, schedule: Schedule, grid: Grid) -> _ChurnCoefficients:
    t, alpha, sigma = (g[:-1] for g in grid)
    has_signal = alpha > 0  # pure noise cannot be made noisier
    safe_alpha = jnp.where(has_signal, alpha, 1)
    rho = sigma / safe_alpha
    in_range = (rho >= settings.churn_min) & (rho <= settings.churn_max) & has_signal
    gamma = jnp.minimum(settings.churn / t.shape[0], math.sqrt(2) - 1)
    gamma = jnp.where(in_range, gamma, 0)
    raised = gamma > 0
    new_t = jnp.where(raised, schedule.t_from_log_snr(-2 * jnp.log(rho * (1 + gamma))), t)
    new_alpha = jnp.where(raised, schedule.alpha(new_t), alpha)
    new_sigma = jnp.where(raised, schedule.sigma(new_t), sigma)
    scale = jnp.where(raised, new_alpha / safe_alpha, 1)
    std = new_alpha * settings.noise_std * rho * safe_sqrt(gamma * (2 + gamma))
    return _ChurnCoefficients(
        scale, std, _from_to(new_t, new_alpha, new_sigma, *(g[1:] for g in grid))
    )


def heun(
    churn: Scalar = 0.0,
    churn_min: Scalar = 0.0,
    churn_max: Scalar = math.inf,
    noise_std: Scalar = 1.0,
) -> Solver:
    """Return Heun's method: order 2, two evaluations a step, one on the step to the clean example.

    With ``churn > 0`` each step first adds fresh noise and removes it again (EDM's algorithm 2).
    Noise levels are ``sigma / alpha``. All four numbers may be traced. The noise comes before the
    prediction, so the step has no Gaussian kernel.

    The correction hook sees both predictions; the step uses the corrected ``x0_hat`` of both and
    the ``eps`` of the first. A linear constraint that the hook puts on ``x0_hat`` thus holds for
    what the step makes of it.

    Args:
        churn: EDM's S_churn, >= 0; spread evenly over the steps of the grid.
        churn_min: S_tmin, lowest noise level that is churned.
        churn_max: S_tmax, highest one.
        noise_std: S_noise, standard deviation of the added noise; slightly above 1 counters a
            denoiser that removes too much.

    Examples:
        >>> heun().stochastic, heun(churn=40.0, noise_std=1.003).stochastic
        (False, True)

    References:
        Karras, Aittala, Aila, Laine 2022, arXiv 2206.00364, algorithms 1 and 2, table 5.
    """
    check_range("heun", "churn", churn, 0)
    check_range("heun", "churn_min", churn_min, 0)
    check_range("heun", "churn_max", churn_max, 0)
    check_range("heun", "noise_std", noise_std, 0)
    if isinstance(churn, int | float) and churn == 0:
        return Solver("heun", memoryless, _step, _coefficients, order=2, num_evals=2)
    return Solver(
        "heun",
        memoryless,
        _churned_step,
        _churn_coefficients,
        _Churn(churn, churn_min, churn_max, noise_std),
        order=2,
        num_evals=2,
        stochastic=True,
    )
