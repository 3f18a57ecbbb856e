"""The way back: from data to the noise that a deterministic solver carries to it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, Schedule
from lowdim_diffusion.solvers import Solver, State, ends_clean, euler, plan
from lowdim_diffusion.solvers._base import (
    cast,
    check_grid,
    denoise_once,
    floating,
    is_clean,
    memoryless,
)

__all__ = ["invert"]


def invert(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_0: Float[Array, "b *data"] | State,
    *,
    solver: Solver,
    num_iters: int = 0,
) -> Any:
    r"""Return the noise that ``solver`` carries to ``x_0``: the ODE run from data to noise.

    The result is at time ``ts[0]``, and :func:`sample` takes it as its start. Three ways:

    - A reversible solver (``bdia``, ``edict``) is undone step by step: exact to rounding. It
      returns its state, a pair of arrays, and its samples should be given as such
      (``SampleResult.state``); from an image alone the second array is an estimate.
    - By default, others take their own steps upward, each with the prediction at the end where it
      starts, not at the one where :func:`sample` evaluates: the round trip is as accurate as the
      solver. With Euler's method this is DDIM inversion.
    - With ``num_iters``, each step ``S`` of a one-step solver is inverted by so many fixed-point
      iterations from there, ``x <- x + (alpha / alpha') (x' - S(x))`` with Anderson acceleration.
      They converge to the exact inverse where steps are short against the curvature of the flow;
      of the iterates the best one is taken.

    If the grid ends on the clean example, the last interval has no inverse (the denoiser's output
    forgets the noise) and is undone by one fixed-point step, ``x_t = alpha (2 x_0 - x0_hat(alpha
    x_0, t))``.

    Args:
        denoise_fn: as for :func:`sample`.
        schedule: noise schedule.
        ts: the same grid as for :func:`sample`, noise to data.
        x_0: ``[b, *data]`` clean examples, or the state of a reversible solver.
        solver: a deterministic solver.
        num_iters: fixed-point iterations per step; each takes the evaluations of a step, and one
            step more is taken to judge the last.

    Returns:
        ``[b, *data]``; of a reversible solver a ``solvers.State``.

    Raises:
        ValueError: if the solver is stochastic, for iterations with a solver that is reversible or
            remembers earlier steps, or for a bad grid.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> ts = schedules.karras_grid(100, sigma_max=3.0)
        >>> x_T = invert(white, schedules.VE(), ts, jnp.ones((1, 1)), solver=solvers.heun())
        >>> round(float(x_T[0, 0]), 3)  # exact: sqrt(10) = 3.162
        3.161

    References:
        Song, Meng, Ermon 2021, arXiv 2010.02502, section 4.3 (DDIM inversion);
        Pan, Gherardi, Xie, Huang 2023, arXiv 2309.04907 (accelerated fixed-point inversion).
    """
    if solver.stochastic:
        fix = "e.g. solvers.heun(), or solvers.ddim(eta=0.0)"
        raise fail("invert", "the solver draws noise", "a deterministic solver", solver.name, fix)
    check_int("invert", "num_iters", num_iters, 0)
    if num_iters and solver.init is not memoryless:
        fix = "reversible solvers need none; of the others take solvers.euler() or solvers.heun()"
        what = "fixed-point iterations with a solver that remembers"
        raise fail("invert", what, "a one-step solver", solver.name, fix)
    if isinstance(x_0, State) and solver.undo is None:
        raise fail("invert", "x_0 is a state", "solvers.bdia() or solvers.edict()", solver.name)
    ts = check_grid("invert", schedule, ts)
    if solver.undo is not None:
        return _undo(denoise_fn, schedule, ts, x_0, solver)
    x = floating("invert", x_0)
    clean = ends_clean(schedule, ts)
    ts = jnp.asarray(ts) if clean is None else np.asarray(ts)

    def climb(upward: Any, x: Array) -> Array:
        if upward.shape[0] < 2:
            return x
        coefficients = cast(plan(solver, schedule, upward), x.dtype).coefficients
        inputs = coefficients, None
        if num_iters:
            downward = cast(plan(solver, schedule, upward[::-1]), x.dtype)
            alpha = downward.grid.alpha
            back = downward.coefficients, alpha[:-1] / alpha[1:]
            inputs = coefficients, jax.tree.map(lambda a: a[::-1], back)

        def step(state: State, inputs: Any) -> tuple[State, None]:
            up, back = inputs
            end, state = state.x, solver.step(denoise_fn, state, up, None).state
            if back is None:
                return state, None
            down, scale = back

            def residual(x: Array) -> Array:
                return scale * (end - solver.step(denoise_fn, State(x), down, None).state.x)

            return State(_fixed_point(residual, state.x, num_iters)), None

        return jax.lax.scan(step, solver.init(x), inputs)[0].x

    def from_clean(x: Array) -> Array:
        t = jnp.asarray(ts[-2])
        alpha = schedule.alpha(t).astype(x.dtype)
        x0_hat = denoise_once("invert", denoise_fn, alpha * x, t.astype(x.dtype))
        return climb(ts[-2::-1], alpha * (2 * x - x0_hat))

    if clean is not None:
        return from_clean(x) if clean else climb(ts[::-1], x)
    known_later = is_clean(schedule, ts[-1])
    # The branch not taken must not divide by the sigma of a clean end.
    noisy = ts.at[-1].set(jnp.where(known_later, 0.5 * ts[-2], ts[-1]))
    return jax.lax.cond(known_later, from_clean, lambda x: climb(noisy[::-1], x), x)


def _fixed_point(residual: Callable[[Array], Array], x: Array, num_iters: int) -> Array:
    """Iterate ``x <- x + residual(x)`` with Anderson acceleration of depth 1, example by example.

    Of all iterates the one with the smallest residual is returned.
    """

    def total(a: Array) -> Array:
        return jnp.sum(a, axis=range(1, x.ndim), keepdims=True)

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        x, old, old_residual, best, best_square = carry
        now = residual(x)
        square = total(now**2)
        best = jnp.where(square < best_square, x, best)
        turn = now - old_residual
        length = total(turn**2)
        mix = jnp.where(length > 0, total(now * turn) / jnp.where(length > 0, length, 1), 0)
        new = (1 - mix) * (x + now) + mix * (old + old_residual)
        return (new, x, now, best, jnp.minimum(square, best_square)), None

    first = residual(x)
    square = total(first**2)
    carry = (x + first, x, first, x, square)
    x, _, _, best, best_square = jax.lax.scan(iterate, carry, length=num_iters - 1)[0]
    return jnp.where(total(residual(x) ** 2) < best_square, x, best)


def _undo(denoise_fn: DenoiseFn, schedule: Schedule, ts: Any, end: Any, solver: Solver) -> State:
    assert solver.undo is not None and solver.resume is not None
    if not isinstance(end, State):
        x = floating("invert", end)
        before = invert(denoise_fn, schedule, ts[-2:], x, solver=euler())
        end = solver.resume(x, before)
    made = cast(plan(solver, schedule, ts), end.x.dtype)
    backward = jax.tree.map(lambda a: a[::-1], made.coefficients)
    undo = solver.undo
    return jax.lax.scan(lambda state, c: (undo(denoise_fn, state, c), None), end, backward)[0]
