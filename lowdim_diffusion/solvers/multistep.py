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
``dpmpp_..m_sde``    ``x0_hat``      ``lambda``  SDE-DPM-Solver++, orders 2 and 3
===================  ==============  ==========  =====================================

The last row solves the reverse SDE whose noise has ``eta`` times the variance of the forward
process's (``q = exp(-h)``, ``h = lambda' - lambda``; ``eta = 0`` is the ODE):

.. math:: x' = \sigma' q^\eta \frac{x}{\sigma}
   + (1 + \eta)\,\sigma' \int_\lambda^{\lambda'} e^{\lambda - \eta(\lambda' - \lambda)}
   \hat x_0\, d\lambda + \sigma' \sqrt{1 - q^{2\eta}}\, z .

A run starts with Euler's step and gains an order with each further one, as long as no step touches
pure noise or the clean example, where lambda is infinite. The weights depend on the grid alone;
they are integrals of Lagrange polynomials, by Gauss-Legendre quadrature in lambda.

References:
    Zhang & Chen 2023, arXiv 2204.13902, section 3.3 (DEIS);
    Lu et al. 2022, arXiv 2211.01095, section 4 and appendix (data prediction, SDE).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice, check_range
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.solvers._base import (
    CorrectFn,
    Eta,
    Grid,
    Solver,
    State,
    StepResult,
    half_log_snr,
    kernel_from,
    predict,
    snr_ratio,
    step_from,
)

__all__ = ["adams_bashforth", "deis", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde"]

MAX_ORDER = 4
"""Beyond it the region of stability is too small for any grid in use."""
NUM_NODES = 32
"""Of the quadrature: rounding in float64 for steps that change rho up to a thousandfold."""


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    direction: Array
    weights: Array
    """``[num_steps, order - 1]``: what each past value adds, less the newest."""
    std: Any = None


@functools.cache
def _functions(
    order: int, of: Literal["eps", "x0"], variable: Literal["t", "rho", "lambda"], random: bool
) -> tuple[Callable[..., Any], ...]:
    """``(init, step, coefficients, kernel)``, the same objects for the same method."""

    def init(x: Array) -> State:
        return State(x, (jnp.zeros_like(x),) * (order - 1))

    def mean(
        denoise_fn: DenoiseFn, state: State, c: _Coefficients, correct: CorrectFn | None, carry: Any
    ) -> StepResult:
        x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
        newest = eps if of == "eps" else x0_hat
        x = c.alpha_next * x0_hat + c.direction * eps
        for j, past in enumerate(state.history):
            x = x + c.weights[j] * (past - newest)
        # Onto the clean example the weights are zero.
        return StepResult(State(x, (newest, *state.history)[: order - 1]), x0_hat, carry)

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
        t, alpha, sigma = (g[:-1] for g in grid)
        alpha_next, end = grid.alpha[1:], grid.sigma[1:]
        eta = settings.eta if random else 0
        nodes = _nodes(schedule, grid, of, variable, eta)
        weights = past_weights(nodes, order)
        if not random:
            return _Coefficients(t, alpha, sigma, alpha_next, end, weights)
        q = snr_ratio(grid)
        # The derivative of q^eta is infinite at q = 0.
        power = jnp.where(q > 0, jnp.where(q > 0, q, 1) ** eta, jnp.where(eta > 0, 0.0, 1.0))
        std = end * safe_sqrt(1 - power**2)
        return _Coefficients(t, alpha, sigma, alpha_next, end * power, weights, std)

    return init, step_from(mean), coefficients, kernel_from(mean)


class Nodes(NamedTuple):
    """One quadrature per step, over half the log-SNR.

    Attributes:
        places: ``[num_steps + 1]``, the grid in the variable of the polynomials.
        inside: ``[num_steps + 1]``, whether these are finite.
        at: ``[num_steps, NUM_NODES]``, nodes between the ends of each step, in the same variable.
        kernel: ``[num_steps, NUM_NODES]``, weights of the nodes times all but the prediction.
    """

    places: Array
    inside: Array
    at: Array
    kernel: Array


def _nodes(schedule: Schedule, grid: Grid, of: str, variable: str, eta: Any = 0) -> Nodes:
    inside, half = half_log_snr(grid)
    u, w = np.polynomial.legendre.leggauss(NUM_NODES)
    start, h = half[:-1, None], jnp.diff(half)[:, None]
    between = start + h * (u + 1)[None] / 2
    of_lambda = {
        "t": lambda a: schedule.t_from_log_snr(2 * a),
        "rho": lambda a: jnp.exp(-a),
        "lambda": lambda a: a,
    }[variable]
    if of == "eps":
        last = -grid.alpha[1:, None] * jnp.exp(-between)
    else:
        last = (1 + eta) * grid.sigma[1:, None] * jnp.exp(between - eta * (start + h - between))
    places = grid.t if variable == "t" else of_lambda(half)
    return Nodes(places, inside, of_lambda(between), last * h * (w / 2)[None])


def data_nodes(schedule: Schedule, grid: Grid) -> Nodes:
    """Return the quadrature of ``sigma' int exp(lambda) x0_hat d lambda``."""
    return _nodes(schedule, grid, "x0", "lambda")


def past_weights(nodes: Nodes, order: int) -> Array:
    """``[num_steps, order - 1]``: integrals of the Lagrange polynomials of the past values."""
    steps = np.arange(nodes.at.shape[0])[:, None]
    return lagrange_weights(nodes, steps - np.arange(order)[None])


def lagrange_weights(nodes: Nodes, columns: np.ndarray) -> Array:
    """Integrals over each step of the Lagrange polynomials of some points of the grid.

    Args:
        nodes: the quadrature.
        columns: ``[num_steps, m]`` indices of grid points. A row ends with the first one that is
            negative, or at infinite log-SNR; the polynomial goes through the points before it.

    Returns:
        ``[num_steps, m - 1]``, for all but the first column; zero where a row has ended. That of
        the first is the integral of 1, less these.
    """
    index = np.maximum(columns, 0)
    ends = nodes.inside[1:] & nodes.inside[:-1]
    known = jnp.cumprod(nodes.inside[index] & (columns >= 0), axis=1) > 0
    known = known & ends[:, None]
    knots = nodes.places[index]
    found = []
    for j in range(1, columns.shape[1]):
        product = nodes.kernel
        for m in range(columns.shape[1]):
            if m != j:
                both = known[:, m] & known[:, j]
                gap = jnp.where(both, knots[:, j] - knots[:, m], 1)
                factor = (nodes.at - knots[:, m, None]) / gap[:, None]
                product = product * jnp.where(both[:, None], factor, 1)
        found.append(jnp.where(known[:, j], jnp.sum(product, axis=1), 0))
    empty = jnp.zeros((columns.shape[0], 0), nodes.kernel.dtype)
    return jnp.stack(found, axis=1) if found else empty


def _solver(name: str, order: int, of: Any, variable: Any) -> Solver:
    init, step, coefficients, _ = _functions(order, of, variable, False)
    return Solver(name, init, step, coefficients, order=order)


def _sde_solver(name: str, order: int, eta: Scalar) -> Solver:
    check_range(name, "eta", eta, 0)
    init, step, coefficients, kernel = _functions(order, "x0", "lambda", True)
    return Solver(name, init, step, coefficients, Eta(eta), kernel, order=2, stochastic=True)


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


def dpmpp_2m_sde(eta: Scalar = 1.0) -> Solver:
    """Return SDE-DPM-Solver++(2M): ``dpmpp_2m`` for the reverse SDE; one evaluation a step.

    The prediction's straight line through its last two values is integrated exactly (k-diffusion's
    solver type "heun").

    Args:
        eta: noise rate, 0 (deterministic) or more; 1 is that of the forward process, for which one
            value would be DDPM's ancestral sampling; may be traced.

    References:
        Lu et al. 2022, arXiv 2211.01095, appendix on SDE solvers.
    """
    return _sde_solver("dpmpp_2m_sde", 2, eta)


def dpmpp_3m_sde(eta: Scalar = 1.0) -> Solver:
    """Return SDE-DPM-Solver++(3M), of k-diffusion: as ``dpmpp_2m_sde``, through three values.

    More accurate than the two-step method; of order 3 for ``eta = 0`` only. The published code
    takes half of the quadratic's second derivative, which loses that order.

    Args:
        eta: noise rate, 0 or more; may be traced.
    """
    return _sde_solver("dpmpp_3m_sde", 3, eta)
