r"""Euler, DDIM and ancestral (DDPM) sampling: three choices in one formula.

.. math:: x' = \alpha' \hat x_0 + d\,\epsilon + s\,z, \qquad z \sim N(0, I).

With ``q = (alpha / sigma) / (alpha' / sigma')`` in [0, 1):

=======  ================================  ===================================
method   d                                 s
=======  ================================  ===================================
Euler    sigma'                            0
DDIM     sigma' sqrt(1 - eta^2 (1 - q^2))  eta sigma' sqrt(1 - q^2)
DDPM     sigma' q                          sqrt(1 - q^2) sigma^v sigma'^(1 - v)
=======  ================================  ===================================

Euler is that of ``dy/drho = eps`` in ``y = x / alpha``, ``rho = sigma / alpha``. For DDPM, d and s
with v = 0 are those of the posterior ``q(x' | x, x_0)``; v = 1 replaces its variance by that of the
forward step.

References:
    Ho, Jain, Abbeel 2020, arXiv 2006.11239, eqs. (6)-(7) and section 3.2;
    Song, Meng, Ermon 2021, arXiv 2010.02502, eqs. (12) and (16);
    Nichol, Dhariwal 2021, arXiv 2102.09672, eq. (15).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_range
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    Eta,
    Grid,
    Solver,
    State,
    StepResult,
    kernel_from,
    memoryless,
    predict,
    snr_ratio,
    step_from,
)

__all__ = ["ancestral", "ddim", "euler"]


class AffineCoefficients(NamedTuple):
    """``x' = alpha_next x0_hat + direction eps + std z``."""

    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    direction: Array
    std: Any = None


class _Variance(NamedTuple):
    variance: Any


def _mean(
    denoise_fn: DenoiseFn,
    state: State,
    c: AffineCoefficients,
    correct: CorrectFn | None,
    carry: Any,
) -> StepResult:
    x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
    return StepResult(State(c.alpha_next * x0_hat + c.direction * eps), x0_hat, carry)


affine_step, affine_kernel = step_from(_mean), kernel_from(_mean)


def _collect(grid: Grid, direction: Array, std: Array | None = None) -> AffineCoefficients:
    t, alpha, sigma = (g[:-1] for g in grid)
    return AffineCoefficients(t, alpha, sigma, grid.alpha[1:], direction, std)


def _ode_coefficients(settings: Any, schedule: Schedule, grid: Grid) -> AffineCoefficients:
    del settings, schedule
    return _collect(grid, grid.sigma[1:])


def _ddim_coefficients(settings: Eta, schedule: Schedule, grid: Grid) -> AffineCoefficients:
    del schedule
    end = grid.sigma[1:]
    fresh = 1 - snr_ratio(grid) ** 2
    direction = end * safe_sqrt(1 - settings.eta**2 * fresh)
    return _collect(grid, direction, settings.eta * end * safe_sqrt(fresh))


def _ancestral_coefficients(
    settings: _Variance, schedule: Schedule, grid: Grid
) -> AffineCoefficients:
    del schedule
    start, end = grid.sigma[:-1], grid.sigma[1:]
    ratio = snr_ratio(grid)
    noisy = end > 0
    mixed = start * (jnp.where(noisy, end, start) / start) ** (1 - settings.variance)
    std = jnp.where(noisy, mixed, 0) * safe_sqrt(1 - ratio**2)
    return _collect(grid, end * ratio, std)


def euler() -> Solver:
    """Return Euler's method for the probability-flow ODE in ``(x / alpha, sigma / alpha)``.

    The same as ``ddim(eta=0.0)``, and as Euler in ``t`` for rectified flow. Order 1.
    """
    return Solver("euler", memoryless, affine_step, _ode_coefficients)


def ddim(eta: Scalar = 0.0) -> Solver:
    """Return DDIM, which adds ``eta`` times the noise of ancestral sampling.

    Args:
        eta: 0 (deterministic, the default) to 1 (DDPM); may be traced.

    Examples:
        >>> ddim().stochastic, ddim(0.5).stochastic
        (False, True)

    References:
        Song, Meng, Ermon 2021, arXiv 2010.02502, eqs. (12) and (16), for any schedule.
    """
    check_range("ddim", "eta", eta, 0, 1)
    if isinstance(eta, int | float) and eta == 0:
        return Solver("ddim", memoryless, affine_step, _ode_coefficients)
    return Solver(
        "ddim",
        memoryless,
        affine_step,
        _ddim_coefficients,
        Eta(eta),
        affine_kernel,
        stochastic=True,
    )


def ancestral(variance: Scalar = 0.0) -> Solver:
    """Return ancestral sampling, DDPM's: every step draws from ``q(x' | x, x0_hat)``.

    Args:
        variance: v in [0, 1]; interpolates the log-variance between that of the posterior (0, right
            for a point mass, the same as ``ddim(eta=1)``) and that of the forward step (1, right
            for white data, DDPM's "fixed large"); may be traced.

    References:
        Ho, Jain, Abbeel 2020, arXiv 2006.11239, section 3.2;
        Nichol, Dhariwal 2021, arXiv 2102.09672, eq. (15).
    """
    check_range("ancestral", "variance", variance, 0, 1)
    return Solver(
        "ancestral",
        memoryless,
        affine_step,
        _ancestral_coefficients,
        _Variance(variance),
        affine_kernel,
        stochastic=True,
    )
