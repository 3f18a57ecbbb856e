r"""What all solvers share: the record, the grid with its clean end, the prediction.

At ``x_t = alpha x_0 + sigma eps`` a denoiser gives the pair ``(x0_hat, eps)`` with
``eps = (x_t - alpha x0_hat) / sigma``. In the coordinates ``y = x / alpha``,
``rho = sigma / alpha`` the probability-flow ODE is ``dy/drho = eps``; in the dual ones
``z = x / sigma``, ``kappa = alpha / sigma`` it is ``dz/dkappa = x0_hat``. Every update here is
written as ``alpha' x0_hat + sigma' eps + ...``, which both forms share and which stays finite at
pure noise (``alpha = 0``) and on the clean example (``sigma' = 0``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, PyTree, Schedule

CorrectFn: TypeAlias = Callable[[Array, Array, Array, Any], tuple[Array, Array, Any]]
"""``(x0_hat, eps, t, carry) -> (x0_hat, eps, carry)``, between a prediction and its use."""

DrawFn: TypeAlias = Callable[[Any], Array]
"""``draw(j)``: this step's j-th independent standard normal array, of the shape of x; any int j."""

CLEAN_TOLERANCE = 1e-5
"""Relative slack in ``t <= t_min``: a float32 grid must reach a t_min given in Python."""


class State(NamedTuple):
    """What the next step needs.

    Attributes:
        x: ``[b, *data]``, the example at the current noise level.
        history: earlier predictions, or whatever else a multistep solver remembers.
    """

    x: Array
    history: PyTree = ()


class StepResult(NamedTuple):
    """One step's outcome.

    Attributes:
        state: the new state.
        x0_hat: ``[b, *data]``, the step's first prediction, after correction.
        carry: what the correction hook passes on.
    """

    state: State
    x0_hat: Array
    carry: Any


class Kernel(NamedTuple):
    """The Gaussian that a stochastic step draws from: ``x' ~ N(mean.x, std^2 I)``.

    Attributes:
        mean: the next state, with the mean in place of x.
        std: standard deviation, a scalar.
        x0_hat: the prediction, after correction.
        carry: what the correction hook passes on.
    """

    mean: State
    std: Array
    x0_hat: Array
    carry: Any


class Grid(NamedTuple):
    """Times and scales of a run, each ``[num_steps + 1]``; a clean end has alpha 1, sigma 0."""

    t: Array
    alpha: Array
    sigma: Array


class Plan(NamedTuple):
    """A solver's numbers for one grid.

    Attributes:
        grid: times and scales.
        coefficients: pytree with leading axis ``num_steps``; entry i goes to step i.
    """

    grid: Grid
    coefficients: PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solver:
    """A method for stepping from one noise level to the next.

    The record is a pytree: numbers such as ``eta`` or ``churn`` are leaves (``settings``), all else
    is structure. It may be a static or an ordinary argument of a jitted function; as an ordinary
    one, new numbers do not retrace. Equal factory calls give equal records with equal hashes.

    Attributes:
        name: name of the method.
        init: ``x_T -> State``.
        step: ``(denoise_fn, state, c, draw, *, correct=None, carry=None, clean=False) ->
            StepResult``, where ``c`` is one entry of the coefficients, ``draw`` gives the noise
            (None for deterministic solvers) and ``clean`` says that this step is known to end on
            the clean example.
        coefficients: ``(settings, schedule, grid) -> pytree`` with leading axis ``num_steps``.
        settings: the method's numbers.
        kernel: ``(denoise_fn, state, c, *, correct=None, carry=None) -> Kernel``; None for
            deterministic solvers and where the noise does not come last.
        undo: ``(denoise_fn, state, c) -> State``, the exact inverse of a step of a reversible
            solver; None for all others.
        resume: ``(x_0, before) -> State``, a reversible solver's state at the end of a run, from an
            example and an estimate of the state before it.
        order: of convergence.
        num_evals: denoiser evaluations per step.
        stochastic: whether steps draw noise.
        num_draws: the numbers ``j`` that a stochastic step gives to ``draw`` are below this one;
            those from it on are free for a solver around it.
    """

    name: str = field(metadata={"static": True})
    init: Callable[[Array], State] = field(metadata={"static": True})
    step: Callable[..., StepResult] = field(metadata={"static": True})
    coefficients: Callable[[Any, Schedule, Grid], Any] = field(metadata={"static": True})
    settings: Any = ()
    kernel: Callable[..., Kernel] | None = field(default=None, metadata={"static": True})
    undo: Callable[..., State] | None = field(default=None, metadata={"static": True})
    resume: Callable[[Array, Array], State] | None = field(default=None, metadata={"static": True})
    order: int = field(default=1, metadata={"static": True})
    num_evals: int = field(default=1, metadata={"static": True})
    stochastic: bool = field(default=False, metadata={"static": True})
    num_draws: int = field(default=1, metadata={"static": True})

    @property
    def short_end(self) -> bool:
        """Whether a step known to end on the clean example costs one evaluation, not all."""
        return self.num_evals > 1 and self.undo is None


class Eta(NamedTuple):
    """The setting of solvers with a noise rate."""

    eta: Any


def step_from(mean: Callable[..., StepResult]) -> Callable[..., StepResult]:
    """Return the step that adds ``c.std`` times noise, if c has one, to what ``mean`` returns.

    ``mean: (denoise_fn, state, c, correct, carry) -> StepResult`` is a method whose formula needs
    no exception for a step onto the clean example.
    """

    def step(
        denoise_fn: DenoiseFn,
        state: State,
        c: Any,
        draw: DrawFn | None,
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
        clean: bool = False,
    ) -> StepResult:
        result = mean(denoise_fn, state, c, correct, carry)
        std = getattr(c, "std", None)
        if std is None or clean:
            return result
        assert draw is not None
        x = result.state.x + std * draw(0)
        return result._replace(state=result.state._replace(x=x))

    return step


def kernel_from(mean: Callable[..., StepResult]) -> Callable[..., Kernel]:
    """Return the kernel of the step that :func:`step_from` makes of the same mean."""

    def kernel(
        denoise_fn: DenoiseFn,
        state: State,
        c: Any,
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
    ) -> Kernel:
        result = mean(denoise_fn, state, c, correct, carry)
        return Kernel(result.state, jnp.asarray(c.std), result.x0_hat, result.carry)

    return kernel


def carry_if(noisy: ArrayLike, later: Any, carry: Any) -> Any:
    """Return the carry of an evaluation that has no effect unless the step's end is noisy."""
    return jax.tree.map(lambda new, old: jnp.where(noisy, new, old), later, carry)


def cast(numbers: PyTree, dtype: Any) -> Any:
    """Return coefficients, or other numbers for a run, in the dtype of its examples."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), numbers)


def memoryless(x: Array) -> State:
    """Return the state of a one-step solver."""
    return State(x)


def predict(
    denoise_fn: DenoiseFn,
    x: Array,
    t: ArrayLike,
    alpha: ArrayLike,
    sigma: ArrayLike,
    correct: CorrectFn | None = None,
    carry: Any = None,
) -> tuple[Array, Array, Any]:
    """Return ``(x0_hat, eps, carry)`` at one noise level, corrected.

    Raises:
        ValueError: if the denoiser or the hook changes the shape.
    """
    t = jnp.asarray(t, x.dtype)
    x0_hat = denoise_once("sample", denoise_fn, x, t)
    eps = (x - alpha * x0_hat) / sigma
    if correct is None:
        return x0_hat, eps, carry
    new_x0, new_eps, carry = correct(x0_hat, eps, t, carry)
    for name, new in (("x0_hat", new_x0), ("eps", new_eps)):
        if new.shape != x.shape:
            raise ValueError(
                f"sample: {name} has shape {x.shape} but correct returned {new.shape}; "
                "it must return (x0_hat, eps, carry), the arrays as large as they came."
            )
    return new_x0.astype(x.dtype), new_eps.astype(x.dtype), carry


def floating(where: str, x: Any) -> Array:
    """Return examples ``[b, *data]`` in float32 or better."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where}: x must be a floating array [b, *data], got dtype {x.dtype}.")
    if x.ndim < 2:
        raise fail(where, "wrong shape of x", "[b, *data]", x.shape, "add a batch axis")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def denoise_once(where: str, denoise_fn: DenoiseFn, x: Array, t: ArrayLike) -> Array:
    """Return ``denoise_fn(x, t)`` in the dtype of x, having checked its shape."""
    x0_hat = denoise_fn(x, t)
    if x0_hat.shape != x.shape:
        raise ValueError(
            f"{where}: x_t has shape {x.shape} but denoise_fn returned {x0_hat.shape}; "
            "check the network's output size, and that it takes a batch [b, *data]."
        )
    return x0_hat.astype(x.dtype)


def ends_clean(schedule: Schedule, ts: Any) -> bool | None:
    """Return whether ``ts[-1] <= schedule.t_min``: the run ends on the denoised example.

    None where that is not known while tracing.
    """
    ts = as_times(ts)
    if not (is_concrete(ts) and is_concrete(schedule.t_min)):
        return None
    return bool(is_clean(schedule, np.asarray(ts)[-1]))


def is_clean(schedule: Schedule, t: Any) -> Any:
    """Return whether a run that ends at ``t`` ends on the denoised example."""
    return t <= schedule.t_min * (1 + CLEAN_TOLERANCE)


def half_log_snr(grid: Grid) -> tuple[Array, Array]:
    """Return where ``log(alpha / sigma)`` is finite, and its values, 0 where it is not."""
    inside = (grid.alpha > 0) & (grid.sigma > 0)
    return inside, jnp.log(jnp.where(inside, grid.alpha, 1) / jnp.where(inside, grid.sigma, 1))


def snr_ratio(grid: Grid) -> Array:
    """Return ``(alpha / sigma) / (alpha' / sigma')`` of every step, from 0 to 1."""
    return grid.alpha[:-1] * grid.sigma[1:] / (grid.alpha[1:] * grid.sigma[:-1])


def _make_grid(schedule: Schedule, ts: Array) -> Grid:
    clean = is_clean(schedule, ts[-1])
    # Schedules have infinite slopes at t = 0; keep them from being evaluated there.
    inner = ts.at[-1].set(jnp.where(clean, ts[-2], ts[-1]))
    alpha, sigma = schedule.alpha(inner), schedule.sigma(inner)
    return Grid(
        ts,
        alpha.at[-1].set(jnp.where(clean, 1, alpha[-1])),
        sigma.at[-1].set(jnp.where(clean, 0, sigma[-1])),
    )


def _plan(solver: Solver, schedule: Schedule, ts: ArrayLike) -> Plan:
    grid = _make_grid(schedule, jnp.asarray(ts))
    return Plan(grid, solver.coefficients(solver.settings, schedule, grid))


def plan(solver: Solver, schedule: Schedule, ts: Any) -> Plan:
    """Return the grid and the solver's coefficients for all steps.

    Where times, schedule and settings are known numbers, they are computed once in float64 on the
    CPU (NumPy arrays come back, also while tracing); where one is traced, inside the graph.

    Args:
        solver: the method.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` times; not checked here.

    Examples:
        >>> from lowdim_diffusion import schedules, solvers
        >>> c = solvers.plan(solvers.euler(), schedules.VE(), [10.0, 1.0, 0.0]).coefficients
        >>> c.direction.tolist()
        [1.0, 0.0]
    """
    ts = as_times(ts)
    if is_concrete(ts):
        ts = np.asarray(ts, np.float64)
    else:
        ts = ts.astype(jnp.promote_types(ts.dtype, jnp.float32))
    return on_host(_plan, solver, schedule, ts)


def on_host(fn: Callable[..., Any], *numbers: PyTree) -> Any:
    """Return ``fn(*numbers)``: if all numbers are known, computed once in float64 on the CPU.

    Then NumPy arrays come back, also while tracing; where one is traced, it is part of the graph.
    """
    cpu = _cpu()
    if cpu and all(is_concrete(n) for n in jax.tree.leaves(numbers)):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(cpu):
            # Copies: jax 0.10.2 hands a jitted function the float32 version of a NumPy array that
            # was used in an enclosing trace, although x64 is on here.
            return jax.tree.map(np.asarray, jax.jit(fn)(*jax.tree.map(np.array, numbers)))
    return fn(*numbers)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # this jax was started without its CPU backend
        return None


def as_times(ts: Any) -> Any:
    """Return ``ts``, if a sequence then as an array, known numbers as a NumPy array."""
    if not isinstance(ts, list | tuple):
        return ts
    return np.asarray(ts) if all(map(is_concrete, ts)) else jnp.stack(ts)


def check_grid(where: str, schedule: Schedule, ts: Any) -> Any:
    """Return ``ts``, as an array, if it is a usable grid: decreasing, in range, two or more.

    Raises:
        ValueError: for a wrong shape, or for wrong values where these are known.
    """
    ts = as_times(ts)
    shape = tuple(np.shape(ts))
    if len(shape) != 1 or shape[0] < 2:
        fix = "give num_steps + 1 times, as schedules.karras_grid does"
        raise fail(where, "wrong shape of ts", "(num_steps + 1,), num_steps >= 1", shape, fix)
    if not is_concrete(ts):
        return ts
    values = np.asarray(ts, np.float64)
    if not np.all(np.isfinite(values)):
        raise fail(where, "ts is not finite", "finite times", values)
    rising = np.flatnonzero(np.diff(values) >= 0)
    if rising.size:
        i = int(rising[0])
        upward = values[-1] > values[0]
        fix = "grids run from noise to data, so reverse it with ts[::-1]" if upward else ""
        got = f"ts[{i}] = {values[i]:g}, ts[{i + 1}] = {values[i + 1]:g}"
        raise fail(where, "ts must decrease", "ts[i] > ts[i + 1]", got, fix)
    what = "ts leaves the schedule's range"
    if values[-1] < 0:
        raise fail(where, what, "ts[-1] >= 0", f"{values[-1]:g}")
    t_max = schedule.t_max
    if is_concrete(t_max) and values[0] > np.asarray(t_max) * (1 + CLEAN_TOLERANCE):
        fix = (
            "karras_grid gives noise levels, which schedules.times_from_sigmas turns into times; "
            "with VE raise its sigma_max"
        )
        raise fail(where, what, f"ts[0] <= t_max = {t_max}", f"{values[0]:g}", fix)
    return ts
