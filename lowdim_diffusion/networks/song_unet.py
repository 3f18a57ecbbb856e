r"""The U-Nets of the EDM releases, ``SongUNet``: DDPM++ and NCSN++.

Its parameters have the names of the modules of that release, so that
:func:`~lowdim_diffusion.networks.from_edm` can fill it with a checkpoint. A residual block is

.. math::
    h \leftarrow \tfrac{1}{\sqrt 2}\Bigl(S h + \mathrm{conv}\bigl(\mathrm{silu}(\mathrm{norm}(
    \mathrm{conv}(R\,\mathrm{silu}(\mathrm{norm}(h))) + W e))\bigr)\Bigr)

with ``e`` the features of noise level and label, ``R`` nothing or a resampling by
``resample_filter``, and ``S`` the same, with a 1x1 convolution where the channels or the size
change. Self-attention follows the blocks at chosen image sizes and the first block of the middle.

======================  ================  =================
option                  DDPM++            NCSN++
======================  ================  =================
``embedding``           ``"positional"``  ``"fourier"``
``channel_mult_noise``  1                 2
``encoder``             ``"standard"``    ``"residual"``
``resample_filter``     ``(1, 1)``        ``(1, 3, 3, 1)``
======================  ================  =================

With a ``"residual"`` or ``"skip"`` encoder the shrinking image itself joins the features of every
level; a ``"skip"`` decoder adds an image of every level to the output.

Taps, ``[b, h, w, c]`` after each block, have the release's names: ``enc.16x16_block0``, ...

What the network is told of the noise level, and what its output F means, is the ``preconditioning``
it was trained with (``sigma`` is that of ``x_0 + sigma eps``):

========  =======================================  ================================
option    told                                     ``x0_hat``
========  =======================================  ================================
``edm``   ``log(sigma) / 4``                       as ``parametrization="edm"``
``vp``    ``999 t``, of the linear VP schedule     ``x - sigma F``, as ``"eps"``
``ve``    ``log(sigma / 2)``                       ``x + sigma F``, done by ``apply``
========  =======================================  ================================

References:
    Song et al. 2021, arXiv 2011.13456; Karras et al. 2022, arXiv 2206.00364, table 1 and appendix
    F.2.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_int, fail
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks._module import from_module
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape

_WHERE = "song_unet"
_HALF = 0.5**0.5
_BETA_MIN, _BETA_RANGE = 0.1, 19.9
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("song_unet", ...)``; the defaults are the released DDPM++ for CIFAR-10.

    Attributes:
        data_shape: ``(height, width, channels)``, square; the side is a multiple of ``2^(levels -
            1)``.
        channels: channels of the first layer.
        channel_mult: one entry per level: its channels in multiples of ``channels``.
        channel_mult_emb: width of ``e`` in multiples of ``channels``.
        channel_mult_noise: features of the noise level in multiples of ``channels``.
        num_blocks: residual blocks per level of the encoder (the decoder has one more).
        attention: image sizes at which to attend; the middle always does.
        embedding: ``"positional"`` or ``"fourier"``.
        encoder: ``"standard"``, ``"residual"`` or ``"skip"``.
        decoder: ``"standard"`` or ``"skip"``.
        resample_filter: weights of neighbouring pixels in resampling, an even number.
        preconditioning: ``"edm"``, ``"vp"`` or ``"ve"``, see the top of this page.
        dropout: rate inside the blocks.
        num_classes: 0 for an unconditional network.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.
    """

    data_shape: tuple[int, ...]
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    num_blocks: int = 4
    attention: tuple[int, ...] = (16,)
    embedding: str = "positional"
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)
    preconditioning: str = "edm"
    dropout: float = 0.0
    num_classes: int = 0
    dtype: str = "float32"


def _told(config: Config, c_noise: Array) -> Array:
    """What the features of the noise level are made of."""
    if config.preconditioning == "vp":
        growth = jnp.log1p(jnp.exp(8 * c_noise))  # log(1 + sigma^2)
        t = (jnp.sqrt(_BETA_MIN**2 + 2 * _BETA_RANGE * growth) - _BETA_MIN) / _BETA_RANGE
        return 999 * t
    return 4 * c_noise - math.log(2) if config.preconditioning == "ve" else c_noise


def _embedding(config: Config, c_noise: Array, cond: Any, dtype: Any) -> Array:
    """Features of noise level and label."""
    size = config.channels * config.channel_mult_noise
    width = config.channels * config.channel_mult_emb
    c_noise = _told(config, c_noise)
    if config.embedding == "fourier":
        e = layers.Fourier(size // 2, name="map_noise")(c_noise)
    else:
        e = layers.sinusoids(c_noise, size, 1.0, 1e-4)
        e = jnp.roll(e, size // 2, axis=-1)  # sines first
    e = e.astype(dtype)
    if config.num_classes:
        labels = jnp.full(e.shape[:1], config.num_classes) if cond is None else cond
        rows = jax.nn.one_hot(labels, config.num_classes, dtype=dtype)
        e = e + layers.Dense(size, name="map_label")(rows * config.num_classes**0.5)
    e = jax.nn.silu(layers.Dense(width, name="map_layer0")(e))
    return jax.nn.silu(layers.Dense(width, name="map_layer1")(e))


class _UNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        config = self.config
        taps = config.resample_filter
        e = _embedding(config, c_noise, cond, x.dtype)

        def norm(h: Any, name: str) -> Array:
            groups = min(32, h.shape[-1] // 4)
            if not groups or h.shape[-1] % groups:
                expected = "a multiple of 4 and, from 128 on, of 32"
                raise fail(_WHERE, f"channels of {name}", expected, h.shape[-1])
            return layers.GroupNorm(_EPS, groups, name=name)(h)

        def block(h: Any, name: str, out: int, resample: Any = None, attend: bool = False) -> Array:
            y = jax.nn.silu(norm(h, f"{name}.norm0"))
            resampled = resample is not None
            if resampled:
                h, y = resample(h, taps), resample(y, taps)
            y = layers.Conv(out, name=f"{name}.conv0")(y)
            y = y + layers.Dense(out, name=f"{name}.affine")(e)[:, None, None]
            index = zlib.crc32(name.encode()) & 0x7FFFFFFF  # tells the draws of the blocks apart
            y = layers.dropout(jax.nn.silu(norm(y, f"{name}.norm1")), config.dropout, keys, index)
            y = layers.Conv(out, zero=True, name=f"{name}.conv1")(y)
            if resampled or h.shape[-1] != out:
                h = layers.Dense(out, name=f"{name}.skip")(h)
            h = (h + y) * _HALF
            if attend:
                tokens = norm(h, f"{name}.norm2").reshape(h.shape[0], -1, out)
                qkv = jnp.split(layers.Dense(3 * out, name=f"{name}.qkv")(tokens), 3, axis=-1)
                y = layers.attend(*qkv, num_heads=1)
                y = layers.Dense(out, zero=True, name=f"{name}.proj")(y)
                h = (h + y.reshape(h.shape)) * _HALF
            layers.tap(self, name, h)
            return h

        size = config.data_shape[0]
        names = [f"{size >> level}x{size >> level}" for level in range(len(config.channel_mult))]
        attends = [size >> level in config.attention for level in range(len(names))]
        widths = [config.channels * mult for mult in config.channel_mult]

        h = layers.Conv(config.channels, name=f"enc.{names[0]}_conv")(x)
        joined, image = [h], x
        for level, out in enumerate(widths):
            name = f"enc.{names[level]}"
            if level:
                h = block(h, f"{name}_down", h.shape[-1], layers.downsample)
                if config.encoder == "residual":
                    pad = (len(taps) - 1) // 2  # once, before both the convolution and the filter
                    wider = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
                    image = layers.Conv(h.shape[-1], name=f"{name}_aux_residual")(wider)
                    h = image = (h + layers.downsample(image, taps, 0)) * _HALF
                elif config.encoder == "skip":
                    image = layers.downsample(image, taps)
                    h = h + layers.Dense(h.shape[-1], name=f"{name}_aux_skip")(image)
                joined.append(h)
            for i in range(config.num_blocks):
                h = block(h, f"{name}_block{i}", out, attend=attends[level])
                joined.append(h)

        image: Any = None
        for level in reversed(range(len(widths))):
            name, out = f"dec.{names[level]}", widths[level]
            if level == len(widths) - 1:
                h = block(h, f"{name}_in0", out, attend=True)
                h = block(h, f"{name}_in1", out)
            else:
                h = block(h, f"{name}_up", h.shape[-1], layers.upsample)
            for i in range(config.num_blocks + 1):
                h = jnp.concatenate([h, joined.pop()], axis=-1)
                attend = attends[level] and i == config.num_blocks
                h = block(h, f"{name}_block{i}", out, attend=attend)
            if config.decoder == "skip" or level == 0:
                y = jax.nn.silu(norm(h, f"{name}_aux_norm"))
                y = layers.Conv(x.shape[-1], zero=True, name=f"{name}_aux_conv")(y)
                image = y if image is None else layers.upsample(image, taps) + y
        if config.preconditioning == "ve":
            return x + jnp.exp(4 * c_noise)[:, None, None, None].astype(x.dtype) * image
        return image


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(
        config,
        data_shape=check_data_shape(_WHERE, config.data_shape, 3),
        channel_mult=tuple(config.channel_mult),
        attention=tuple(config.attention),
        resample_filter=tuple(config.resample_filter),
    )
    check_common(_WHERE, config)
    for name in ("channels", "channel_mult_emb", "channel_mult_noise", "num_blocks"):
        check_int(_WHERE, name, getattr(config, name))
    if not config.channel_mult:
        raise fail(_WHERE, "empty channel_mult", "one entry per level", config.channel_mult)
    for mult in config.channel_mult:
        check_int(_WHERE, "channel_mult entry", mult)
    check_choice(_WHERE, "embedding", config.embedding, ("positional", "fourier"))
    check_choice(_WHERE, "encoder", config.encoder, ("standard", "residual", "skip"))
    check_choice(_WHERE, "decoder", config.decoder, ("standard", "skip"))
    check_choice(_WHERE, "preconditioning", config.preconditioning, ("edm", "vp", "ve"))
    if len(config.resample_filter) % 2 or not sum(config.resample_filter) > 0:
        expected = "an even number of weights with a positive sum"
        raise fail(_WHERE, "resample_filter", expected, config.resample_filter)
    height, width, _ = config.data_shape
    multiple = 2 ** (len(config.channel_mult) - 1)
    if height != width or height % multiple:
        levels = len(config.channel_mult)
        expected = f"a square, its side a multiple of {multiple} as there are {levels} levels"
        raise fail(_WHERE, "image size", expected, (height, width))
    sizes = [height >> level for level in range(len(config.channel_mult))]
    for size in config.attention:
        if size not in sizes:
            expected = "sizes among " + ", ".join(map(str, sizes))
            raise fail(_WHERE, "attention at a size that no level has", expected, size)
    net = from_module(_WHERE, _UNet(config), config)
    return replace(net, input_scale="clean") if config.preconditioning == "ve" else net
