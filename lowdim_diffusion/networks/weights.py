r"""Trained weights as one safetensors file: any library reads it, and a changed byte is noticed.

Tensors are named by their path in the tree, ``a/b/c``. safetensors itself has no checksum, so the
header's metadata hold one: ``about``, a JSON text of whoever saved it, and ``sha256``, the digest
of that text, a line break and the lines ``name dtype shape sha256\n`` of the tensors, sorted by
name, the inner digest being that of the tensor's row-major little-endian bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lowdim_diffusion import _files
from lowdim_diffusion._checks import fail
from lowdim_diffusion._nested import nest
from lowdim_diffusion._types import Params
from lowdim_diffusion.networks._tensors import library

__all__ = ["Weights", "load_weights", "save_weights"]

_OWN = "lowdim_diffusion"


class Weights(NamedTuple):
    """What a file of :func:`save_weights` holds."""

    params: Params
    """Nested dictionaries of NumPy arrays."""
    about: dict[str, Any]


def save_weights(path: str | os.PathLike[str], params: Params, about: Mapping[str, Any]) -> Path:
    """Write parameters to a ``.safetensors`` file; a crash leaves the old one or the new one.

    Args:
        path: the file.
        params: tree of arrays.
        about: what JSON can hold and a reader should know: configuration, step.

    Raises:
        ModuleNotFoundError: if the library safetensors is not installed.
    """
    safetensors = library("save_weights")
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        tensors[name] = np.asarray(leaf, order="C")  # ascontiguousarray makes one axis of none
    text = json.dumps(about, sort_keys=True)
    metadata = {"about": text, "sha256": _digest(text, tensors), "format": _OWN}
    return _files.write_atomic(Path(path), safetensors.numpy.save(tensors, metadata=metadata))


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Return what :func:`save_weights` wrote; no code in the file is ever run.

    Raises:
        ValueError: if the file is damaged, or another program wrote it.
        ModuleNotFoundError: if the library safetensors is not installed.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_weights(pathlib.Path(folder) / "w.safetensors", {"w": np.ones(2)}, {})
        ...     load_weights(file).params
        {'w': array([1., 1.])}
    """
    where, path = "load_weights", Path(path)
    safetensors = library(where)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise fail(where, "no such file", "a .safetensors file", path) from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise fail(where, f"damaged {path}", "a safetensors file", error, "copy it again") from None
    if not {"about", "sha256"} <= metadata.keys():
        raise fail(where, f"{path} is from elsewhere", "a file of save_weights", "no sha256 in it")
    if _digest(metadata["about"], tensors) != metadata["sha256"]:
        expected = f"sha256 {metadata['sha256'][:16]}"
        raise fail(where, f"damaged {path}", expected, "other bytes", "copy it again")
    try:
        about = json.loads(metadata["about"])
    except (ValueError, RecursionError) as error:
        raise fail(where, f"cannot read about in {path}", "JSON", error) from None
    return Weights(nest(tensors), about)


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file, damaged or not, was written by :func:`save_weights`."""
    with open(path, "rb") as file:
        return f'"format":"{_OWN}"'.encode() in file.read(2**20)


def _digest(about: str, tensors: Mapping[str, np.ndarray]) -> str:
    lines = [about]
    for name, x in sorted(tensors.items()):
        inner = hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()
        lines.append(f"{name} {x.dtype} [{','.join(map(str, x.shape))}] {inner}")
    return hashlib.sha256("\n".join([*lines, ""]).encode()).hexdigest()
