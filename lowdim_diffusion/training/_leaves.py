"""The leaves of a state: their names, their bytes on the host, their digests, their way back.

A *leaf table* maps the tree path ``a/b/c`` of each leaf to ``{"shape", "dtype"}`` as stored, plus
``"key"``, the name of the generator, for typed keys (stored as their key data), plus ``"sha256"``.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lowdim_diffusion._types import PyTree

Leaf = dict[str, Any]
Table = dict[str, Leaf]

_COPIERS = min(4, os.cpu_count() or 1)
"""Threads that copy at a time; one alone does not fill the memory's bandwidth."""
_KEY_IMPLS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def flatten(state: PyTree) -> dict[str, Any]:
    """Leaves by path, in tree order."""
    leaves = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "state"
        if path in leaves:
            raise ValueError(
                f"checkpoint: two leaves of the state are called {path!r}; rename one."
            )
        leaves[path] = leaf
    if not leaves:
        raise ValueError("checkpoint: the state has no leaves.")
    return leaves


def is_key(leaf: Any) -> bool:
    """Whether the leaf is an array (or its description) of typed keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> Leaf:
    """Shape and dtype as stored, of an array, a ``ShapeDtypeStruct`` or a number."""
    if is_key(leaf):
        tag = str(leaf.dtype).removeprefix("key<").removesuffix(">")
        data = jax.eval_shape(jax.random.key_data, leaf)
        impl = _KEY_IMPLS.get(tag, tag)
        return {"shape": list(data.shape), "dtype": str(data.dtype), "key": impl}
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}


def spell(entry: Mapping[str, Any] | None) -> str:
    """``float32[64,32]``, for people."""
    if entry is None:
        return "absent"
    kind = f"key<{entry['key']}>" if "key" in entry else entry["dtype"]
    return f"{kind}[{','.join(map(str, entry['shape']))}]"


def check_storable(leaves: Mapping[str, Any]) -> None:
    """Raise unless every leaf is a number or a non-empty array of numbers or typed keys."""
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise TypeError(
                f"checkpoint: leaf {path} is a {type(leaf).__name__}; a state holds arrays and "
                "numbers, put anything else into meta."
            )
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "OSUMm":
            raise TypeError(
                f"checkpoint: leaf {path} has dtype {leaf.dtype}; a state holds numbers."
            )
        if np.size(leaf) == 0:
            raise ValueError(
                f"checkpoint: leaf {path} is empty, shape {np.shape(leaf)}; Orbax cannot store it, "
                "drop it from the state."
            )


def to_hosts(
    leaves: Mapping[str, Any], reuse: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """NumPy arrays that nobody else holds, so the leaves may be donated or changed.

    Args:
        leaves: by path.
        reuse: what an earlier call returned, to be overwritten: fresh memory costs a page fault
            every 4 kB, which takes longer than copying.
    """
    parts = {path: _reachable(leaf) for path, leaf in leaves.items()}
    for part in parts.values():
        if isinstance(part, jax.Array):
            part.copy_to_host_async()  # all transfers overlap
    old = [(reuse or {}).get(path) for path in parts]
    with ThreadPoolExecutor(min(len(parts), _COPIERS)) as threads:
        return dict(zip(parts, threads.map(_own, parts.values(), old), strict=True))


def _own(part: Any, buffer: np.ndarray | None) -> np.ndarray:
    view = np.asarray(part)
    if isinstance(part, jax.Array) and next(iter(part.devices())).platform != "cpu":
        return view  # what came over from the device is nobody else's
    if buffer is None or (buffer.shape, buffer.dtype) != (view.shape, view.dtype):
        return np.array(view)
    np.copyto(buffer, view)
    return buffer


def _reachable(leaf: Any) -> Any:
    """The whole leaf as something that this process can read."""
    if not isinstance(leaf, jax.Array):
        return leaf
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    if leaf.is_fully_addressable:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def place(array: np.ndarray, target: Any) -> Any:
    """The stored array in the type, and on the devices, of the target leaf."""
    if isinstance(target, np.ndarray):
        return array
    if isinstance(target, np.generic):
        return array[()]
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return array.item()
    sharding = target.sharding
    if isinstance(target, jax.Array) and not target.committed:
        sharding = None
    if sharding is None or sharding.is_fully_addressable:
        value = wrap_key(array, describe(target)) if is_key(target) else array
        return jax.device_put(value, sharding)
    # Over several processes; a spec of the keys' axes holds for their data, which has one more.
    value = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return wrap_key(value, describe(target)) if is_key(target) else value


def wrap_key(array: np.ndarray | jax.Array, entry: Mapping[str, Any]) -> jax.Array:
    """Typed keys from their stored data."""
    return jax.random.wrap_key_data(jnp.asarray(array), impl=entry["key"])


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes in row-major order, as ``uint8``."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def sha256(array: np.ndarray) -> str:
    """Digest of the bytes in row-major order."""
    return hashlib.sha256(as_bytes(array).data).hexdigest()


def table(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, Leaf]) -> Table:
    """The leaf table of host arrays; ``kinds`` describes the leaves they came from."""
    return {path: {**kinds[path], "sha256": sha256(array)} for path, array in arrays.items()}


def non_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Paths of arrays with NaN or infinities.

    An infinity alone in its array is let through outside parameters and their averages: it is the
    honest first value of a running minimum.
    """

    def sound(path: str, x: np.ndarray) -> bool:
        if not jnp.issubdtype(x.dtype, jnp.inexact) or _all_finite(x):
            return True
        lenient = x.size == 1 and path.split("/")[0] not in ("params", "ema")
        return lenient and not np.isnan(x).any()

    return [path for path, x in arrays.items() if not sound(path, x)]


def _all_finite(x: np.ndarray) -> bool:
    # A sum of squares is not finite if a term is not, and BLAS takes it as fast as memory can be
    # read. It may also have overflowed: then every number is looked at.
    if x.dtype in (np.float32, np.float64):
        flat = np.ascontiguousarray(x).reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(flat, flat)):
                return True
    return bool(np.isfinite(x).all())
