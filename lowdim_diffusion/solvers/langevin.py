r"""Predictor-corrector sampling: after each step, Langevin moves at the noise level reached.

.. math:: x \leftarrow x + \delta\, s + \sqrt{2 \delta}\, z, \qquad s = -\epsilon / \sigma,
   \qquad \delta = 2 r^2 \sigma^2 .

The moves leave the law of that level as it is, but for a bias of order ``delta`` that more steps do
not remove: along an axis where the noisy data have the variance v, it comes out larger by the
factor ``1 / (1 - r^2 sigma^2 / v)``.

References:
    Song et al. 2021, arXiv 2011.13456, algorithms 1 and 4-5. There, ``delta = 2 (r |z| / |s|)^2``
    with norms averaged over the batch, which is the size above where ``eps`` is of unit variance.
    Here it depends on neither the batch nor x: in a norm of its own each example would meet a size
    that depends on where it is, and in few dimensions miss the law by far.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
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

__all__ = ["predictor_corrector"]


class _Settings(NamedTuple):
    predictor: Any
    snr: Any


class _Coefficients(NamedTuple):
    predictor: Any
    noisy: Array
    t: Array
    alpha: Array
    sigma: Array
    drift: Array
    std: Array


@functools.cache
def _functions(
    predict_step: Any, predict_plan: Any, num_draws: int, num_moves: int
) -> tuple[Callable, Callable]:
    """``(step, coefficients)``, the same objects for the same method."""

    def step(
        denoise_fn: DenoiseFn,
        state: State,
        c: _Coefficients,
        draw: DrawFn,
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
        clean: bool = False,
    ) -> StepResult:
        result = predict_step(
            denoise_fn, state, c.predictor, draw, correct=correct, carry=carry, clean=clean
        )
        if clean:
            return result
        (x, history), x0_hat, carry = result
        for move in range(num_moves):
            _, eps, later = predict(denoise_fn, x, c.t, c.alpha, c.sigma, correct, carry)
            carry = carry_if(c.noisy, later, carry)
            x = x - c.drift * eps + c.std * draw(num_draws + move)
        return StepResult(State(x, history), x0_hat, carry)

    def coefficients(settings: _Settings, schedule: Schedule, grid: Grid) -> _Coefficients:
        noisy = grid.sigma[1:] > 0
        t, alpha, sigma = (jnp.where(noisy, end[1:], end[:-1]) for end in grid)
        first = predict_plan(settings.predictor, schedule, grid)
        drift = jnp.where(noisy, 2 * settings.snr**2 * sigma, 0)
        std = jnp.where(noisy, 2 * settings.snr * sigma, 0)
        return _Coefficients(first, noisy, t, alpha, sigma, drift, std)

    return step, coefficients


def predictor_corrector(predictor: Solver, *, num_moves: int = 1, snr: Scalar = 0.16) -> Solver:
    """Return a one-step solver followed by Langevin moves; ``num_moves`` more evaluations a step.

    Args:
        predictor: a solver without memory, such as ``ancestral()`` or ``euler_maruyama()``.
        num_moves: Langevin moves after each step, none after that to the clean example.
        snr: r >= 0, ratio of the move's mean to its noise; the paper takes .16 (VE) and .01 to .05
            (VP); may be traced.

    Raises:
        ValueError: for a multistep solver, whose memory the moves would falsify.

    References:
        Song et al. 2021, arXiv 2011.13456, section 4.2 and appendix G.
    """
    check_int("predictor_corrector", "num_moves", num_moves)
    check_range("predictor_corrector", "snr", snr, 0)
    if predictor.init is not memoryless:
        fix = "e.g. solvers.ancestral() or solvers.heun()"
        what = "the predictor remembers earlier steps"
        raise fail("predictor_corrector", what, "a one-step solver", predictor.name, fix)
    num_draws = predictor.num_draws
    step, coefficients = _functions(predictor.step, predictor.coefficients, num_draws, num_moves)
    return Solver(
        f"{predictor.name}_langevin",
        memoryless,
        step,
        coefficients,
        _Settings(predictor.settings, snr),
        order=0,
        num_evals=predictor.num_evals + num_moves,
        stochastic=True,
        num_draws=num_draws + num_moves,
    )
