"""Devices: the one-axis mesh, where arrays live on it, and keys that do not depend on it.

Data parallelism maps one per-device step over the axis ``"data"``: state is replicated, the batch
is split. Randomness is folded with each example's *global* index, so losses, parameters and
samples do not depend on the number of devices or on how the batch was split.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowdim_diffusion._checks import check_shape, fail
from lowdim_diffusion._types import Array, Int, Key, PRNGKey, PyTree

AXIS = "data"
"""Name of the only mesh axis."""

__all__ = [
    "AXIS",
    "check_batch",
    "cores_as_devices",
    "data_mesh",
    "example_index",
    "example_keys",
    "local_index",
    "replicate",
    "replicated",
    "shard_batch",
    "split_over_data",
    "vary_like",
]


def cores_as_devices() -> None:
    """Make every core of the CPU a device, for many small problems (:func:`training.sweep`).

    One device splits each operation over the cores, which small ones do not repay: 2,100 trainings
    of a low-rank denoiser take 0.7 of the time on two devices of one core each. Call it before
    anything is computed. A number of devices that was set before (``XLA_FLAGS``,
    ``JAX_NUM_CPU_DEVICES``) stays.

    Raises:
        RuntimeError: if jax has already looked for its devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if chosen < 0 and "host_platform_device_count" not in flags:
        usable = getattr(os, "sched_getaffinity", None)  # not on every system
        jax.config.update("jax_num_cpu_devices", len(usable(0)) if usable else os.cpu_count())


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Return the mesh ``("data",)`` over the first ``num_devices`` devices, all of them by default.

    Raises:
        ValueError: if more devices are asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise fail(
            "data_mesh",
            "wrong number of devices",
            f"1 to {len(devices)} ({devices[0].platform})",
            count,
            f"to emulate them on CPU set XLA_FLAGS=--xla_force_host_platform_device_count={count}",
        )
    # Auto axes: under Explicit ones, make_mesh's default, gathers and SVDs of sharded arrays raise.
    return Mesh(np.asarray(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return ``tree`` with every leaf whole on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return ``tree`` with the leading axis of every leaf split over the devices."""
    for leaf in jax.tree.leaves(tree):
        check_batch(leaf.shape[0], mesh.size)
    return jax.device_put(tree, split_over_data(mesh))


def check_batch(batch_size: int, num_devices: int) -> None:
    """Raise unless the devices divide the batch."""
    if batch_size % num_devices:
        below = batch_size - batch_size % num_devices
        raise fail(
            "sharding",
            "the devices must divide the batch size",
            f"a multiple of {num_devices} devices",
            f"batch size {batch_size}",
            f"try {below + num_devices}" + (f" or {below}" if below else ""),
        )


def example_index(where: str, index: Array | None, batch: int) -> Int[Array, " b"]:
    """Return the global indices of a batch's examples: those given, by default ``arange(batch)``.

    Raises:
        ValueError: if there are not as many as examples.
    """
    if index is None:
        return jnp.arange(batch, dtype=jnp.int32)
    check_shape(where, "index", index, (batch,), "give one global index per example")
    return index


def example_keys(key: PRNGKey, index: Int[Array, " b"]) -> Key[Array, " b"]:
    """Return one key per example: ``fold_in(key, global index)``."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def local_index(local_size: int, axis_name: str | None = None) -> Int[Array, " b"]:
    """Return the global indices of the examples that this device holds, in order.

    Args:
        local_size: examples on this device.
        axis_name: mapped axis; None outside any map, where local is global.
    """
    index: Any = jnp.arange(local_size, dtype=jnp.int32)
    return index if axis_name is None else index + jax.lax.axis_index(axis_name) * local_size


def vary_like(tree: PyTree, like: Array) -> Any:
    """Return ``tree``, whose leaves under ``shard_map`` count as varying over devices as ``like``.

    A loop's carry has to have its final type from the start: a random block that is equal on all
    devices, once it has met the data, is not.
    """
    first = like.reshape(-1)[0]
    return jax.tree.map(lambda leaf: jnp.where(first == 0, leaf, leaf), tree)
