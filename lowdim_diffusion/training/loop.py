"""Many steps in one compiled program, over all devices of a mesh.

The number of steps is an *argument* of the program (a ``while`` loop with donated state), so short
and long stretches run the same instructions: where a run was interrupted cannot change its
numbers. The host waits once per stretch, never per step, and a non-finite loss, or whatever else a
step calls a reason to ``stop``, ends the stretch at that step. Of several processes the one that
asks for the fewest steps decides for all: one that asks for none, because it was told to stop,
stops them at the same step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lowdim_diffusion._types import Array, Batch, PRNGKey, PyTree
from lowdim_diffusion.sharding import AXIS, check_batch, local_index, replicated, split_over_data
from lowdim_diffusion.training.step import TrainState, TrainStep
from lowdim_diffusion.training.throughput import count_flops

__all__ = ["Examples", "Loop", "Stretch", "compile_loop"]

Examples: TypeAlias = Callable[[PyTree, Any, Any, Any], Batch]
"""``(arrays, key, step, index) -> batch``: the examples at these global positions of one batch."""


class Stretch(NamedTuple):
    """What one call of the loop returns."""

    state: TrainState
    num_steps: int
    """Steps done; fewer than asked for if one stopped, that one included, or if another process
    asked for fewer."""
    metrics: dict[str, np.ndarray]
    """Per-step metrics, each ``[num_steps]``."""
    ok: bool
    """False if the last step ended the stretch: by its metric ``stop`` where it has one, else by a
    loss or gradient norm that is not finite."""


class Loop(NamedTuple):
    """The compiled loop, called as ``(state, arrays, key, num_steps) -> Stretch``."""

    run: Callable[[TrainState, PyTree, PRNGKey, int], Stretch]
    flops: dict[str, float]
    """Of one step over all devices, by dtype; see :func:`.throughput.count_flops`."""

    def __call__(self, state: TrainState, arrays: PyTree, key: PRNGKey, num_steps: int) -> Stretch:
        """Train so many steps; the state is donated."""
        return self.run(state, arrays, key, num_steps)


def compile_loop(
    train_step: TrainStep,
    examples: Examples,
    batch_size: int,
    mesh: Mesh,
    state: TrainState,
    arrays: PyTree,
    *,
    max_steps: int = 1024,
) -> Loop:
    """Return the compiled loop ``(state, arrays, key, num_steps) -> Stretch``.

    The state is donated. Where it is split over the devices (:func:`sharding.fsdp`) each device
    gathers the parameters for a step, and keeps and updates its part alone; the numbers are those
    of a replicated state.

    Args:
        train_step: made with ``axis_name=sharding.AXIS``.
        examples: stateless batches, see :data:`Examples`; each device asks for its own part.
        batch_size: global batch size, a multiple of the number of devices.
        mesh: one-axis mesh.
        state: state to compile for, on the mesh (arrays or ``ShapeDtypeStruct``).
        arrays: the data that ``examples`` reads, on the mesh (arrays or ``ShapeDtypeStruct``). It
            gets those that are replicated whole, of those that are split the device's part.
        max_steps: longest stretch.
    """
    check_batch(batch_size, mesh.size)
    local_size = batch_size // mesh.size

    whole, split = PartitionSpec(), split_over_data(mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding or replicated(mesh), state)
    spec_of = lambda leaf: getattr(getattr(leaf, "sharding", None), "spec", whole)
    given = jax.tree.map(spec_of, arrays)
    is_split = not all(place.is_fully_replicated for place in jax.tree.leaves(places))

    # Not checked: "varying" bookkeeping of jax does not see through user-written losses.
    def over_devices(fn: Any, in_specs: Any = whole, out_specs: Any = whole) -> Any:
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def one(state: TrainState, arrays: PyTree, data_key: PRNGKey, loss_key: PRNGKey):
        batch = examples(arrays, data_key, state.step, local_index(local_size, AXIS))
        return train_step(state, batch, jax.random.fold_in(loss_key, state.step))

    def one_split(state: TrainState, arrays: PyTree, data_key: PRNGKey, loss_key: PRNGKey):
        specs = jax.tree.map(lambda place: place.spec, places.params)

        def gradients(params: PyTree, step: Array, *rest: Any):
            arrays, data_key, loss_key = rest
            batch = examples(arrays, data_key, step, local_index(local_size, AXIS))
            return train_step.gradients(params, batch, jax.random.fold_in(loss_key, step), specs)

        into = (specs, whole, given, whole, whole)
        mapped = over_devices(gradients, into, (specs, whole))
        moved = mapped(state.params, state.step, arrays, data_key, loss_key)
        state, metrics = train_step.update(state, *moved)
        return jax.lax.with_sharding_constraint(state, places), metrics

    def run(state: TrainState, arrays: PyTree, key: PRNGKey, num_steps: Array):
        data_key, loss_key = jax.random.split(key)
        move = one_split if is_split else one

        def step(state: TrainState):
            state, metrics = move(state, arrays, data_key, loss_key)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            return state, metrics, ~metrics.pop("stop", ~finite)

        def more(carry: Any):
            i, _, _, ok = carry
            return (i < num_steps) & ok

        def body(carry: Any):
            i, state, log, _ = carry
            state, metrics, ok = step(state)
            log = jax.tree.map(lambda column, value: column.at[i].set(value), log, metrics)
            return i + 1, state, log, ok

        shapes = jax.eval_shape(step, state)[1]
        log = jax.tree.map(lambda m: jnp.zeros((max_steps, *m.shape), m.dtype), shapes)
        zero = jnp.zeros((), jnp.int32)
        start = (zero, state, log, jnp.asarray(True))
        done, state, log, ok = jax.lax.while_loop(more, body, start)
        return state, done, log, ok

    mapped = run if is_split else over_devices(run, (whole, given, whole, whole))

    def agreed(state: TrainState, arrays: PyTree, key: PRNGKey, asked: Array):
        return mapped(state, arrays, key, jnp.min(asked))

    key = jax.eval_shape(lambda: jax.random.key(0))
    asked = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=split)
    out = (places if is_split else replicated(mesh), *[replicated(mesh)] * 3)
    jitted = jax.jit(agreed, donate_argnums=0, out_shardings=out)
    traced = jitted.trace(state, arrays, key, asked)
    program = traced.lower().compile()

    def loop(state: TrainState, arrays: PyTree, key: PRNGKey, num_steps: int) -> Stretch:
        mine = np.full(mesh.size, min(num_steps, max_steps), np.int32)
        asked = jax.make_array_from_callback(mine.shape, split, lambda index: mine[index])
        state, done, log, ok = program(state, arrays, key, asked)
        count, log, ok = jax.device_get((done, log, ok))
        return Stretch(state, int(count), {k: v[:count] for k, v in log.items()}, bool(ok))

    return Loop(loop, count_flops(traced.jaxpr))


def batch_of(
    examples: Examples, batch_size: int, mesh: Mesh, arrays: PyTree, key: PRNGKey, step: int
) -> Batch:
    """Return the whole batch that the loop draws after ``step`` updates, to look at it."""
    index = np.arange(batch_size, dtype=np.int32)
    draw = jax.jit(examples, out_shardings=replicated(mesh))
    return draw(arrays, data_key(key), step, index)


def data_key(key: PRNGKey) -> PRNGKey:
    """Return the key that the loop draws its batches with."""
    return jax.random.split(key)[0]
