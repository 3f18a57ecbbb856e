"""Pretrained networks of other libraries: Hugging Face diffusers and the EDM releases.

``found = from_diffusers("google-ddpm-cifar10-32")`` is everything that a denoiser needs::

    denoise_fn = ld.denoisers.from_network(
        found.net,
        found.params,
        found.schedule,
        parametrization=found.parametrization,
        data_std=found.data_std,
    )

``found.net`` is a network like any other (``networks.make(net.name, **net.config)`` builds it
again) and can be trained further. Files are read as safetensors only (``pip install
'lowdim-diffusion[pretrained]'``): a pickled checkpoint is refused, see the guide.
"""

import functools
import importlib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

import numpy as np

from lowdim_diffusion import schedules
from lowdim_diffusion._checks import check_choice, check_range, fail
from lowdim_diffusion._types import Params, Schedule
from lowdim_diffusion.networks._network import Network
from lowdim_diffusion.networks._tensors import (
    PICKLED,
    Tensors,
    fill,
    find_weights,
    listed,
    read_json,
    read_tensors,
)

__all__ = ["Pretrained", "from_diffusers", "from_edm"]

PathLike = str | os.PathLike[str]


class Pretrained(NamedTuple):
    """A network with trained parameters and what its output means."""

    net: Network
    params: Params
    schedule: Schedule
    """What ``t`` refers to."""
    parametrization: Literal["edm", "eps", "v", "x0"]
    """What the network predicts."""
    data_std: float
    """For ``from_network``. 1 with a variance-preserving schedule is input as it is."""


def from_diffusers(
    path: PathLike,
    *,
    scheduler: Mapping[str, Any] | None = None,
    data_shape: tuple[int, int, int] | None = None,
    dtype: str = "float32",
) -> Pretrained:
    """Return a ``UNet2DModel`` saved by Hugging Face diffusers.

    Args:
        path: folder of a pipeline (``unet/`` and ``scheduler/``, or all files at its top), or of
            the model alone: ``config.json`` beside ``diffusion_pytorch_model.safetensors``, in one
            piece or in shards.
        scheduler: the fields of ``scheduler_config.json`` instead of that file; ``{}`` is 1000
            linear steps from 1e-4 to 0.02 and a network that predicts the noise, as DDPM.
        data_shape: ``(height, width, channels)`` if other than the model was trained on.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.

    Returns:
        The network with ``schedules.Discrete`` (``t`` is the timestep of diffusers plus 1), or with
        ``schedules.VE`` for NCSN++. How the scheduler *samples* (clip_sample, thresholding, spacing
        of timesteps) is no part of the network and is not taken over. Images are in [-1, 1]; the
        NCSN++, which diffusers gives images in [0, 1], is changed for it, and its sigmas doubled.

    Raises:
        ValueError: for a pickled, damaged or incomplete checkpoint, tensors that do not fit, and
            anything that this network or its schedule cannot do, by name.
        ModuleNotFoundError: if the library safetensors is not installed.
    """
    where = "from_diffusers"
    root = Path(path)
    if not root.is_dir():
        if root.suffix in PICKLED:
            find_weights(where, root)  # which refuses it
        fix = "download it first, e.g. huggingface_hub.snapshot_download"
        raise fail(where, "no such folder", "a folder with config.json", path, fix)
    if (root / "model_index.json").is_file():
        for part in {"vae", "vqvae"} & set(read_json(where, root / "model_index.json")):
            fix = "a latent model needs its decoder; load unet/ alone to study the latents"
            raise fail(where, "not a pixel-space pipeline", "a U-Net of images", part, fix)
    folder = root / "unet" if (root / "unet").is_dir() else root
    stored = read_json(where, folder / "config.json")
    options = _unet_options(where, stored, data_shape)
    if scheduler is None:
        scheduler = read_json(where, _scheduler_file(where, root))
    if options.get("time_embedding_type") == "fourier":
        schedule, parametrization = _ve(where, scheduler), "x0"
        table: dict[str, Any] = {}
    else:
        table, parametrization = _steps(where, scheduler)
        schedule = None
    module = _module("diffusers_unet")
    config = module.Config(**options, **table, dtype=dtype)
    net = module.build(config)
    if schedule is None:
        schedule = config.schedule
    tensors = {_modern(name): t for name, t in read_tensors(where, folder).items()}
    return Pretrained(net, fill(where, net, tensors), schedule, parametrization, 1.0)


def from_edm(
    path: PathLike,
    *,
    preconditioning: Literal["edm", "vp", "ve"] | None = None,
    data_std: float = 0.5,
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Pretrained:
    """Return a ``SongUNet`` (DDPM++ or NCSN++) of the EDM releases from its state dict.

    The architecture is read from the names and shapes of the tensors. Weights of augmentation
    labels are left out: without such labels, as in sampling, they do nothing.

    Args:
        path: ``.safetensors`` file of the state dict of the torch module, ``EDMPrecond`` or the
            ``SongUNet`` inside it, or a folder with one.
        preconditioning: that of the module: ``EDMPrecond``, ``VPPrecond`` or ``VEPrecond``. The
            tensors do not tell; None goes by the name of the file: those called ``baseline-*-vp``
            and ``baseline-*-ve``, as they were released, have the latter two, all others the first.
        data_std: ``sigma_data`` of ``EDMPrecond``.
        dropout: rate for further training; the file does not tell it.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.

    Returns:
        The network with ``schedules.VE``; ``t`` is EDM's sigma, images are in [-1, 1].

    Raises:
        ValueError: for a pickled or damaged file and for tensors that are not those of a SongUNet,
            by name.
        ModuleNotFoundError: if the library safetensors is not installed.
    """
    where = "from_edm"
    check_range(where, "data_std", data_std, 0, low_open=True)
    tensors = read_tensors(where, Path(path))
    if preconditioning is None:
        preconditioning = _preconditioning(find_weights(where, Path(path))[0].stem)
    check_choice(where, "preconditioning", preconditioning, tuple(_PRECONDITIONED))
    if tensors and all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    options = _song_options(where, tensors)
    module = _module("song_unet")
    options |= {"preconditioning": preconditioning, "dropout": dropout, "dtype": dtype}
    net = module.build(module.Config(**options))
    weights = {
        name: _split_qkv(tensor) if ".qkv." in name else tensor
        for name, tensor in tensors.items()
        if name != "map_augment.weight" and not name.endswith(".resample_filter")
    }
    params = fill(where, net, weights, frequencies="freqs")
    parametrization, levels = _PRECONDITIONED[str(preconditioning)]
    std = data_std if parametrization == "edm" else 1.0
    return Pretrained(net, params, schedules.VE(*levels), parametrization, std)


def _module(name: str) -> Any:
    return importlib.import_module(f"lowdim_diffusion.networks.{name}")  # brings flax


# --- diffusers ----------------------------------------------------------------------------------

_OURS = {"data_shape", "num_classes", "dtype", "beta_schedule", "beta_start", "beta_end"}
_OURS |= {"num_train_timesteps", "trained_betas"}
"""Options of our network that are no options of UNet2DModel."""

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")

_TABLES = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers over a table of betas, all with the same defaults."""

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def _modern(name: str) -> str:
    """Names of attention layers before diffusers 0.12, as in the files of google/ddpm-*."""
    return _OLD_ATTENTION.sub(lambda found: f"{found[1]}{_ATTENTION[found[2]]}.", name)


_MOST, _MOST_LAYERS = 2**20, 64
"""No number in a config is larger."""


def _checked(where: str, stored: Mapping[str, Any], name: str, kind: Any, default: Any) -> Any:
    """A field of a JSON file, which may hold anything, as ``kind``: lists as tuples."""
    value = stored.get(name, default)
    if not _fits(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else str(kind)
        expected = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", expected)
        raise fail(where, f"wrong value of {name!r}", expected, f"{value!r:.80}")
    if kind is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(_fits(one, inner) for one in value)
    if kind in (int, float):
        numbers = int if kind is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) <= _MOST
    return isinstance(value, kind)


def _unet_options(
    where: str, stored: Mapping[str, Any], data_shape: tuple[int, int, int] | None
) -> dict[str, Any]:
    """Options of our network from ``config.json``."""
    kind = stored.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise fail(where, "unsupported model class", "UNet2DModel", repr(kind))
    options = {name: value for name, value in stored.items() if not name.startswith("_")}
    channels = _checked(where, options, "in_channels", int, 3)
    out = _checked(where, options, "out_channels", int, 3)
    if channels != out:
        fix = (
            "a network that also predicts variances is not supported" if out == 2 * channels else ""
        )
        raise fail(where, "out_channels", f"in_channels = {channels}", out, fix)
    size = _checked(where, options, "sample_size", int | tuple[int, ...] | None, None)
    if data_shape is None:
        if size is None:
            raise fail(
                where, "no sample_size in config.json", "an image size", None, "give data_shape"
            )
        sides = (size, size) if isinstance(size, int) else size
        if len(sides) != 2:
            raise fail(where, "sample_size", "one or two sides", sides)
        data_shape = (sides[0], sides[1], channels)
    if data_shape[-1] != channels:
        raise fail(where, "data_shape", f"{channels} channels", data_shape)
    num_classes = _checked(where, options, "num_class_embeds", int | None, None) or 0
    for name in ("in_channels", "out_channels", "sample_size", "num_class_embeds"):
        options.pop(name, None)
    options.pop("num_train_timesteps", None)  # of a learned time embedding only
    known = {f.name: f.type for f in fields(_module("diffusers_unet").Config)}
    for name, value in list(options.items()):
        if name in known and name not in _OURS:
            options[name] = _checked(where, options, name, known[name], None)
        elif options.pop(name) is not None:
            raise fail(
                where, f"unsupported option {name!r} of UNet2DModel", "none", f"{value!r:.80}"
            )
    if options.get("layers_per_block", 0) > _MOST_LAYERS:
        raise fail(
            where, "layers_per_block", f"at most {_MOST_LAYERS}", options["layers_per_block"]
        )
    for name in ("down_block_types", "up_block_types"):
        if name in options:
            options[name] = tuple(kind.removeprefix("UNetRes") for kind in options[name])
    return {**options, "data_shape": tuple(data_shape), "num_classes": num_classes}


def _scheduler_file(where: str, root: Path) -> Path:
    for file in (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json"):
        if file.is_file():
            return file
    fix = "give scheduler=, its fields: {} is 1000 linear steps from 1e-4 to 0.02 and epsilon"
    raise fail(
        where, "no noise schedule", "scheduler/scheduler_config.json", f"none in {root}", fix
    )


def _steps(where: str, scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Table of training steps and parametrization from ``scheduler_config.json``."""
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in _TABLES:
        raise fail(where, "unsupported scheduler", "one of " + ", ".join(_TABLES), repr(kind))
    for name in ("rescale_betas_zero_snr", "use_flow_sigmas"):
        if scheduler.get(name):
            raise fail(where, f"unsupported option of {kind}", f"no {name}", scheduler[name])
    betas = scheduler.get("beta_schedule", "linear")
    check_choice(where, "beta_schedule", betas, tuple(schedules.BETAS))
    old = "sample" if scheduler.get("predict_epsilon") is False else "epsilon"
    prediction = scheduler.get("prediction_type", old)
    check_choice(where, "prediction_type", prediction, tuple(_PREDICTIONS))
    number = functools.partial(_checked, where, scheduler)
    table = {
        "num_train_timesteps": number("num_train_timesteps", int, 1000),
        "beta_schedule": betas,
        "beta_start": number("beta_start", float, 1e-4),
        "beta_end": number("beta_end", float, 0.02),
        "trained_betas": number("trained_betas", tuple[float, ...] | None, None),
    }
    return table, _PREDICTIONS[prediction]


def _ve(where: str, scheduler: Mapping[str, Any]) -> schedules.VE:
    """Schedule of NCSN++ for images in [-1, 1], twice as wide as those it was trained on."""
    kind = scheduler.get("_class_name", "ScoreSdeVeScheduler")
    if kind != "ScoreSdeVeScheduler":
        what = "unsupported scheduler of a network with time_embedding_type 'fourier'"
        raise fail(where, what, "ScoreSdeVeScheduler", repr(kind))
    number = functools.partial(_checked, where, scheduler)
    low, high = number("sigma_min", float, 0.01), number("sigma_max", float, 1348.0)
    return schedules.VE(2 * low, 2 * high)


# --- EDM ----------------------------------------------------------------------------------------

_PRECONDITIONED: dict[str, tuple[Any, tuple[float, float]]] = {
    "edm": ("edm", (0.002, 80.0)),
    "vp": ("eps", (0.001, 152.0)),
    "ve": ("x0", (0.02, 100.0)),
}
"""What the output means, and the noise levels that the network knows."""


def _preconditioning(name: str) -> Any:
    found = re.fullmatch(r"baseline-.*-(vp|ve)", name)
    return found[1] if found else "edm"


def _song_options(where: str, tensors: Tensors) -> dict[str, Any]:
    """Options of our network from the names and shapes of a ``SongUNet``."""
    if "out_conv.weight" in tensors:
        raise fail(where, "unsupported network", "SongUNet", "DhariwalUNet (ADM)")
    first = [name for name in tensors if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name)]
    if len(first) != 1:
        expected = "a tensor enc.<size>x<size>_conv.weight"
        raise fail(where, "not a SongUNet", expected, listed(sorted(tensors)) or "no tensors")
    side = int(first[0].split("x")[1].split("_")[0])

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors:
            raise fail(where, "not a SongUNet", name, listed(sorted(tensors)))
        if tensors[name].ndim != ndim:
            raise fail(where, f"shape of {name}", f"{ndim} axes", tensors[name].shape)
        return tensors[name].shape

    def multiple(size: int, name: str) -> int:
        if size % channels:
            expected = f"a multiple of the {channels} channels of {first[0]}"
            raise fail(where, f"channels of {name}", expected, size)
        return size // channels

    channels, colours = shape(first[0], 4)[:2]
    if not channels:
        raise fail(where, f"shape of {first[0]}", "at least one channel", shape(first[0], 4))
    block = "enc.{0}x{0}_block{1}.conv0.weight"
    sizes, mults = [], []
    while side >> len(sizes) and block.format(side >> len(sizes), 0) in tensors:
        sizes.append(side >> len(sizes))
        name = block.format(sizes[-1], 0)
        mults.append(multiple(shape(name, 4)[0], name))
    blocks = 0
    while block.format(side, blocks) in tensors:
        blocks += 1
    width, features = shape("map_layer0.weight", 2)
    has = lambda part: any(part in name for name in tensors)
    encoders = {"_aux_residual.": "residual", "_aux_skip.": "skip"}
    num_outputs = sum(name.endswith("_aux_conv.weight") for name in tensors)
    return {
        "data_shape": (side, side, colours),
        "channels": channels,
        "channel_mult": tuple(mults),
        "channel_mult_emb": multiple(width, "map_layer0.weight"),
        "channel_mult_noise": multiple(features, "map_layer0.weight"),
        "num_blocks": blocks,
        "attention": tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors),
        "embedding": "fourier" if "map_noise.freqs" in tensors else "positional",
        "encoder": next((kind for part, kind in encoders.items() if has(part)), "standard"),
        "decoder": "skip" if num_outputs > 1 else "standard",
        "resample_filter": _taps(where, tensors),
        "num_classes": shape("map_label.weight", 2)[1] if "map_label.weight" in tensors else 0,
    }


def _taps(where: str, tensors: Tensors) -> tuple[float, ...]:
    """The filter whose outer product with itself all ``resample_filter`` buffers are."""
    filters = {n: t for n, t in tensors.items() if n.endswith(".resample_filter")}
    if not filters:
        return (1.0, 1.0)
    taps = next(iter(filters.values())).sum((0, 1, 2), dtype=np.float64)
    for name, stored in filters.items():
        if stored.shape != (1, 1, taps.size, taps.size) or not np.allclose(
            stored[0, 0], np.outer(taps, taps), atol=1e-6
        ):
            raise fail(where, name, "one separable filter of sum 1 for all layers", stored.tolist())
    smallest = np.abs(taps).min()
    return tuple((taps / smallest).tolist() if smallest else taps.tolist())


def _split_qkv(tensor: np.ndarray) -> np.ndarray:
    """Rows of a channel's query, key and value in turn to all queries, all keys, all values."""
    if len(tensor) % 3:
        return tensor  # `fill` will complain
    return tensor.reshape(-1, 3, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
