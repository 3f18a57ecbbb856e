"""A pure function over a grid of numbers: one compiled program, run chunk by chunk.

Phase diagrams are thousands of small independent trainings. ``sweep`` compiles the function once
for a chunk of points, mapped ``batch_size`` at a time and split over the devices, and hands every
finished chunk to the host: memory is bounded by the chunk, and with a directory an interrupted
sweep continues where it was.
"""

import functools
import hashlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lowdim_diffusion import __version__
from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._files import write_atomic
from lowdim_diffusion._types import PyTree
from lowdim_diffusion.sharding import AXIS
from lowdim_diffusion.training.progress import CountBar

__all__ = ["Sweep", "sweep", "table"]

_ABOUT = "sweep.json"


class Sweep(NamedTuple):
    """The results of a sweep."""

    grid: dict[str, np.ndarray]
    """The values along each axis, in order."""
    values: PyTree
    """What the function returned, each leaf ``[len(axis 1), len(axis 2), ..., *its own shape]``."""


def sweep(
    fn: Callable[[dict[str, Any]], PyTree],
    grid: Mapping[str, Sequence[float] | np.ndarray],
    *,
    batch_size: int = 64,
    chunk: int = 512,
    mesh: Mesh | None = None,
    path: str | pathlib.Path | None = None,
    progress: str | None = None,
) -> Sweep:
    """Return ``fn`` at every point of a grid.

    Args:
        fn: pure function of a point, ``{axis name: scalar array}``, to a tree of arrays. It is
            traced once, with the point unknown: shapes cannot depend on it, but masks can. Random
            numbers come from a key made of the point, e.g. ``jax.random.key(point["seed"])``.
        grid: values along each axis; whole numbers arrive as int32, others as floating.
        batch_size: points that one device works on together.
        chunk: points between two visits of the host, at most the whole grid; a multiple of the
            number of devices leaves none of them idle.
        mesh: one-axis mesh ``("data",)`` to split each chunk over, from ``sharding.data_mesh``.
        path: directory to keep finished chunks in. The same call again computes only what is
            missing, on as many devices as there are then. Which function, grid and chunk they
            belong to is remembered.
        progress: name to show on a progress bar; None shows none.

    Returns:
        A :class:`Sweep`, its values on the host.

    Raises:
        ValueError: for an empty grid, a function that returns random keys, or a ``path`` with the
            results of another function, grid or chunk.

    Examples:
        >>> import jax.numpy as jnp
        >>> found = sweep(lambda p: p["a"] * jnp.sqrt(p["b"]), {"a": [1, 2, 3], "b": [4.0, 9.0]})
        >>> found.values.tolist()
        [[2.0, 3.0], [4.0, 6.0], [6.0, 9.0]]
    """
    check_int("sweep", "batch_size", batch_size)
    check_int("sweep", "chunk", chunk)
    axes = {name: _axis(name, values) for name, values in grid.items()}
    shape = tuple(len(values) for values in axes.values())
    total = math.prod(shape)
    if not axes or not total:
        raise fail("sweep", "empty grid", "one or more values along each axis", dict(grid))
    devices = 1 if mesh is None else mesh.size
    chunk = min(chunk, total)
    width = math.ceil(chunk / devices) * devices  # what one call takes; the rest is padding

    def take(first: int) -> dict[str, np.ndarray]:
        rows = np.minimum(first + np.arange(width), min(first + chunk, total) - 1)
        at = np.unravel_index(rows, shape)
        return {name: axis[i] for (name, axis), i in zip(axes.items(), at, strict=True)}

    fn = jax.jit(fn, inline=True)  # so that the point's program, and not its chunk's, is traced
    traced = fn.trace({name: jax.ShapeDtypeStruct((), axis.dtype) for name, axis in axes.items()})
    infos, out = jax.tree.flatten(traced.out_info)
    if any(jnp.issubdtype(info.dtype, jax.dtypes.extended) for info in infos):
        fix = "return jax.random.key_data(key)"
        raise fail("sweep", "result of fn", "arrays of numbers", "random keys", fix)
    leaves = [np.empty((total, *info.shape), info.dtype) for info in infos]
    store = None if path is None else _Store(pathlib.Path(path), axes, chunk, traced)

    def keep(first: int, found: list[np.ndarray]) -> None:
        for whole, part in zip(leaves, found, strict=True):
            whole[first : first + len(part)] = part

    missing = []
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        found = None if store is None else store.read(first, [a[first:last] for a in leaves])
        if found is None:
            missing.append((first, last))
        else:
            keep(first, found)

    @functools.cache
    def program() -> Any:
        local = min(batch_size, width // devices)
        run = functools.partial(jax.lax.map, fn, batch_size=local if local > 1 else None)
        if mesh is not None:
            split = PartitionSpec(AXIS)
            run = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        return jax.jit(run).lower(take(0)).compile()

    done = total - sum(last - first for first, last in missing)
    with CountBar(progress, total, done=done) as bar:
        for first, last in missing:
            found = [np.asarray(x)[: last - first] for x in jax.tree.leaves(program()(take(first)))]
            if store is not None:
                store.write(first, found)
            keep(first, found)
            done += last - first
            bar.update(done)
    shaped = [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves]
    return Sweep(axes, jax.tree.unflatten(out, shaped))


def table(found: Sweep) -> dict[str, np.ndarray]:
    """Return a sweep as tidy columns: one row per point, one column per axis and scalar result.

    Args:
        found: a sweep whose function returned a dictionary or a named tuple of scalars (its other
            entries are left out), or a single scalar, then called ``value``.

    Raises:
        ValueError: if a result has the name of an axis.

    Examples:
        >>> found = sweep(lambda p: {"double": 2 * p["a"]}, {"a": [1, 2], "seed": [0, 1, 2]})
        >>> {name: column.tolist() for name, column in table(found).items()}
        {'a': [1, 1, 1, 2, 2, 2], 'seed': [0, 1, 2, 0, 1, 2], 'double': [2, 2, 2, 4, 4, 4]}
    """
    shape = tuple(len(values) for values in found.grid.values())
    mesh = np.meshgrid(*found.grid.values(), indexing="ij")
    columns = {name: m.reshape(-1) for name, m in zip(found.grid, mesh, strict=True)}
    values = found.values
    if hasattr(values, "_asdict"):
        values = values._asdict()
    if not isinstance(values, dict):
        values = {"value": values}
    scalars = {name: np.asarray(v) for name, v in values.items() if np.shape(v) == shape}
    if both := sorted(set(scalars) & set(columns)):
        raise fail("table", "results named like an axis", "other names", ", ".join(both))
    return columns | {name: value.reshape(-1) for name, value in scalars.items()}


def _axis(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        got = f"{name} = {values!r}"
        raise fail("sweep", "bad axis", "a sequence of numbers", got, 'e.g. {"seed": range(20)}')
    if array.dtype.kind == "b":
        return array
    whole = array.dtype.kind in "iu"
    with np.errstate(over="ignore"):
        cast = array.astype(np.int32 if whole else jnp.result_type(float))
    lost = cast != array if whole else np.isfinite(array) & ~np.isfinite(cast)
    if lost.any():
        expected = f"values that {cast.dtype} holds"
        raise fail("sweep", f"axis {name!r} out of range", expected, array[lost][0])
    return cast


class _Store:
    """Finished chunks on disk, each a file that is whole or absent."""

    def __init__(self, path: pathlib.Path, axes: dict[str, np.ndarray], chunk: int, traced: Any):
        self._path = path
        program = hashlib.sha256(traced.lower().as_text().encode())
        for constant in jax.tree.leaves(traced.jaxpr.consts):
            if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
                constant = jax.random.key_data(constant)
            program.update(np.asarray(constant).tobytes())
        about = {
            "grid": [[name, values.tolist()] for name, values in axes.items()],  # in their order
            "chunk": chunk,
            "program": program.hexdigest(),
            "versions": {"jax": jax.__version__, "lowdim_diffusion": __version__},
        }
        path.mkdir(parents=True, exist_ok=True)
        there = path / _ABOUT
        if not there.exists():
            write_atomic(there, json.dumps(about, indent=1) + "\n")
            return
        known = json.loads(there.read_text(encoding="utf-8"))
        changed = [name for name in about if known.get(name) != about[name]]
        if changed:
            raise fail(
                "sweep",
                f"{path} holds the chunks of another sweep ({', '.join(changed)} differ)",
                "the same function, grid and chunk",
                "others",
                "choose another path, or delete it to start anew",
            )

    def _file(self, first: int) -> pathlib.Path:
        return self._path / f"chunk-{first:08d}.npz"

    def read(self, first: int, like: list[np.ndarray]) -> list[np.ndarray] | None:
        """Return a chunk's leaves, shaped as ``like``; None if it is not there or broken."""
        try:
            with zipfile.ZipFile(self._file(first)) as packed:
                if any(info.compress_type for info in packed.infolist()):
                    return None  # not ours, and may unfold to any size
            with np.load(self._file(first)) as stored:
                found = [stored[f"leaf{i}"] for i in range(len(like))]
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
            return None
        # npy files know bfloat16 and its kin only as two (or one) bytes without a meaning.
        pairs = list(zip(found, like, strict=True))
        if any((a.shape, a.itemsize) != (b.shape, b.itemsize) for a, b in pairs):
            return None
        return [a.view(b.dtype) if a.dtype.kind == "V" else a for a, b in pairs]

    def write(self, first: int, leaves: list[np.ndarray]) -> None:
        stored = io.BytesIO()
        named: dict[str, Any] = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
        np.savez(stored, **named)
        write_atomic(self._file(first), stored.getvalue())
