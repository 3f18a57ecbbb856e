r"""UniPC: a multistep predictor whose next evaluation also corrects the step that led to it.

Both halves integrate the polynomial in ``lambda = log(alpha / sigma)`` through some predictions
``x0_hat`` exactly, as ``dpmpp_3m`` does: the predictor that through the last ``order`` ones, the
corrector that through these and the new one, which costs nothing since the predictor needs it
anyway. The corrected state gains an order, and is where the next prediction starts from; what it
would predict is not evaluated again.

The paper allows any function ``B(h)`` in the weights. It matters only where a half has a single
unknown weight, then set to 1/2: in a predictor through two values and in a corrector without
history.

References:
    Zhao, Bai, Rao, Zhou, Lu 2023, arXiv 2302.04867, algorithms 1-2 and section 3.1.
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
    Grid,
    Solver,
    State,
    StepResult,
    half_log_snr,
    predict,
    step_from,
)
from lowdim_diffusion.solvers.multistep import data_nodes, lagrange_weights, past_weights

__all__ = ["unipc"]

MAX_ORDER = 3


class _Coefficients(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    predict: Array
    """``[num_steps, order - 1]``: what each past prediction adds, less the newest."""
    correct: Array
    """``[num_steps, order]``: the new prediction's, then the past ones', for the step before."""


class _History(NamedTuple):
    euler: Array
    """The last step without its weights."""
    past: tuple[Array, ...]
    """Predictions, newest first."""


@functools.cache
def _functions(order: int, variant: str) -> tuple[Callable[..., Any], ...]:
    """``(init, step, coefficients)``, the same objects for the same method."""

    def init(x: Array) -> State:
        return State(x, _History(x, (jnp.zeros_like(x),) * order))

    def mean(
        denoise_fn: DenoiseFn, state: State, c: _Coefficients, correct: CorrectFn | None, carry: Any
    ) -> StepResult:
        x0_hat, eps, carry = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma, correct, carry)
        euler, past = state.history
        others = (x0_hat, *past[1:])
        corrected = euler
        for j, other in enumerate(others):
            corrected = corrected + c.correct[j] * (other - past[0])
        eps = eps + (corrected - state.x) / c.sigma
        euler = c.alpha_next * x0_hat + c.sigma_next * eps
        x = euler
        for j in range(order - 1):
            x = x + c.predict[j] * (past[j] - x0_hat)
        history = _History(euler, (x0_hat, *past[: order - 1]))
        return StepResult(State(x, history), x0_hat, carry)

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Coefficients:
        del settings
        t, alpha, sigma = (g[:-1] for g in grid)
        _, alpha_next, sigma_next = (g[1:] for g in grid)
        nodes = data_nodes(schedule, grid)
        steps = np.arange(t.shape[0])[:, None]
        past = steps - np.arange(order)[None]
        predicting = past_weights(nodes, order)
        correcting = lagrange_weights(
            nodes, np.concatenate([past[:, :1], steps + 1, past[:, 1:]], axis=1)
        )
        _, half = half_log_snr(grid)
        h = jnp.diff(half)
        scale = 0.5 * alpha_next * (h if variant == "bh1" else -jnp.expm1(-h))
        # One past value, or none: the weight is 1/2, in units of B(h) and of the distance.
        alone = correcting[:, 0] != 0
        if order > 1:
            ratio = h / jnp.where(alone, jnp.roll(h, 1), 1)
            one = (predicting[:, 0] != 0) & jnp.all(predicting[:, 1:] == 0, axis=1)
            predicting = predicting.at[:, 0].set(jnp.where(one, -scale * ratio, predicting[:, 0]))
            alone = alone & jnp.all(correcting[:, 1:] == 0, axis=1)
        correcting = correcting.at[:, 0].set(jnp.where(alone, scale, correcting[:, 0]))
        # The step before is corrected.
        correcting = jnp.roll(correcting, 1, axis=0).at[0].set(0)
        return _Coefficients(t, alpha, sigma, alpha_next, sigma_next, predicting, correcting)

    return init, step_from(mean), coefficients


def unipc(order: int = 3, variant: Literal["bh1", "bh2"] = "bh2") -> Solver:
    """Return UniPC: predictions corrected by the evaluation that follows; deterministic.

    One evaluation a step. Like ``dpmpp_2m`` it prefers grids that are smooth in log-SNR. The step
    that ends the run is not corrected.

    Args:
        order: predictions in the predictor, 1 to 3; the paper's UniPC-p, whose order of
            convergence is one more as long as the start does not limit it.
        variant: ``B(h) = h`` or ``exp(h) - 1``, the paper's B1 and B2.

    References:
        Zhao, Bai, Rao, Zhou, Lu 2023, arXiv 2302.04867.
    """
    check_choice("unipc", "order", order, range(1, MAX_ORDER + 1))
    check_choice("unipc", "variant", variant, ("bh1", "bh2"))
    init, step, coefficients = _functions(order, variant)
    return Solver("unipc", init, step, coefficients, order=order + 1)
