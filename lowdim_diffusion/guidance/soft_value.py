r"""Sampling towards a reward without its gradient: soft value-based decoding (SVDD).

The law ``p(x_0) exp(r(x_0) / tau)`` is reached by a reverse process whose kernel is the pre-trained
one times ``exp(v / tau)``, with the soft value

.. math:: v(x_t, t) = \tau \log E[\exp(r(x_0) / \tau) \mid x_t].

Each step draws M proposals from the pre-trained kernel and keeps one with probability proportional
to ``exp(v / tau)``: exact as M grows if v is. In its place one may take ``r(E[x_0 | x_t])``, which
needs no training and no gradient, and leaves a bias that more proposals do not remove.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.solvers import CorrectFn, Grid, Solver, State, StepResult

__all__ = ["ValueFn", "posterior_mean_value", "svdd"]

ValueFn: TypeAlias = Callable[[Array, Any], Array]
"""``(x_t: [b, *data], t: scalar) -> [b]``."""


def posterior_mean_value(denoise_fn: DenoiseFn, reward_fn: Callable[[Array], Array]) -> ValueFn:
    """Return ``(x_t, t) -> r(E[x_0 | x_t])``, the reward of the denoised example.

    Args:
        denoise_fn: the denoiser.
        reward_fn: ``x_0: [b, *data] -> [b]``; need not be differentiable.
    """

    def value(x_t: Array, t: Any) -> Array:
        return reward_fn(denoise_fn(x_t, t))

    value.num_evals = 1  # type: ignore[attr-defined]
    return value


def svdd(
    solver: Solver, value_fn: ValueFn, *, num_proposals: int = 20, temperature: Scalar = 1.0
) -> Solver:
    """Return the solver that draws its step ``num_proposals`` times and keeps one by its value.

    It keeps that of the largest ``value + temperature * Gumbel noise``. The step onto the clean
    example draws nothing and has no choice. The proposals are valued as one batch, that many times
    as large. ``SampleResult.nfe`` counts them for :func:`posterior_mean_value`; other value
    functions count as free.

    Args:
        solver: a stochastic solver whose steps have a kernel, such as ``ancestral()``.
        value_fn: ``(x_t: [b, *data], t) -> [b]``, a soft value, or :func:`posterior_mean_value`.
            Two solvers made with the same function object compare equal.
        num_proposals: M >= 1; 1 is the solver itself.
        temperature: tau >= 0; 0 keeps the proposal of the largest value, which over-optimises: it
            does not sample the tilted law. May be traced.

    Raises:
        ValueError: for a solver without a kernel, or settings out of range; when sampling, for
            values of another shape than ``[b]``.

    Examples:
        >>> from lowdim_diffusion import sampling, schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> right = posterior_mean_value(white, lambda x: x[:, 0])
        >>> solver = svdd(solvers.ancestral(), right, num_proposals=8)
        >>> key, ve, ts = jax.random.key(0), schedules.VE(), schedules.karras_grid(20)
        >>> x = sampling.sample(key, white, ve, ts, (200, 2), solver=solver).x
        >>> [round(float(m), 0) for m in x.mean(0)]  # tilted: N((1, 0), I)
        [1.0, 0.0]

    References:
        Li et al. 2024, arXiv 2408.08252, algorithm 1. The published code takes the largest value.
    """
    check_int("svdd", "num_proposals", num_proposals)
    check_range("svdd", "temperature", temperature, 0, high_open=True)
    if solver.kernel is None:
        fix = "e.g. solvers.ancestral() or solvers.ddim(eta=1.0)"
        what = "the solver has no kernel to draw proposals from"
        raise fail("svdd", what, "a stochastic solver with a kernel", solver.name, fix)
    return Solver(
        f"{solver.name}_svdd",
        solver.init,
        _Step(solver.kernel, value_fn, num_proposals),
        _Plan(solver.coefficients),
        _Settings(solver.settings, temperature),
        order=0,
        num_evals=solver.num_evals + num_proposals * getattr(value_fn, "num_evals", 0),
        stochastic=True,
        num_draws=2 * num_proposals,
    )


class _Settings(NamedTuple):
    solver: Any
    temperature: Any


class _Coefficients(NamedTuple):
    solver: Any
    t: Array
    temperature: Array


@dataclass(frozen=True)
class _Plan:
    """The solver's coefficients, the time at which proposals are valued, and the temperature."""

    coefficients: Callable[..., Any]

    def __call__(self, settings: _Settings, schedule: Schedule, grid: Grid) -> _Coefficients:
        # On the clean example all proposals are one; a time with noise keeps values finite.
        t = jnp.where(grid.sigma[1:] > 0, grid.t[1:], grid.t[:-1])
        temperature = jnp.broadcast_to(settings.temperature, t.shape)
        return _Coefficients(self.coefficients(settings.solver, schedule, grid), t, temperature)


@dataclass(frozen=True)
class _Step:
    """Proposals from the kernel, and the choice."""

    kernel: Callable[..., Any]
    value_fn: ValueFn
    num_proposals: int

    def __call__(
        self,
        denoise_fn: DenoiseFn,
        state: State,
        c: _Coefficients,
        draw: Callable[[Any], Array],
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
        clean: bool = False,
    ) -> StepResult:
        mean, std, x0_hat, carry = self.kernel(
            denoise_fn, state, c.solver, correct=correct, carry=carry
        )
        if clean:
            return StepResult(mean, x0_hat, carry)
        shape, m = mean.x.shape, self.num_proposals
        proposals = mean.x[None] + std * jax.vmap(draw)(jnp.arange(m))  # [m, b, *data]
        values = self.value_fn(proposals.reshape(m * shape[0], *shape[1:]), c.t)
        check_shape("svdd", "what value_fn returned", values, (m * shape[0],), "one per example")
        noise = _gumbel(draw, m, shape)
        scores = values.reshape(m, shape[0]).T.astype(noise.dtype) + c.temperature * noise
        best = jnp.argmax(scores, axis=1)
        x = proposals[best, jnp.arange(shape[0])]
        return StepResult(mean._replace(x=x), x0_hat, carry)


def _gumbel(draw: Callable[[Any], Array], m: int, shape: tuple[int, ...]) -> Array:
    """``[b, m]`` standard Gumbel numbers, made from the normal ones after the first m draws."""
    each = math.prod(shape[1:])
    count = math.ceil(m / each)
    normal = jax.vmap(draw)(m + jnp.arange(count)).reshape(count, shape[0], each)
    flat = jnp.moveaxis(normal, 0, 1).reshape(shape[0], count * each)[:, :m]
    return -jnp.log(-jax.scipy.special.log_ndtr(flat))
