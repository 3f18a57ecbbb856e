"""Runs from noise to data: one scan for any solver, and many samples in equal blocks."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lowdim_diffusion._checks import check_int, check_shape, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, Int, PRNGKey, PyTree, Schedule
from lowdim_diffusion.sampling._common import scan
from lowdim_diffusion.sharding import AXIS, check_batch, example_index, example_keys
from lowdim_diffusion.solvers import CorrectFn, Solver, State, ends_clean, plan
from lowdim_diffusion.solvers._base import cast, check_grid, floating

__all__ = ["SampleResult", "initial_noise", "sample", "sample_batched"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleResult:
    """Samples and what was kept of their trajectory.

    Attributes:
        x: ``[b, *data]``, the samples.
        trajectory: ``[k, b, *data]``, noise to data; None with ``save="final"``.
        ts: ``[k]``, the trajectory's times; None with ``save="final"``.
        carry: what the correction hook carried out of the last step.
        state: the last state of a reversible solver, which :func:`invert` takes; else None.
        nfe: denoiser evaluations that every sample took, a Python int.
    """

    x: Array
    trajectory: Array | None
    ts: Array | None
    carry: Any
    nfe: int = field(metadata={"static": True})
    state: State | None = None


def initial_noise(
    key: PRNGKey,
    schedule: Schedule,
    t: Any,
    shape: tuple[int, ...],
    *,
    index: Int[Array, " b"] | None = None,
    dtype: Any = None,
) -> Float[Array, "b *data"]:
    """Return ``sigma(t) eps``, where :func:`sample` starts; each eps is of its example's own key.

    Args:
        key: typed random key.
        schedule: noise schedule.
        t: first time of the grid.
        shape: ``(b, *data)``.
        index: global indices ``[b]`` of the examples; default ``arange(b)``.
        dtype: floating dtype; default that of Python floats in jax.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    keys = example_keys(key, example_index("sample", index, shape[0]))
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape[1:], dtype))(keys)
    return schedule.sigma(t).astype(dtype) * eps


def sample(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    *,
    solver: Solver,
    save: str | int = "final",
    correct: CorrectFn | None = None,
    correct_carry: Any = None,
    index: Int[Array, " b"] | None = None,
    remat: bool | int = False,
) -> SampleResult:
    """Return samples drawn by running ``solver`` along ``ts`` from noise to data.

    Args:
        key: typed random key; a deterministic solver started from an array does not use it.
        denoise_fn: ``(x_t: [b, *data], t: scalar) -> x0_hat: [b, *data]``. One with an attribute
            ``min_steps`` (that of the empirical distribution has 72) warns of fewer steps.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` strictly decreasing times. A last entry of 0, or anything up to
            ``schedule.t_min``, ends on the denoised example. With known (not traced) numbers the
            solver's coefficients are computed beforehand in float64.
        shape_or_x_T: a shape ``(b, *data)``, or the start ``[b, *data]`` itself at ``ts[0]``, or a
            state that :func:`invert` returned.
        solver: from ``lowdim_diffusion.solvers``.
        save: what to keep. ``"final"``: nothing more; ``"all"``: the ``num_steps + 1`` states from
            x_T to the sample; ``"denoised"``: the ``num_steps`` predictions x0_hat, at ``ts[:-1]``;
            an integer k: every k-th state, from x_T on, and the last one. Static.
        correct: ``(x0_hat, eps, t, carry) -> (x0_hat, eps, carry)``, applied to every prediction
            before it is used. ``eps`` is that of the unmodified denoiser and stays so unless the
            hook changes it.
        correct_carry: the hook's initial carry, a pytree of arrays of fixed shapes.
        index: global indices ``[b]`` of the examples; default ``arange(b)``.
        remat: what a gradient through the run keeps. False: all that the denoiser computes, at
            every step. True: the states only; every step is computed again. An integer k: every
            k-th state; every step is computed twice again, and the memory is least for k near
            ``sqrt(num_steps)``. Without a gradient it changes nothing. For memory that does not
            grow at all see :func:`sample_adjoint`.

    Returns:
        A :class:`SampleResult`. ``nfe`` counts the calls of the denoiser. Heun's step to the clean
        example takes one; if ``ts`` is traced, whether there is such a step is not known, and it
        takes two, the second without effect.

    Raises:
        ValueError: for a grid that does not decrease or leaves the schedule's range, a denoiser
            that changes the shape, an unknown ``save``, a wrong ``index``.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> ts = schedules.karras_grid(18)
        >>> key, ve = jax.random.key(0), schedules.VE()
        >>> result = sample(key, white, ve, ts, (4, 3), solver=solvers.heun(), save=6)
        >>> result.x.shape, result.trajectory.shape, result.nfe
        ((4, 3), (4, 4, 3), 35)
    """
    ts = check_grid("sample", schedule, ts)
    _warn_if_stiff(denoise_fn, np.shape(ts)[0] - 1)
    _check_save(save)
    if not isinstance(remat, bool):
        check_int("sample", "remat", remat, fix="an integer k keeps every k-th state")
    given = shape_or_x_T if isinstance(shape_or_x_T, State) else None
    if given is not None:
        _check_state(solver, given)
    shape, x = start_of(shape_or_x_T if given is None else given.x)
    index = example_index("sample", index, shape[0])
    if x is None:
        x = initial_noise(key, schedule, jnp.asarray(ts)[0], shape, index=index)
    run = cast(plan(solver, schedule, ts), x.dtype)
    keys = example_keys(key, index) if solver.stochastic else None
    num_steps = np.shape(ts)[0] - 1
    every = save if isinstance(save, int) else None
    kept = None if every is None else jnp.broadcast_to(x, (_num_kept(num_steps, every), *x.shape))

    def step(loop: Any, i: Any, c: Any, clean: bool) -> tuple[Any, Array | None]:
        state, carry, kept = loop
        draw = None if keys is None else _make_draw(keys, i, x)
        out = solver.step(denoise_fn, state, c, draw, correct=correct, carry=carry, clean=clean)
        if every is not None:
            # Into the slot of the next multiple of k: what it keeps is the last state written.
            kept = jax.lax.dynamic_update_index_in_dim(kept, out.state.x, (i + every) // every, 0)
        stacked = {"all": out.state.x, "denoised": out.x0_hat}.get(str(save))
        return (out.state, out.carry, kept), stacked

    loop = (
        solver.init(x) if given is None else given,
        jax.tree.map(jnp.asarray, correct_carry),
        kept,
    )
    inputs = (jnp.arange(num_steps), run.coefficients)
    short_end = _has_short_end(solver, schedule, ts)  # not a step for a body of several stages
    scanned = jax.tree.map(lambda a: a[: num_steps - short_end], inputs)
    loop, states = scan(lambda loop, xs: step(loop, xs[0], xs[1], False), loop, scanned, remat)
    if short_end:
        i, c = jax.tree.map(lambda a: a[-1], inputs)
        loop, state = step(loop, i, c, True)
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), states, state)
    state, carry, kept = loop
    trajectory = states if every is None else kept
    if save == "all":
        trajectory = jax.tree.map(lambda a: jnp.concatenate([x[None], a]), states)
    times = _kept_times(run.grid.t, save)
    nfe = _count_evals(solver, schedule, ts)
    last = None if solver.undo is None else state
    return SampleResult(state.x, trajectory, times, carry, nfe, last)


def sample_batched(
    key: PRNGKey,
    denoise_fn: Callable[..., Array],
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    *,
    solver: Solver,
    batch_size: int,
    save: str | int = "final",
    correct: Callable[..., tuple[Array, Array, Any]] | None = None,
    correct_carry: Any = None,
    cond: PyTree = None,
    remat: bool | int = False,
    mesh: Mesh | None = None,
) -> SampleResult:
    """Return many samples, made ``batch_size`` at a time: those of one big :func:`sample`.

    A loop over equal blocks, the last one padded; with ``mesh`` every device runs its share of each
    block. Up to rounding, the samples depend on neither.

    Args:
        key: typed random key.
        denoise_fn: as for :func:`sample`; with ``cond`` called as
            ``denoise_fn(x_t, t, cond)`` with the block's part of ``cond``.
        schedule: noise schedule.
        ts: ``[num_steps + 1]`` times, noise to data.
        shape_or_x_T: ``(num_samples, *data)``, or the starts ``[num_samples, *data]``.
        solver: from ``lowdim_diffusion.solvers``.
        batch_size: examples in flight, over all devices together.
        save: as for :func:`sample`; trajectories of all samples are held at once.
        correct: the hook of :func:`sample`; with ``cond`` called as
            ``correct(x0_hat, eps, t, carry, cond)``.
        correct_carry: the hook's initial carry, with which every block starts anew, or a function
            of the block's global indices ``[b]`` that returns it (keys, for instance).
        cond: what each example is conditioned on: arrays ``[num_samples, ...]``, e.g. labels, or
            measurements.
        remat: as for :func:`sample`.
        mesh: one-axis mesh ``("data",)`` from ``sharding.data_mesh``.

    Returns:
        A :class:`SampleResult` with all samples; ``nfe`` is per sample, ``carry`` is None.

    Raises:
        ValueError: if the devices do not divide ``batch_size``, or ``cond`` has another length.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)
        >>> ts, euler = schedules.karras_grid(5), solvers.euler()
        >>> key, ve = jax.random.key(0), schedules.VE()
        >>> sample_batched(key, white, ve, ts, (10, 3), solver=euler, batch_size=4).x.shape
        (10, 3)
    """
    check_int("sample_batched", "batch_size", batch_size)
    ts = check_grid("sample_batched", schedule, ts)
    shape, x_T = start_of(shape_or_x_T)
    num_samples = shape[0]
    num_devices = 1 if mesh is None else mesh.size
    check_batch(batch_size, num_devices)
    # A smaller request does not pay for a whole block.
    batch_size = min(batch_size, math.ceil(num_samples / num_devices) * num_devices)
    num_blocks = math.ceil(num_samples / batch_size)
    cond = jax.tree.map(jnp.asarray, cond)
    for leaf in jax.tree.leaves(cond):
        check_shape("sample_batched", "cond", leaf, (num_samples, *leaf.shape[1:]))

    def blocks(a: Array) -> Array:
        padding = [(0, num_blocks * batch_size - num_samples)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding, mode="edge").reshape(num_blocks, batch_size, *a.shape[1:])

    def one_block(inputs: Any) -> tuple[Array, Array | None]:
        index, start, given = inputs
        own, hook = denoise_fn, correct
        if cond is not None:
            own = lambda x, t: denoise_fn(x, t, given)
        if cond is not None and hook is not None:
            hook = functools.partial(_with_condition, hook, given)
        result = sample(
            key,
            own,
            schedule,
            ts,
            (index.shape[0], *shape[1:]) if start is None else start,
            solver=solver,
            save=save,
            correct=hook,
            correct_carry=correct_carry(index) if callable(correct_carry) else correct_carry,
            index=index,
            remat=remat,
        )
        # Examples first in both, so that they are split over devices and joined alike.
        return result.x, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), result.trajectory)

    run = functools.partial(jax.lax.map, one_block)
    if mesh is not None:
        split = PartitionSpec(None, AXIS)
        run = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    out = run(jax.tree.map(blocks, (jnp.arange(num_samples), x_T, cond)))
    x, trajectory = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_samples], out)
    trajectory = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), trajectory)
    times = _kept_times(jnp.asarray(ts).astype(x.dtype), save)
    return SampleResult(x, trajectory, times, None, _count_evals(solver, schedule, ts))


def _with_condition(correct: Any, cond: PyTree, *args: Any) -> Any:
    return correct(*args, cond)


def _warn_if_stiff(denoise_fn: DenoiseFn, num_steps: int) -> None:
    least = getattr(denoise_fn, "min_steps", 0)
    if num_steps < least:
        text = (
            f"sample: {num_steps} steps are few for this denoiser, whose flow is stiff: some "
            f"noises end on another example than their own; use at least {least}."
        )
        warnings.warn(text, stacklevel=3)


def _check_save(save: Any) -> None:
    if isinstance(save, int) and not isinstance(save, bool):
        check_int("sample", "save", save, fix="an integer k keeps every k-th state")
    elif save not in ("final", "all", "denoised"):
        choices = "'final', 'all', 'denoised' or an integer k >= 1"
        raise fail("sample", "unknown save", choices, repr(save))


def _check_state(solver: Solver, given: State) -> None:
    expected = jax.eval_shape(solver.init, given.x)
    same = jax.tree.structure(expected) == jax.tree.structure(given) and all(
        a.shape == jnp.shape(b)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True)
    )
    if not same:
        fix = "start from a state that invert returned for this solver, or from its array x"
        what = "the start is not a state of this solver"
        raise fail("sample", what, f"what {solver.name} remembers", given.history, fix)


def _num_kept(num_steps: int, every: int) -> int:
    return math.ceil(num_steps / every) + 1


def _kept_times(times: Array, save: str | int) -> Array | None:
    if save == "final":
        return None
    if isinstance(save, int):
        num_steps = times.shape[0] - 1
        return times[np.minimum(np.arange(_num_kept(num_steps, save)) * save, num_steps)]
    return times if save == "all" else times[:-1]


def _has_short_end(solver: Solver, schedule: Schedule, ts: Any) -> bool:
    """Whether the last step is known to reach the clean example with fewer evaluations."""
    return solver.short_end and ends_clean(schedule, ts) is True


def _count_evals(solver: Solver, schedule: Schedule, ts: Any) -> int:
    return evals_of(solver, np.shape(ts)[0] - 1, _has_short_end(solver, schedule, ts))


def evals_of(solver: Solver, num_steps: int, short_end: bool) -> int:
    """Return the evaluations of a run, whose last step may cost only one."""
    return (num_steps - short_end) * solver.num_evals + short_end


def start_of(shape_or_x_T: Any) -> tuple[tuple[int, ...], Array | None]:
    """The shape, and x_T in float32 or better if it was given."""
    if isinstance(shape_or_x_T, tuple | list):
        shape = tuple(shape_or_x_T)
        if not all(isinstance(s, int | np.integer) and s > 0 for s in shape) or len(shape) < 2:
            raise fail("sample", "wrong shape", "(b, *data) of positive ints", shape)
        return shape, None
    x = floating("sample", shape_or_x_T)
    return x.shape, x


def _make_draw(keys: Array, i: Any, x: Array) -> Callable[[int], Array]:
    """The noise of step ``i``, example by example; 0 is the start's, so steps count from 1."""

    def draw(j: Any) -> Array:
        def one(key: Array) -> Array:
            step_key = jax.random.fold_in(jax.random.fold_in(key, i + 1), j)
            return jax.random.normal(step_key, x.shape[1:], x.dtype)

        return jax.vmap(one)(keys)

    return draw
