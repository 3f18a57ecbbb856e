"""Networks behind a pure pair ``init(key) -> params``, ``apply(params, x, c_noise, cond) -> out``.

==================  ======================================================  ==============
name                what                                                    data
==================  ======================================================  ==============
``lowrank``         the low-rank denoising autoencoder of the theory        any
``linear``          an affine map                                           any
``mlp``             a residual MLP                                          any, flattened
``unet``            a U-Net of the DDPM++ / EDM family                      images, NHWC
``dit``             a diffusion transformer                                 images, NHWC
``multistage_mlp``  an MLP with a decoder per interval of noise levels      any, flattened
``multistage_unet`` a U-Net with a decoder per interval of noise levels     images, NHWC
``diffusers_unet``  the U-Net of Hugging Face diffusers (DDPM, NCSN++)      images, NHWC
``song_unet``       the U-Net of the EDM releases (DDPM++, NCSN++)          images, NHWC
==================  ======================================================  ==============

``c_noise = log(sigma / alpha) / 4`` (Karras et al. 2022, arXiv 2206.00364). A flax module of your
own joins by :func:`from_linen` or :func:`from_nnx`, a released checkpoint by :func:`from_diffusers`
or :func:`from_edm`. Parameters are plain trees of float32 arrays,
and no module class is part of the contract; flax is imported when a network that needs it is made.

Features inside a network are read at named *taps*, ``net.features(..., taps="block_1")``:

==================  ============================================================================
name                taps, in the order of the run
==================  ============================================================================
``lowrank``         ``gated`` ``[b, K, d]``: coordinates in the subspaces, times their weights
``linear``          ``out``: its output
``mlp``             ``hidden_i``: inside block i; ``block_i``: after it; ``last``: before the end
``unet``            ``encoder_l_i``, ``down_l``, ``middle_i``, ``up_l``, ``decoder_l_i``: blocks
``dit``             ``block_i`` ``[b, tokens, width]``: after each block
``multistage_...``  those of encoder and middle; in decoder s ``stage_s.block_0`` and so on
``diffusers_unet``  each ResNet and attention module by its released name
``song_unet``       each block by its released name, ``enc.16x16_block0``
==================  ============================================================================
"""

import importlib
from dataclasses import MISSING, fields
from typing import Any

from lowdim_diffusion._checks import fail
from lowdim_diffusion.networks._network import Network, near
from lowdim_diffusion.networks.adapters import from_linen, from_nnx
from lowdim_diffusion.networks.pretrained import Pretrained, from_diffusers, from_edm
from lowdim_diffusion.networks.weights import Weights, load_weights, save_weights

__all__ = [
    "NAMES",
    "Network",
    "Pretrained",
    "Weights",
    "from_diffusers",
    "from_edm",
    "from_linen",
    "from_nnx",
    "load_weights",
    "make",
    "options",
    "save_weights",
]

NAMES = (
    "diffusers_unet",
    "dit",
    "linear",
    "lowrank",
    "mlp",
    "multistage_mlp",
    "multistage_unet",
    "song_unet",
    "unet",
)


def make(name: str, **config: Any) -> Network:
    """Return the network of this name.

    Args:
        name: one of ``NAMES``.
        **config: its options (see ``options(name)`` and the ``Config`` of the network's module);
            ``data_shape``, the shape of one example, is always needed.

    Raises:
        ValueError: for an unknown name or option (with the nearest known one), or a bad value.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> net = make("mlp", data_shape=(48,), width=32, depth=1)
        >>> params = net.init(jax.random.key(0))
        >>> net.apply(params, jnp.ones((5, 48)), jnp.log(0.1) / 4).shape
        (5, 48)
    """
    module = _load(name)
    known = options(name)
    for key in config:
        if key not in known:
            raise fail(
                f"make({name!r})",
                "unknown option",
                "one of " + ", ".join(known),
                repr(key),
                near(key, known),
            )
    if "data_shape" not in config:
        what, expected = "missing data_shape", "the shape of one example, e.g. (8, 8, 1)"
        raise fail(f"make({name!r})", what, expected, "none")
    return module.build(module.Config(**config))


def options(name: str) -> dict[str, Any]:
    """Return the options of a network with their defaults; ``data_shape``, which has none, is None.

    Examples:
        >>> options("linear")
        {'data_shape': None}
    """
    return {f.name: None if f.default is MISSING else f.default for f in fields(_load(name).Config)}


def _load(name: str) -> Any:
    if name not in NAMES:
        raise fail(
            "make",
            "unknown network",
            "one of " + ", ".join(NAMES),
            repr(name),
            near(name, NAMES),
        )
    return importlib.import_module(f"{__name__}.{name}")
