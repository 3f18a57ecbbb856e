r"""Solvers that can be undone exactly, to rounding: BDIA and EDICT.

A step of Euler's has no closed inverse, since it evaluates the denoiser at its start. Both methods
carry a second array along, from which the start can be told:

- **BDIA** keeps the state before: with Euler's steps ``E(t)`` from ``x`` at ``t_i``,
  ``x' = E(t_{i+1}) + gamma (x_prev - E(t_{i-1}))``, linear in all but ``x``, in a scale where x
  has unit variance if the data have. ``gamma = 1`` is a leapfrog, of order 2 where it is stable.
- **EDICT** moves two copies by turns, each with the prediction at the other, and mixes them.

Exact inverses amplify rounding: by ``1 / gamma`` a step in BDIA, by about ``1 / mixing`` in EDICT.

References:
    Zhang, Lewis, Kleijn 2024, arXiv 2307.10829, eqs. (12)-(16) (BDIA);
    Wallace, Gokul, Naik 2023, arXiv 2211.12446, section 4 (EDICT).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_range
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

__all__ = ["bdia", "edict"]


class _Gamma(NamedTuple):
    gamma: Any


class _Mixing(NamedTuple):
    mixing: Any


class _BdiaCoefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    alpha_prev: Array
    sigma_prev: Array
    gamma: Array


class _EdictCoefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    scale: Array
    signal: Array
    noise: Array
    mixing: Array


def _pair(x: Array) -> State:
    return State(x, (x,))


def _bdia_pair(x_0: Array, before: Array) -> State:
    return State(x_0, (before,))


def _edict_pair(x_0: Array, before: Array) -> State:
    del before
    return _pair(x_0)


def _bdia_mean(
    denoise_fn: DenoiseFn, state: State, c: _BdiaCoefficients, correct: CorrectFn | None, carry: Any
) -> StepResult:
    # A step to the clean example is no exception, or it could not be undone.
    x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
    back = c.alpha_prev * x0_hat + c.sigma_prev * eps
    x = c.alpha_next * x0_hat + c.sigma_next * eps + c.gamma * (state.history[0] - back)
    return StepResult(State(x, (state.x,)), x0_hat, carry)


_bdia_step = step_from(_bdia_mean)


def _bdia_undo(denoise_fn: DenoiseFn, state: State, c: _BdiaCoefficients) -> State:
    (x,) = state.history
    x0_hat, eps, _ = predict(denoise_fn, x, c.t, c.alpha, c.sigma)
    back = c.alpha_prev * x0_hat + c.sigma_prev * eps
    ahead = c.alpha_next * x0_hat + c.sigma_next * eps
    return State(x, (back + (state.x - ahead) / c.gamma,))


def _bdia_coefficients(settings: _Gamma, schedule: Schedule, grid: Grid) -> _BdiaCoefficients:
    del schedule
    t, alpha, sigma = (g[:-1] for g in grid)
    _, alpha_next, sigma_next = (g[1:] for g in grid)
    # Before the first step there is the start itself, which makes that step Euler's.
    alpha_prev, sigma_prev = (jnp.concatenate([g[:1], g[:-1]]) for g in (alpha, sigma))
    # Scaled to unit variance, as the paper's schedules are.
    size = jnp.sqrt(grid.alpha**2 + grid.sigma**2)
    gamma = settings.gamma * size[1:] / jnp.concatenate([size[:1], size[:-2]])
    return _BdiaCoefficients(t, alpha, sigma, alpha_next, sigma_next, alpha_prev, sigma_prev, gamma)


def _edict_move(
    denoise_fn: DenoiseFn, at: Array, c: _EdictCoefficients, correct: Any = None, carry: Any = None
) -> tuple[Array, Array, Any]:
    """What a copy is moved by, in a step, by the prediction at the other."""
    x0_hat, eps, carry = predict(denoise_fn, at, c.t, c.alpha, c.sigma, correct, carry)
    return c.signal * x0_hat + c.noise * eps, x0_hat, carry


def _edict_mean(
    denoise_fn: DenoiseFn,
    state: State,
    c: _EdictCoefficients,
    correct: CorrectFn | None,
    carry: Any,
) -> StepResult:
    x, (y,) = state.x, state.history
    move, x0_hat, carry = _edict_move(denoise_fn, y, c, correct, carry)
    x = c.scale * x + move
    move, _, carry = _edict_move(denoise_fn, x, c, correct, carry)
    y = c.scale * y + move
    x = c.mixing * x + (1 - c.mixing) * y
    y = c.mixing * y + (1 - c.mixing) * x
    return StepResult(State(x, (y,)), x0_hat, carry)


_edict_step = step_from(_edict_mean)


def _edict_undo(denoise_fn: DenoiseFn, state: State, c: _EdictCoefficients) -> State:
    x, (y,) = state.x, state.history
    y = (y - (1 - c.mixing) * x) / c.mixing
    x = (x - (1 - c.mixing) * y) / c.mixing
    y = (y - _edict_move(denoise_fn, x, c)[0]) / c.scale
    x = (x - _edict_move(denoise_fn, y, c)[0]) / c.scale
    return State(x, (y,))


def _edict_coefficients(settings: _Mixing, schedule: Schedule, grid: Grid) -> _EdictCoefficients:
    del schedule
    t, alpha, sigma = (g[:-1] for g in grid)
    _, alpha_next, sigma_next = (g[1:] for g in grid)
    has_signal = alpha > 0
    scale = jnp.where(has_signal, alpha_next / jnp.where(has_signal, alpha, 1), sigma_next / sigma)
    return _EdictCoefficients(
        t,
        alpha,
        sigma,
        scale,
        jnp.where(has_signal, 0, alpha_next),
        jnp.where(has_signal, sigma_next - scale * sigma, 0),
        jnp.broadcast_to(settings.mixing, t.shape),
    )


def bdia(gamma: Scalar = 1.0) -> Solver:
    """Return BDIA, bidirectional integration approximation: one evaluation a step; deterministic.

    Its first step is Euler's, unless it starts from what an image was inverted to. A last step to
    the clean example keeps the term in ``gamma``, so the sample is not the denoiser's output.

    Args:
        gamma: in (0, 1]; 1 is accurate and safe to undo; each undone step amplifies rounding (and,
            for real data, what is not of the model) by ``1 / gamma``; may be traced.

    References:
        Zhang, Lewis, Kleijn 2024, arXiv 2307.10829.
    """
    check_range("bdia", "gamma", gamma, 0, 1, low_open=True)
    return Solver(
        "bdia",
        _pair,
        _bdia_step,
        _bdia_coefficients,
        _Gamma(gamma),
        order=2 if isinstance(gamma, int | float) and gamma == 1 else 1,
        undo=_bdia_undo,
        resume=_bdia_pair,
    )


def edict(mixing: Scalar = 0.93) -> Solver:
    """Return EDICT, two coupled copies: two evaluations a step; deterministic.

    Every step takes both evaluations, also that to the clean example. Steps are linear in the copy
    that they move and in ``eps``; from pure noise, in ``x0_hat``.

    Args:
        mixing: p in (0, 1]; smaller keeps the copies together, and amplifies rounding when undone;
            may be traced.

    References:
        Wallace, Gokul, Naik 2023, arXiv 2211.12446, eqs. (12)-(15); p = .93 there.
    """
    check_range("edict", "mixing", mixing, 0, 1, low_open=True)
    return Solver(
        "edict",
        _pair,
        _edict_step,
        _edict_coefficients,
        _Mixing(mixing),
        num_evals=2,
        undo=_edict_undo,
        resume=_edict_pair,
    )
