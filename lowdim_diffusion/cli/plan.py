"""What a run would do, without doing it: ``lowdim train --dry-run``."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.build import Parts

__all__ = ["bytes_text", "describe", "state_bytes", "too_large"]


def state_bytes(tree: Any) -> int:
    """Return the size of the arrays of a state, from their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(parts: Parts, mesh: Mesh) -> str:
    """Return the resolved config and, below it, sizes and cadence; no array is made."""
    config, net = parts.model.config, parts.model.net
    shapes = jax.eval_shape(parts.init)
    size = state_bytes(shapes)
    batch, steps = config.train.batch_size, config.train.steps
    cadence = config.checkpoint
    saves = math.ceil(steps / cadence.every)
    kept = f"the newest {cadence.keep}"
    kept += f", the best {cadence.keep_best}" if cadence.keep_best else ""
    kept += f", every {cadence.keep_every:,}" if cadence.keep_every else ""
    forever = steps // cadence.keep_every if cadence.keep_every else 0
    count = min(saves, cadence.keep + cadence.keep_best + forever)
    device = mesh.devices.flat[0]
    rows = {
        "data": parts.dataset.describe(),
        "data std": f"{config.loss.data_std:g}",
        "network": f"{net.name}, {net.num_params:,} parameters, "
        f"{bytes_text(state_bytes(shapes.params))}",
        "devices": f"{mesh.size} x {device.device_kind}, mesh ({mesh.axis_names[0]}={mesh.size}), "
        f"batch {batch} = {batch // mesh.size} per device",
        "training": f"{steps:,} steps, {steps * batch:,} images, "
        f"{steps / parts.batcher.steps_per_epoch:,.1f} epochs",
        "state": f"{bytes_text(size)} on every device (parameters, optimizer, moving average)",
        "checkpoints": f"every {cadence.every:,} steps and at the end, {saves:,} in all, "
        f"{kept} kept: about {bytes_text(count * size)} of disk",
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
