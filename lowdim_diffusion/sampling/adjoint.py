r"""Gradients of a run in memory that does not grow with its steps: the adjoint equation.

In ``z = x / sigma``, ``kappa = alpha / sigma`` the probability-flow ODE is ``dz/dkappa = D``, and a
gradient ``b = dL/dz`` obeys

.. math:: \frac{db}{d\kappa} = -\Big(\frac{\partial D}{\partial z}\Big)^T b , \qquad
   \frac{dL}{d\theta} = \int \Big(\frac{\partial D}{\partial\theta}\Big)^T b \, d\kappa .

Both run back from the sample to the noise, together with z, of which nothing was kept. These
coordinates are those of ``y = x / alpha`` turned upside down, and regular at pure noise. A
reversible solver needs no equation: its own steps are undone and differentiated one by one.

References:
    Pan et al. 2024, arXiv 2307.10711 (AdjointDPM);
    Chen, Rubanova, Bettencourt & Duvenaud 2018, arXiv 1806.07366;
    Kidger 2022, arXiv 2202.02435, section 5.3.2 (reversible solvers).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, Schedule
from lowdim_diffusion.solvers import Solver, State, ends_clean, plan
from lowdim_diffusion.solvers._base import cast, check_grid, floating, is_clean, on_host

__all__ = ["sample_adjoint"]


class _Levels(NamedTuple):
    """Each step's start, middle in kappa and end, ``[num_steps, 3]``, and its width."""

    t: Array
    sigma: Array
    width: Array


def sample_adjoint(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_T: Float[Array, "b *data"],
    *,
    solver: Solver,
) -> Float[Array, "b *data"]:
    """Return the sample that ``solver`` makes of ``x_T``, with a gradient in constant memory.

    The value is that of :func:`sample`. Its reverse-mode gradient keeps no states:

    - With a reversible solver (``bdia``, ``edict``) each step is undone, then differentiated: the
      gradient of the run itself, up to the rounding that undoing amplifies.
    - With any other, the adjoint equation is solved back along the grid by the classical
      Runge-Kutta method (four evaluations and four backward passes per step), which also recomputes
      the path from its end: the gradient of the exact flow. It differs from that of the run
      (:func:`sample`, with ``remat``) by the errors of the two, so take a fine grid.

    Gradients reach ``x_T`` and every floating-point array that ``denoise_fn`` closes over, so that
    a denoiser of parameters is written as anywhere else,
    ``sample_adjoint(from_network(net, params, schedule), ...)``. None flow to the numbers of
    ``ts``, ``schedule`` and ``solver`` given here, and there is no forward mode.

    Args:
        denoise_fn: as for :func:`sample`.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` times, noise to data; through a last step to the clean example the
            gradient goes as it is.
        x_T: ``[b, *data]``, the start at ``ts[0]``.
        solver: a deterministic solver.

    Raises:
        ValueError: if the solver is stochastic, or for a bad grid.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules, solvers
        >>> ve, ts = schedules.VE(), schedules.karras_grid(20, 1.0, 10.0)[:-1]
        >>> def end(var):  # of the flow of N(0, var)
        ...     denoise_fn = lambda x, t: var / (var + t**2) * x
        ...     x_T = jnp.ones((1, 1))
        ...     return sample_adjoint(denoise_fn, ve, ts, x_T, solver=solvers.rk4())[0, 0]
        >>> exact = 0.5 * (2 / 101) ** 0.5 * (1 / 2 - 1 / 101)
        >>> round(float(jax.grad(end)(1.0)), 3), round(exact, 3)
        (0.034, 0.034)
    """
    where = "sample_adjoint"
    if solver.stochastic:
        fix = "e.g. solvers.heun(), or sample with remat"
        raise fail(where, "the solver draws noise", "a deterministic solver", solver.name, fix)
    ts = check_grid(where, schedule, ts)
    x = floating(where, x_T)
    clean = ends_clean(schedule, ts)
    coefficients = cast(plan(solver, schedule, ts), x.dtype).coefficients
    times = np.asarray(ts, np.float64) if clean is not None else ts
    levels = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), on_host(_levels, schedule, times))
    denoise, params, others = _open(denoise_fn, x)

    @jax.custom_vjp
    def run(x: Array, params: Any, others: Any, coefficients: Any, levels: _Levels) -> Array:
        return forward(x, params, others, coefficients, levels)[0]

    def forward(
        x: Array, params: Any, others: Any, coefficients: Any, levels: _Levels
    ) -> tuple[Array, Any]:
        bound = lambda x, t: denoise(params, others, x, t)
        step = lambda state, c: (solver.step(bound, state, c, None).state, None)
        most, last = (jax.tree.map(lambda a, i=i: a[i], coefficients) for i in (slice(-1), -1))
        state, _ = jax.lax.scan(step, solver.init(x), most)
        end = solver.step(bound, state, last, None, clean=clean is True).state
        return end.x, (state.x, end, params, others, coefficients, levels)

    def backward(kept: Any, grad: Array) -> tuple[Any, ...]:
        before, end, params, others, coefficients, levels = kept
        bound = lambda params: lambda x, t: denoise(params, others, x, t)
        if solver.undo is None:
            found = _solve(bound, params, clean, levels, before, end.x, grad)
        else:
            found = _undo(solver, bound, params, coefficients, end, grad)
        return *found, None, None, None

    run.defvjp(forward, backward)
    return run(x, params, others, coefficients, levels)


def _solve(
    bound: Callable[[Any], DenoiseFn],
    params: Any,
    clean: bool | None,
    levels: _Levels,
    before: Array,
    end: Array,
    grad: Array,
) -> tuple[Array, Any]:
    """The gradients by x_T and by the parameters, from the adjoint equation."""

    def pull(x: Array, t: Array, grad: Array) -> tuple[Array, Array, Any]:
        x0_hat, vjp = jax.vjp(lambda x, params: bound(params)(x, t), x, params)
        return x0_hat, *vjp(grad)

    total = jax.tree.map(jnp.zeros_like, params)
    if clean is not False:
        there = levels.width[-1] == 0
        _, early, by_params = pull(before, levels.t[-1, 0], grad)
        end, grad = jnp.where(there, before, end), jnp.where(there, early, grad)
        total = jax.tree.map(lambda a: jnp.where(there, a, 0), by_params)

    def step(carry: Any, level: _Levels) -> tuple[Any, None]:
        z, b, total = carry
        stages = ((2, 0, 1), (1, 0.5, 2), (1, 0.5, 2), (0, 1, 1))
        slope_z = slope_b = jnp.zeros_like(z)
        sum_z, sum_b = z, b
        for k, ahead, weight in stages:
            at_z, at_b = (a - ahead * level.width * s for a, s in ((z, slope_z), (b, slope_b)))
            sigma = level.sigma[k]
            slope_z, pulled, by_params = pull(sigma * at_z, level.t[k], at_b)
            slope_b = -sigma * pulled
            weight = weight * level.width / 6
            sum_z, sum_b = sum_z - weight * slope_z, sum_b - weight * slope_b
            total = jax.tree.map(lambda a, d, w=weight: a + w * d, total, by_params)
        return (sum_z, sum_b, total), None

    last, first = levels.sigma[-1, -1], levels.sigma[0, 0]
    if clean is True:  # its step has no width
        levels = jax.tree.map(lambda a: a[:-1], levels)
    start = (end / last, grad * last, total)
    (_, b, total), _ = jax.lax.scan(step, start, levels, reverse=True)
    return b / first, total


def _undo(
    solver: Solver,
    bound: Callable[[Any], DenoiseFn],
    params: Any,
    coefficients: Any,
    end: State,
    grad: Array,
) -> tuple[Array, Any]:
    """The gradients of a reversible solver itself, its states found again from the last one."""
    assert solver.undo is not None
    undo = solver.undo

    def step(carry: Any, c: Any) -> tuple[Any, None]:
        state, grad, total = carry
        state = undo(bound(params), state, c)
        ahead = lambda state, params: solver.step(bound(params), state, c, None).state
        grad, by_params = jax.vjp(ahead, state, params)[1](grad)
        return (state, grad, jax.tree.map(jnp.add, total, by_params)), None

    grads = jax.tree.map(jnp.zeros_like, end)._replace(x=grad)
    start = (end, grads, jax.tree.map(jnp.zeros_like, params))
    (_, grads, total), _ = jax.lax.scan(step, start, coefficients, reverse=True)
    return jax.vjp(solver.init, end.x)[1](grads)[0], total


def _levels(schedule: Schedule, ts: ArrayLike) -> _Levels:
    ts = jnp.asarray(ts)
    # A step to the clean example has no width here: it is pulled back as it is.
    ts = ts.at[-1].set(jnp.where(is_clean(schedule, ts[-1]), ts[-2], ts[-1]))
    sigma = schedule.sigma(ts)
    kappa = schedule.alpha(ts) / sigma
    middle = schedule.t_from_log_snr(2 * jnp.log(0.5 * (kappa[:-1] + kappa[1:])))
    three = lambda a, inner: jnp.stack([a[:-1], inner, a[1:]], axis=1)
    return _Levels(three(ts, middle), three(sigma, schedule.sigma(middle)), kappa[1:] - kappa[:-1])


def _open(denoise_fn: DenoiseFn, x: Array) -> tuple[Callable[..., Array], list[Any], list[Any]]:
    """The denoiser with what it closes over as arguments: floating-point arrays, and the rest.

    Like ``jax.closure_convert``, which keeps a reference to every array it has met.
    """
    closed = jax.make_jaxpr(denoise_fn)(x, jnp.ones((), x.dtype))
    floats = [jnp.issubdtype(jnp.result_type(c), jnp.floating) for c in closed.consts]
    params = [c for c, is_float in zip(closed.consts, floats, strict=True) if is_float]
    others = [c for c, is_float in zip(closed.consts, floats, strict=True) if not is_float]

    def denoise(params: list[Any], others: list[Any], x: Array, t: Array) -> Array:
        given = iter(params), iter(others)
        consts = [next(given[0] if is_float else given[1]) for is_float in floats]
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(x, t)[0]

    return denoise, params, others
