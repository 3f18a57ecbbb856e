"""Devices: the one-axis mesh, where arrays live on it, and keys that do not depend on it.

Data parallelism maps one per-device step over the axis ``"data"``: state is replicated, or split
too (:func:`fsdp`), the batch is split. Randomness is folded with each example's *global* index, so
losses, parameters and samples do not depend on the number of devices or on how the batch was split.

With several processes (:func:`initialize`) the mesh spans the devices of all of them, and every
process calls the same functions in the same order.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    "fsdp",
    "gather",
    "initialize",
    "is_writer",
    "local_index",
    "mean_gradients",
    "meet",
    "num_cores",
    "on_every_host",
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
        jax.config.update("jax_num_cpu_devices", num_cores())


def num_cores() -> int:
    """Return how many cores this process may use."""
    usable = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(usable(0)) if usable else os.cpu_count() or 1


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Make this process one of several that compute together; before anything touches a device.

    Without a coordinator the processes find each other where ``jax.distributed`` knows how: SLURM,
    Cloud TPU and GKE, Kubernetes, Open MPI. Afterwards ``jax.devices()`` are the devices of all.

    Args:
        coordinator: ``host:port`` of process 0.
        num_processes: how many there are.
        process_id: which one this is.
        initialization_timeout: seconds to wait until all are there.
        heartbeat_timeout: seconds of silence after which a process counts as dead; the runtime then
            aborts the others (SIGABRT).

    Raises:
        ValueError: if nothing is given and there is no cluster around.
        RuntimeError: if a device was touched before.
    """
    # The stop signal is handled, and agreed upon, by the trainer.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = coordinator is not None
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            # At the end all wait for process 0, which may be writing.
            shutdown_timeout_seconds=3600,
        )
    except ValueError as error:
        if explicit:
            raise
        raise fail(
            "initialize",
            "no cluster found",
            "SLURM, Cloud TPU, GKE, Kubernetes or Open MPI around this process",
            "none",
            "give the coordinator, the number of processes and the number of this one",
        ) from error


def is_writer() -> bool:
    """Return whether this process writes, prints and draws for all: the first one."""
    return jax.process_index() == 0


def data_mesh(num_devices: int | None = None, *, local: bool = False) -> Mesh:
    """Return the mesh ``("data",)`` over the first ``num_devices`` devices, all of them by default.

    With several processes every one of them takes an equal part.

    Args:
        num_devices: how many.
        local: only the devices of this process.

    Raises:
        ValueError: if more devices are asked for than there are, or the processes cannot share
            them equally.
    """
    devices = jax.local_devices() if local else jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise fail(
            "data_mesh",
            "wrong number of devices",
            f"1 to {len(devices)} ({devices[0].platform})",
            count,
            f"to emulate them on CPU set XLA_FLAGS=--xla_force_host_platform_device_count={count}",
        )
    owners = sorted({device.process_index for device in devices})
    parts = [[d for d in devices if d.process_index == owner] for owner in owners]
    share = count // len(owners)
    if share * len(owners) != count or min(map(len, parts)) < share:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise fail(
            "data_mesh",
            "the processes cannot share the devices equally",
            f"a multiple of {len(owners)} processes, at most {min(map(len, parts))} devices each",
            f"{count} of {sizes}",
        )
    chosen = np.asarray([device for part in parts for device in part[:share]])
    # Auto axes: under Explicit ones, make_mesh's default, gathers and SVDs of sharded arrays raise.
    return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return ``tree`` with every leaf whole on every device; equal on all processes before."""
    whole = replicated(mesh)
    if whole.is_fully_addressable:
        return jax.device_put(tree, whole)

    def place(leaf: Any) -> Array:
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])

    return jax.tree.map(place, tree)


def on_every_host(tree: PyTree) -> PyTree:
    """Return ``tree`` with leaves that this process can read whole; all processes call it."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def meet(name: str) -> None:
    """Wait until all processes have come to the place of this name."""
    multihost_utils.sync_global_devices(name)


_SMALLEST = 1024
"""Leaves with fewer entries stay whole: splitting them saves nothing."""


def fsdp(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Return shardings that split every large leaf of a state over the devices.

    A leaf is split along its largest axis that the devices divide; one without such an axis, and
    one of fewer than 1024 entries, stays whole. The rule sees shapes only, so an optimizer's
    moments are split as their parameters.

    Args:
        tree: arrays or ``ShapeDtypeStruct``.
        mesh: one-axis mesh, or an abstract one of devices that are elsewhere.

    Examples:
        >>> w = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        >>> fsdp({"w": w}, AbstractMesh((8,), (AXIS,)))["w"].shard_shape(w.shape)
        (8, 32)
    """

    def place(leaf: Any) -> NamedSharding:
        sizes = [size if size % mesh.size == 0 else 0 for size in leaf.shape]
        if math.prod(leaf.shape) < _SMALLEST or not any(sizes):
            return replicated(mesh)
        axis = int(np.argmax(sizes))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(place, tree)


def _split_axis(spec: PartitionSpec) -> int | None:
    return next((i for i, name in enumerate(spec) if name == AXIS), None)


def gather(tree: PyTree, specs: PyTree) -> PyTree:
    """Return a device's parts of ``tree`` as whole leaves; inside ``shard_map``.

    Its gradient adds the devices' gradients and leaves each its part: a reduce-scatter.
    """

    def whole(leaf: Array, spec: PartitionSpec) -> Array:
        axis = _split_axis(spec)
        return leaf if axis is None else jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)

    return jax.tree.map(whole, tree, specs)


def mean_gradients(grads: PyTree, specs: PyTree) -> PyTree:
    """Return the mean over the devices of gradients taken through :func:`gather`."""

    def mean(grad: Array, spec: PartitionSpec) -> Array:
        if _split_axis(spec) is None:
            return jax.lax.pmean(grad, AXIS)
        return grad / jax.lax.axis_size(AXIS)

    return jax.tree.map(mean, grads, specs)


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
