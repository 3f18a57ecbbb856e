r"""Exponential Adams-Bashforth methods: the past predictions, extrapolated over the next step.

The probability-flow ODE is integrated with one of its two predictions replaced by the polynomial
through its last values (``lambda = log(alpha / sigma)``, ``rho = sigma / alpha``):

.. math:: x' = \alpha'\frac{x}{\alpha} + \alpha' \int_\rho^{\rho'} \epsilon\, d\rho
   \qquad\text{or}\qquad
   x' = \sigma'\frac{x}{\sigma} + \sigma' \int_\lambda^{\lambda'} e^\lambda \hat x_0\, d\lambda.

All else about the step is exact, so with one value both are Euler's (DDIM's). Methods differ in
what is extrapolated, and in which variable:

===================  ==============  ==========  =====================================
factory              prediction      variable    also called
===================  ==============  ==========  =====================================
``deis``             ``eps``         ``t``       tAB-DEIS, k = order - 1
``adams_bashforth``  ``eps``         ``rho``     rho-AB; PNDM's, on any grid
``dpmpp_3m``         ``x0_hat``      ``lambda``  multistep DPM-Solver++, third order
===================  ==============  ==========  =====================================

A run starts with Euler's step and gains an order with each further one, as long as no step touches
pure noise or the clean example, where lambda is infinite. The weights depend on the grid alone;
they are integrals of Lagrange polynomials, by Gauss-Legendre quadrature in lambda.

References:
    Zhang & Chen 2023, arXiv 2204.13902, section 3.3 (DEIS);
    Lu et al. 2022, arXiv 2211.01095, section 4 (data prediction).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
    half_log_snr,
    predict,
)

__all__ = ["adams_bashforth", "deis", "dpmpp_3m"]

MAX_ORDER = 4
"""Beyond it the region of stability is too small for any grid in use."""
NUM_NODES = 32
"""Of the quadrature: rounding in float64 for steps that change rho up to a thousandfold."""


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    weights: Array
    """``[num_steps, order - 1]``: what each past value adds, less the newest."""


@functools.cache
def _functions(
    order: int, of: Literal["eps", "x0"], variable: Literal["t", "rho", "lambda"]
) -> tuple[Callable[..., Any], ...]:
    """``(init, step, coefficients)``, the same objects for the same method."""

    def init(x: Array) -> State:
        return State(x, (jnp.zeros_like(x),) * (order - 1))

    def step(
        denoise_fn: DenoiseFn,
        state: State,
        c: _Coefficients,
        draw: DrawFn | None,
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
        clean: bool = False,
    ) -> StepResult:
        del draw, clean  # the weights are zero there
        x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
        newest = eps if of == "eps" else x0_hat
        x = c.alpha_next * x0_hat + c.sigma_next * eps
        for j, past in enumerate(state.history):
            x = x + c.weights[j] * (past - newest)
        return StepResult(State(x, (newest, *state.history)[: order - 1]), x0_hat, carry)

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
        del settings
        t, alpha, sigma = (g[:-1] for g in grid)
        _, alpha_next, sigma_next = (g[1:] for g in grid)
        weights = _weights(schedule, grid, order, of, variable)
        return _Coefficients(t, alpha, sigma, alpha_next, sigma_next, weights)

    return init, step, coefficients


def _weights(schedule: Schedule, grid: Grid, order: int, of: str, variable: str) -> Array:
    """``[num_steps, order - 1]``, integrals of the Lagrange polynomials of the past values."""
    inside, half = half_log_snr(grid)
    u, w = np.polynomial.legendre.leggauss(NUM_NODES)
    start, h = half[:-1, None], jnp.diff(half)[:, None]
    between = start + h * (u + 1)[None] / 2  # [num_steps, NUM_NODES]
    of_lambda = {
        "t": lambda a: schedule.t_from_log_snr(2 * a),
        "rho": lambda a: jnp.exp(-a),
        "lambda": lambda a: a,
    }[variable]
    places = grid.t if variable == "t" else of_lambda(half)

    num_steps = h.shape[0]
    past = np.arange(num_steps)[:, None] - np.arange(order)[None]
    known = jnp.cumprod(inside[np.maximum(past, 0)] & (past >= 0), axis=1) > 0
    known = known & inside[1:, None]
    knots = places[np.maximum(past, 0)]  # [num_steps, order]

    last = grid.sigma[1:, None] * jnp.exp(between)
    if of == "eps":
        last = -grid.alpha[1:, None] * jnp.exp(-between)
    kernel = last * h * (w / 2)[None]
    at = of_lambda(between)
    found = []
    for j in range(1, order):
        product = kernel
        for m in range(order):
            if m != j:
                both = known[:, m] & known[:, j]
                gap = jnp.where(both, knots[:, j] - knots[:, m], 1)
                factor = (at - knots[:, m, None]) / gap[:, None]
                product = product * jnp.where(both[:, None], factor, 1)
        found.append(jnp.where(known[:, j], jnp.sum(product, axis=1), 0))
    return jnp.stack(found, axis=1) if found else jnp.zeros((num_steps, 0), grid.t.dtype)


def _solver(name: str, order: int, of: Any, variable: Any) -> Solver:
    init, step, coefficients = _functions(order, of, variable)
    return Solver(name, init, step, coefficients, order=order)


def deis(order: int = 3) -> Solver:
    """Return DEIS (tAB): ``eps`` extrapolated in time; one evaluation a step; deterministic.

    The most accurate of these with few steps on a grid that is quadratic in time.

    Args:
        order: values in use, 1 (Euler's method) to 4; the paper's k is one less. Up to the error of
            its first steps it is the order of convergence.

    References:
        Zhang & Chen 2023, arXiv 2204.13902, eqs. (14)-(15).
    """
    check_choice("deis", "order", order, range(1, MAX_ORDER + 1))
    return _solver("deis", order, "eps", "t")


def adams_bashforth(order: int = 2) -> Solver:
    """Return the Adams-Bashforth method for ``d(x / alpha) / d rho = eps``, on any grid.

    Args:
        order: values in use, 1 (Euler's method) to 4; as for :func:`deis`.

    References:
        Zhang & Chen 2023, arXiv 2204.13902, section 3.3 (rho-AB).
    """
    check_choice("adams_bashforth", "order", order, range(1, MAX_ORDER + 1))
    return _solver("adams_bashforth", order, "eps", "rho")


def dpmpp_3m() -> Solver:
    """Return multistep DPM-Solver++ of order 3: ``x0_hat`` extrapolated in log-SNR; deterministic.

    The quadratic through the last three predictions, integrated exactly. Like ``dpmpp_2m`` it
    prefers grids that are smooth in log-SNR.

    References:
        Lu et al. 2022, arXiv 2211.01095, section 4.
    """
    return _solver("dpmpp_3m", 3, "x0", "lambda")
