"""Many steps in one compiled program, over all devices of a mesh.

The number of steps is an *argument* of the program (a ``while`` loop with donated state), so short
and long stretches run the same instructions: where a run was interrupted cannot change its
numbers. The host waits once per stretch, never per step, and a non-finite loss ends the stretch at
that step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lowdim_diffusion._types import Array, Batch, PRNGKey, PyTree
from lowdim_diffusion.sharding import AXIS, check_batch, local_index
from lowdim_diffusion.training.step import TrainState, TrainStep
from lowdim_diffusion.training.throughput import count_flops

__all__ = ["Examples", "Loop", "Stretch", "compile_loop"]

Examples: TypeAlias = Callable[[PyTree, Any, Any, Any], Batch]
"""``(arrays, key, step, index) -> batch``: the examples at these global positions of one batch."""


class Stretch(NamedTuple):
    """What one call of the loop returns."""

    state: TrainState
    num_steps: int
    """Steps done; fewer than asked for if one was not finite, that one included."""
    metrics: dict[str, np.ndarray]
    """Per-step metrics, each ``[num_steps]``."""
    finite: bool
    """Whether loss and gradient norm were finite at every step."""


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

    The state is donated.

    Args:
        train_step: made with ``axis_name=sharding.AXIS``.
        examples: stateless batches, see :data:`Examples`; each device asks for its own part.
        batch_size: global batch size, a multiple of the number of devices.
        mesh: one-axis mesh.
        state: state to compile for (arrays or ``ShapeDtypeStruct``).
        arrays: the data that ``examples`` reads, replicated on the mesh.
        max_steps: longest stretch.
    """
    check_batch(batch_size, mesh.size)
    local_size = batch_size // mesh.size

    def run(state: TrainState, arrays: PyTree, key: PRNGKey, num_steps: Array):
        index = local_index(local_size, AXIS)
        data_key, loss_key = jax.random.split(key)

        def one(state: TrainState):
            batch = examples(arrays, data_key, state.step, index)
            return train_step(state, batch, jax.random.fold_in(loss_key, state.step))

        def more(carry: Any):
            i, _, _, finite = carry
            return (i < num_steps) & finite

        def body(carry: Any):
            i, state, log, _ = carry
            state, metrics = one(state)
            log = jax.tree.map(lambda column, value: column.at[i].set(value), log, metrics)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            return i + 1, state, log, finite

        shapes = jax.eval_shape(one, state)[1]
        log = jax.tree.map(lambda m: jnp.zeros((max_steps, *m.shape), m.dtype), shapes)
        zero = jnp.zeros((), jnp.int32)
        done, state, log, finite = jax.lax.while_loop(
            more, body, (zero, state, log, jnp.asarray(True))
        )
        return state, done, log, finite

    whole = PartitionSpec()
    # Not checked: "varying" bookkeeping of jax does not see through user-written losses.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    key = jax.eval_shape(lambda: jax.random.key(0))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(mapped, donate_argnums=0).trace(state, arrays, key, steps)
    program = traced.lower().compile()

    def loop(state: TrainState, arrays: PyTree, key: PRNGKey, num_steps: int) -> Stretch:
        limit = jnp.asarray(min(num_steps, max_steps), jnp.int32)
        state, done, log, finite = program(state, arrays, key, limit)
        count, log, finite = jax.device_get((done, log, finite))
        return Stretch(state, int(count), {k: v[:count] for k, v in log.items()}, bool(finite))

    return Loop(loop, count_flops(traced.jaxpr))
