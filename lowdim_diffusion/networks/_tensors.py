"""Checkpoints of other libraries: safetensors files read, and matched with a network's parameters.

A pickled checkpoint (.bin, .pt, .pth, .ckpt, .pkl) runs whatever code it holds when it is loaded,
so none is ever opened here.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Params
from lowdim_diffusion.networks._network import Network

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = ".safetensors.index.json"
_MAX_JSON = 2**26
_MAX_NAMES = 8
_FLOATS = ("F64", "F32", "F16", "BF16")

Tensors = dict[str, np.ndarray]


def find_weights(where: str, path: Path) -> list[Path]:
    """Return the safetensors files that a file, an index of shards or a folder stands for."""
    if path.is_dir():
        path = _in_folder(where, path)
    if path.suffix in PICKLED:
        raise _pickled(where, path)
    if not path.is_file():
        raise fail(where, "no checkpoint", "a .safetensors file or its folder", path)
    return _shards(where, path) if path.name.endswith(_INDEX) else [path]


def _in_folder(where: str, folder: Path) -> Path:
    names = sorted(os.listdir(folder))
    standard = "diffusion_pytorch_model.safetensors"
    whole = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(_INDEX)]
    if standard in whole:
        return folder / standard
    if len(indices) == 1:
        return folder / indices[0]
    if len(whole) == 1 and not indices:
        return folder / whole[0]
    if whole or indices:
        found = listed(indices or whole)
        raise fail(where, f"several checkpoints in {folder}", standard, found, "give one of them")
    for name in names:
        if Path(name).suffix in PICKLED:
            raise _pickled(where, folder / name)
    raise fail(where, f"no checkpoint in {folder}", standard, listed(names) or "an empty folder")


def _pickled(where: str, path: Path) -> ValueError:
    return fail(
        where,
        "pickled checkpoint",
        "a .safetensors file",
        path,
        "loading a pickle runs the code in it, so it is never opened here; if you trust its source "
        "convert it once, offline, where it was made: safetensors.torch.save_file(state_dict, "
        '"model.safetensors") (recipes in the guide, "Pretrained models")',
    )


def _shards(where: str, index: Path) -> list[Path]:
    table = read_json(where, index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise fail(where, f"no weight_map in {index}", "tensor names and their files", type(table))
    for name in table.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            expected = ".safetensors files beside it"
            raise fail(where, f"{index.name} points elsewhere", expected, repr(name))
        if not (index.parent / name).is_file():
            raise fail(where, f"missing shard of {index.name}", name, "no such file")
    return [index.parent / name for name in sorted(set(table.values()))]


def read_json(where: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    if not path.is_file():
        raise fail(where, "missing file", path.name, f"no such file in {path.parent}")
    if path.stat().st_size > _MAX_JSON:
        raise fail(where, f"{path} is too large", "a JSON object", f"{path.stat().st_size} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise fail(where, f"cannot read {path}", "a JSON object", error) from None
    if not isinstance(value, dict):
        raise fail(where, f"cannot read {path}", "a JSON object", type(value).__name__)
    return value


def read_tensors(where: str, path: Path) -> Tensors:
    """Return all tensors of a checkpoint as float32 numpy arrays, by name.

    Raises:
        ValueError: for a pickle, a damaged file, tensors that are not floating or not finite.
        ModuleNotFoundError: if the library safetensors is not installed.
    """
    files = find_weights(where, path)
    safetensors = library(where)
    tensors: Tensors = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    if name in tensors:
                        raise fail(where, f"{name} is in two shards", "one", file.name)
                    dtype = opened.get_slice(name).get_dtype()
                    if dtype not in _FLOATS:
                        raise fail(where, f"dtype of {name}", "one of " + ", ".join(_FLOATS), dtype)
                    tensors[name] = opened.get_tensor(name).astype(np.float32, copy=False)
        except (safetensors.SafetensorError, OSError) as error:
            fix = "fetch it again"
            raise fail(where, f"damaged {file}", "a safetensors file", error, fix) from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise fail(where, f"values of {name}", "finite ones", "infinite or not a number")
    return tensors


def library(where: str) -> Any:
    """Return the library safetensors, or say how to install it."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{where} needs safetensors, which is not installed: "
            "pip install 'lowdim-diffusion[pretrained]'"
        ) from None
    return safetensors


def fill(where: str, net: Network, tensors: Tensors, *, frequencies: str = "weight") -> Params:
    """Return the parameters of a network that are named as the modules of a torch one.

    A kernel ``[kh, kw, in, out]`` is stored by torch as ``[out, in, kh, kw]``, a kernel ``[in,
    out]`` as ``[out, in]`` or ``[out, in, 1, 1]``, all else as it is.

    Args:
        where: who complains.
        net: its parameters are ``{module: {leaf: array}}``.
        tensors: as torch stores them, by name: ``module.bias``, all else ``module.weight``.
        frequencies: what ends the name of random frequencies.

    Raises:
        ValueError: naming tensors that are missing, too many or of wrong shape.
    """
    abstract = jax.eval_shape(net.init, jax.random.key(0))
    suffixes = {"bias": "bias", "frequencies": frequencies}
    wanted = {
        f"{module}.{suffixes.get(leaf, 'weight')}": (module, leaf, array.shape)
        for module, leaves in abstract.items()
        for leaf, array in leaves.items()
    }
    missing, extra = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or extra:
        parts = [f"missing {listed(missing)}"] * bool(missing)
        parts += [f"unknown {listed(extra)}"] * bool(extra)
        expected = f"the {len(wanted)} of its architecture"
        raise fail(where, "tensors do not fit", expected, f"{len(tensors)}: " + "; ".join(parts))
    params: dict[str, dict[str, Any]] = {}
    wrong = []
    for name, (module, leaf, shape) in wanted.items():
        stored = tensors[name]
        axes = _TORCH_AXES[len(shape)] if leaf.endswith("kernel") else tuple(range(len(shape)))
        as_stored = tuple(shape[axis] for axis in axes)
        if len(as_stored) == 2 and stored.shape == (*as_stored, 1, 1):
            stored = stored.reshape(as_stored)
        if stored.shape != as_stored:
            wrong.append(f"{name} {stored.shape} instead of {as_stored}")
            continue
        value = np.ascontiguousarray(stored.transpose(np.argsort(axes)))
        params.setdefault(module, {})[leaf] = jnp.asarray(value)
    if wrong:
        raise fail(where, "tensors do not fit", "the shapes of its architecture", listed(wrong))
    return params


_TORCH_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
"""Our axes in the order in which torch stores a kernel."""


def listed(names: Sequence[str]) -> str:
    """Return the names as text, only the first few of many."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
