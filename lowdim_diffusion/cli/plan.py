"""What a run would do, without doing it: ``lowdim train --dry-run``, and what START is told."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lowdim_diffusion import data
from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.build import Parts
from lowdim_diffusion.sharding import AXIS, fsdp

__all__ = [
    "Memory",
    "bytes_text",
    "describe",
    "devices",
    "memory",
    "reading",
    "state_bytes",
    "too_large",
]


class Memory(NamedTuple):
    """Bytes on one device while training."""

    state: int
    """Parameters, optimizer, moving average: exact."""
    step: int
    """What one step keeps for its backward pass, parameters and gradients with it: an estimate."""
    data: int
    """The data set, or two chunks of a stream: exact."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def state_bytes(tree: Any) -> int:
    """Return the size of the arrays of a state, from their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(parts: Parts, mesh: Mesh | AbstractMesh) -> Memory:
    """Return what one device will need, before anything is compiled.

    A step is counted by what differentiation saves between its two passes, as jax traces it. The
    compiler merges some of it and adds its own scratch space: its figure for U-Nets, DiTs and MLPs
    on CPU lies 10 to 20 % below this one in float32, and up to 25 % above it in bfloat16.
    """
    config = parts.model.config
    shapes = jax.eval_shape(parts.init)
    state = state_bytes(shapes)
    if config.fsdp:
        placed = zip(jax.tree.leaves(shapes), jax.tree.leaves(fsdp(shapes, mesh)), strict=True)
        state = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in placed)
    local = config.train.batch_size // mesh.size
    size, batcher = local // config.optim.accumulate, parts.batcher
    if isinstance(batcher, data.Stream):
        arrays, held = batcher.shapes(size), 2 * state_bytes(batcher.shapes(local))
    else:
        arrays, held = batcher.arrays, state_bytes(batcher.arrays)

    def saved(params: Any, arrays: Any, key: Any) -> Any:
        batch = batcher.examples(arrays, key, jnp.int32(0), jnp.arange(size))
        return jax.vjp(lambda params: parts.train_step.loss(params, batch, key)[0], params)[1]

    step = state_bytes(jax.eval_shape(saved, shapes.params, arrays, parts.key))
    if config.optim.accumulate > 1:
        step += state_bytes(shapes.params)
    return Memory(state, step, held)


def reading(parts: Parts, processes: int) -> str | None:
    """Return in words how data are streamed; None if they lie on the devices whole."""
    batcher, config = parts.batcher, parts.model.config.data
    if not isinstance(batcher, data.Stream):
        return None
    part = state_bytes(batcher.shapes(batcher.batch_size)) // processes
    skip = f"left out, up to {batcher.max_unreadable}" if config.on_error == "skip" else "an error"
    return (
        f"decoded as they are drawn, {batcher.chunk_steps} steps at a time ({bytes_text(part)} "
        f"per process: two on the devices, one more in memory); one that cannot be read is {skip}"
    )


def devices(parts: Parts, mesh: Mesh | AbstractMesh, processes: int) -> dict[str, str]:
    """Return in plain words how a run is spread over devices, and what each of them holds."""
    config = parts.model.config
    batch, local = config.train.batch_size, config.train.batch_size // mesh.size
    kind = jax.local_devices()[0].device_kind
    count = f"{mesh.size} x {kind}"
    if processes > 1:
        count = f"{processes} processes with {mesh.size // processes} x {kind} each"
    need, there = memory(parts, mesh), _device_memory()
    whole = state_bytes(jax.eval_shape(parts.init))
    held = f"{bytes_text(need.state)} on every device (parameters, optimizer, moving average)"
    if config.fsdp:
        held += f", {bytes_text(whole)} split over {mesh.size}; small arrays stay whole"
    elif mesh.size > 1:
        held += ", equal copies"
    rows = {
        "devices": f"{count}, mesh ({AXIS}={mesh.size}), batch {batch} = {local} per device",
        "state": held,
        "memory": f"about {bytes_text(need.total)} per device: state {bytes_text(need.state)}, "
        f"one step {bytes_text(need.step)} (estimate), data {bytes_text(need.data)}",
    }
    if there is not None and need.total > there:
        rows["warning"] = (
            f"a device has {bytes_text(there)}: raise --optim.accumulate (same result), lower "
            "--train.batch-size, or split the state with --fsdp"
        )
    if mesh.size > 1:
        rows["each step"] = (
            ("every device gathers the parameters, " if config.fsdp else "every device ")
            + f"differentiates its {local} examples; "
            + (
                "each gets its part of the mean gradient and updates its part of the state"
                if config.fsdp
                else "the mean gradient goes to all, and all make the same update"
            )
        )
    return rows


def _device_memory() -> int | None:
    """Return the memory of a device; None if it does not say, as CPUs do not."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def describe(parts: Parts, mesh: Mesh | AbstractMesh, processes: int) -> str:
    """Return the resolved config and, below it, sizes and cadence; no array is made."""
    config, net = parts.model.config, parts.model.net
    shapes = jax.eval_shape(parts.init)
    batch, steps = config.train.batch_size, config.train.steps
    cadence = config.checkpoint
    saves = math.ceil(steps / cadence.every)
    kept = f"the newest {cadence.keep}"
    kept += f", the best {cadence.keep_best}" if cadence.keep_best else ""
    kept += f", every {cadence.keep_every:,}" if cadence.keep_every else ""
    forever = steps // cadence.keep_every if cadence.keep_every else 0
    count = min(saves, cadence.keep + cadence.keep_best + forever)
    stream = reading(parts, processes)
    rows = {
        "data": parts.dataset.describe(),
        **({"stream": stream} if stream else {}),
        "data std": f"{config.loss.data_std:g}",
        "network": f"{net.name}, {net.num_params:,} parameters, "
        f"{bytes_text(state_bytes(shapes.params))}",
        "training": f"{steps:,} steps, {steps * batch:,} images, "
        f"{steps / parts.batcher.steps_per_epoch:,.1f} epochs",
        **devices(parts, mesh, processes),
        "checkpoints": f"every {cadence.every:,} steps and at the end, {saves:,} in all, "
        f"{kept} kept: about {bytes_text(count * state_bytes(shapes))} of disk",
        "samples": f"every {config.train.sample_every:,} steps"
        if config.train.sample_every
        else "none during training",
        "out": config.out,
    }
    lines = [f"{name:<12} {value}" for name, value in rows.items()]
    return "\n".join([toml.dumps(config).rstrip(), "", *(f"# {line}" for line in lines)])


def too_large(parts: Parts, mesh: Mesh, error: BaseException) -> str:
    """Return what to lower after training ran out of memory, with the values it has now."""
    config, batch = parts.model.config, parts.model.config.train.batch_size
    once = batch // mesh.size // config.optim.accumulate
    size = bytes_text(state_bytes(jax.eval_shape(parts.init)))
    precise = parts.model.net.config.get("dtype") == "float32"
    half = ", --model.dtype bfloat16 halves what it keeps" if precise else ""
    said = " ".join(str(error).split())[:160] or type(error).__name__
    return (
        f"out of memory on {mesh.devices.flat[0].device_kind}: the state takes {size} and {once} "
        f"examples are worked through at once (--train.batch-size {batch} on {mesh.size} devices, "
        f"--optim.accumulate {config.optim.accumulate}). Raise --optim.accumulate (same result) or "
        f"lower the batch size{half}; if it came while sampling, lower --sample.batch-size "
        f"{config.sample.batch_size} ({said})"
    )


def bytes_text(count: int) -> str:
    """Return a number of bytes for people, ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:.3g} TB"
