"""One U-Net in two frameworks: diffusers' ``UNet2DModel`` in torch, and its weights in ours."""

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from lowdim_diffusion import networks

WEIGHTS = 0.15
"""Standard deviation of what is added to the initial weights, so that no layer is idle."""


def config(channels: int) -> dict[str, Any]:
    """Return the options that both constructors take."""
    return {
        "block_out_channels": (channels, 2 * channels),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }


def torch_model(shape: tuple[int, int, int], channels: int, *, forward_mode: bool = False) -> Any:
    """Return the network in torch, or None where torch and diffusers are not installed.

    Args:
        shape: ``(height, width, channels)`` of the images.
        channels: width of the first level.
        forward_mode: replace what has no ``torch.func.jvp`` (fused attention).
    """
    if not peers.present("torch", "diffusers"):
        return None
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from diffusers.models import attention_processor  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in config(channels).items()}
    model = diffusers.UNet2DModel(
        sample_size=shape[0], in_channels=shape[2], out_channels=shape[2], **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += WEIGHTS * torch.randn(parameter.shape)
    for module in model.modules() if forward_mode else ():
        if isinstance(module, attention_processor.Attention):
            module.set_processor(attention_processor.AttnProcessor())
        if isinstance(module, torch.nn.GroupNorm):  # its rule for vmap wants one piece of memory
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.eval()


def network(shape: tuple[int, int, int], channels: int, model: Any) -> tuple[networks.Network, Any]:
    """Return the network and its parameters: those of ``model``, or random ones without it."""
    if model is None:
        net = networks.make("diffusers_unet", data_shape=shape, **config(channels))
        leaves, tree = jax.tree.flatten(net.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [
            a + WEIGHTS * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)
        ]
        return net, jax.tree.unflatten(tree, moved)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = networks.from_diffusers(pathlib.Path(folder), scheduler={})
    return found.net, found.params


def to_torch(a: Any) -> Any:
    """Return images ``[b, h, w, c]`` as a torch tensor ``[b, c, h, w]``."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.tensor(np.moveaxis(np.asarray(a), -1, 1))


def check_agreement(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
    """Raise unless a torch result ``[b, c, h, w]`` equals ours, relative to the largest entry."""
    check_close(what, np.moveaxis(theirs.numpy(), 1, -1), ours, tolerance)


def check_close(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
    """Raise unless two arrays are equal, relative to the largest entry."""
    a, b = np.asarray(theirs), np.asarray(ours)
    off = float(np.abs(a - b).max() / np.abs(b).max())
    if not off < tolerance:
        raise RuntimeError(f"{what} computes something else: off by {off:.1e}")
