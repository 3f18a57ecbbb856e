"""The way back: from data to the noise that a deterministic solver carries to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, Schedule
from lowdim_diffusion.sampling._common import cast
from lowdim_diffusion.solvers import Solver, ends_clean, plan
from lowdim_diffusion.solvers._base import check_grid, denoise_once, floating, is_clean

__all__ = ["invert"]


def invert(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_0: Float[Array, "b *data"],
    *,
    solver: Solver,
) -> Float[Array, "b *data"]:
    """Return the noise that ``solver`` carries to ``x_0``: the ODE run from data to noise.

    The result is at time ``ts[0]``, and :func:`sample` takes it as its start. If the grid ends on
    the clean example, the last interval has no inverse (the denoiser's output forgets the noise)
    and is undone by one fixed-point step, ``x_t = alpha (2 x_0 - x0_hat(alpha x_0, t))``. The round
    trip is as accurate as the solver.

    Args:
        denoise_fn: as for :func:`sample`.
        schedule: noise schedule.
        ts: the same grid as for :func:`sample`, noise to data.
        x_0: ``[b, *data]`` clean examples.
        solver: a deterministic solver.

    Raises:
        ValueError: if the solver is stochastic, or for a bad grid.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> ts = schedules.karras_grid(100, sigma_max=3.0)
        >>> x_T = invert(white, schedules.VE(), ts, jnp.ones((1, 1)), solver=solvers.heun())
        >>> round(float(x_T[0, 0]), 3)  # exact: sqrt(10) = 3.162
        3.161
    """
    if solver.stochastic:
        fix = "e.g. solvers.heun(), or solvers.ddim(eta=0.0)"
        raise fail("invert", "the solver draws noise", "a deterministic solver", solver.name, fix)
    ts = check_grid("invert", schedule, ts)
    x = floating("invert", x_0)
    clean = ends_clean(schedule, ts)
    ts = jnp.asarray(ts) if clean is None else np.asarray(ts)

    def climb(upward: Any, x: Array) -> Array:
        if upward.shape[0] < 2:
            return x
        coefficients = cast(plan(solver, schedule, upward), x.dtype).coefficients
        step = lambda state, c: (solver.step(denoise_fn, state, c, None).state, None)
        return jax.lax.scan(step, solver.init(x), coefficients)[0].x

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
