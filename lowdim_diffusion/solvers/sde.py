r"""Reverse SDEs in the schedule's own time: Euler-Maruyama and stochastic Heun.

The probability-flow ODE ``dx/dt = alpha_dot x0_hat + sigma_dot eps`` keeps its marginals when noise
is added and removed at the same rate. With ``g^2 = 2 sigma (sigma_dot - sigma alpha_dot / alpha)``,
the forward process's, and time running backwards,

.. math:: dx = \Big[\dot\alpha\,\hat x_0 + \dot\sigma\,\epsilon
   + \eta \frac{g^2}{2 \sigma} \epsilon\Big] dt + \sqrt{\eta}\, g\, d\bar w .

``eta = 1`` is the reverse SDE of the forward process, ``eta = 0`` the ODE; the same formulas, on
any schedule, are those of score SDEs and of one-sided stochastic interpolants. These steps use
nothing of the structure of the problem: they are what the exponential solvers are compared with.
A step from pure noise (``alpha = 0``), where g is infinite, is that of the ODE, and a step onto the
clean example is its prediction.

References:
    Song et al. 2021, arXiv 2011.13456, eqs. (6) and (13);
    Albergo, Boffi, Vanden-Eijnden 2023, arXiv 2303.08797, section 2 (any noise rate).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion import schedules
from lowdim_diffusion._checks import check_range
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    DrawFn,
    Eta,
    Grid,
    Solver,
    State,
    StepResult,
    carry_if,
    memoryless,
    predict,
)
from lowdim_diffusion.solvers.first_order import AffineCoefficients, affine_kernel, affine_step

__all__ = ["euler_maruyama", "sde_heun"]


class _HeunCoefficients(NamedTuple):
    first: AffineCoefficients
    noisy: Array
    t_next: Array
    alpha_next: Array
    sigma_next: Array
    drifts: Array
    """``[num_steps, 2, 2]``: of x0_hat and eps, at the start and the end, times dt / 2."""


def _heun_step(
    denoise_fn: DenoiseFn,
    state: State,
    c: _HeunCoefficients,
    draw: DrawFn,
    *,
    correct: CorrectFn | None = None,
    carry: Any = None,
    clean: bool = False,
) -> StepResult:
    first = c.first
    x0_hat, eps, carry = predict(
        denoise_fn, state.x, first.t, first.alpha, first.sigma, correct, carry
    )
    x = first.alpha_next * x0_hat + first.direction * eps
    if clean:
        return StepResult(State(x), x0_hat, carry)
    x = x + first.std * draw(0)
    at_end = (c.t_next, c.alpha_next, c.sigma_next)
    x0_end, eps_end, later = predict(denoise_fn, x, *at_end, correct, carry)
    carry = carry_if(c.noisy, later, carry)
    x = x + (c.drifts[1, 0] * x0_end + c.drifts[1, 1] * eps_end)
    x = x - (c.drifts[0, 0] * x0_hat + c.drifts[0, 1] * eps)
    return StepResult(State(x), x0_hat, carry)


def _drift(schedule: Schedule, t: Array, eta: Any) -> tuple[Array, Array, Array]:
    """What x0_hat and eps are multiplied with, and ``g^2`` times eta."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_dot, sigma_dot = jax.vmap(lambda t: schedules.rates(schedule, t))(t)
    has_signal = alpha > 0
    spread = sigma_dot - sigma * alpha_dot / jnp.where(has_signal, alpha, 1)
    spread = jnp.where(has_signal, eta * spread, 0)
    return alpha_dot, sigma_dot + spread, 2 * sigma * spread


def _coefficients(settings: Eta, schedule: Schedule, grid: Grid) -> AffineCoefficients:
    t, alpha, sigma = (g[:-1] for g in grid)
    dt = jnp.diff(grid.t)
    noisy = grid.sigma[1:] > 0
    signal, noise, variance = _drift(schedule, t, settings.eta)
    return AffineCoefficients(
        t,
        alpha,
        sigma,
        jnp.where(noisy, alpha + dt * signal, 1),
        jnp.where(noisy, sigma + dt * noise, 0),
        jnp.where(noisy, safe_sqrt(-dt * variance), 0),
    )


def _heun_coefficients(settings: Eta, schedule: Schedule, grid: Grid) -> _HeunCoefficients:
    t, alpha, sigma = (g[:-1] for g in grid)
    t_next, alpha_next, sigma_next = (g[1:] for g in grid)
    noisy = sigma_next > 0
    t_next = jnp.where(noisy, t_next, t)
    sigma_next = jnp.where(noisy, sigma_next, sigma)
    eta = jnp.where(alpha > 0, settings.eta, 0)
    start, end = _drift(schedule, t, eta), _drift(schedule, t_next, eta)
    dt = jnp.diff(grid.t)
    first = AffineCoefficients(
        t,
        alpha,
        sigma,
        jnp.where(noisy, alpha + dt * start[0], 1),
        jnp.where(noisy, sigma + dt * start[1], 0),
        jnp.where(noisy, safe_sqrt(-dt * (start[2] + end[2]) / 2), 0),
    )
    drifts = jnp.stack([jnp.stack(part[:2], axis=-1) for part in (start, end)], axis=-2)
    drifts = jnp.where(noisy[:, None, None], 0.5 * dt[:, None, None] * drifts, 0)
    return _HeunCoefficients(first, noisy, t_next, alpha_next, sigma_next, drifts)


def euler_maruyama(eta: Scalar = 1.0) -> Solver:
    """Return the Euler-Maruyama method for the reverse SDE in t; one evaluation a step.

    Args:
        eta: noise rate, >= 0; 1 is that of the forward process, 0 leaves Euler's method in t; may
            be traced.

    References:
        Song et al. 2021, arXiv 2011.13456, section 4.1 and appendix E.
    """
    check_range("euler_maruyama", "eta", eta, 0)
    return Solver(
        "euler_maruyama",
        memoryless,
        affine_step,
        _coefficients,
        Eta(eta),
        affine_kernel,
        stochastic=True,
    )


def sde_heun(eta: Scalar = 1.0) -> Solver:
    """Return the stochastic Heun method (trapezoidal drift, one noise per step) for the same SDE.

    Two evaluations a step, one on the step to the clean example. The noise does not depend on x, so
    the method is of order 2 for moments. It has no Gaussian kernel.

    Args:
        eta: noise rate, >= 0; may be traced.

    References:
        Kloeden & Platen 1992, section 15.1 (weak order 2 for additive noise).
    """
    check_range("sde_heun", "eta", eta, 0)
    return Solver(
        "sde_heun",
        memoryless,
        _heun_step,
        _heun_coefficients,
        Eta(eta),
        order=2,
        num_evals=2,
        stochastic=True,
    )
