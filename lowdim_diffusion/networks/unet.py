r"""A U-Net of the DDPM++ / EDM family for images.

An encoder halves the resolution between levels, a decoder doubles it back and joins the encoder's
features. A residual block is

.. math::
    h \leftarrow \tfrac{1}{\sqrt 2}\Bigl(S h + \mathrm{conv}\bigl(\mathrm{silu}(\mathrm{FiLM}_e(
    \mathrm{norm}(\mathrm{conv}(R\,\mathrm{silu}(\mathrm{norm}(h))))))\bigr)\Bigr)

with ``e`` the features of noise level and label, ``R`` nothing, a 2x2 mean or a nearest-neighbour
doubling, and ``S`` the same resampling, with a 1x1 convolution where the channels change.
Self-attention follows the blocks at chosen image sizes. The last layer of every branch, and of the
network, starts at zero.

An image whose sides are no multiple of ``2^(levels - 1)`` is padded by its edge pixels (split
between both sides) to the next multiple, and the output is cropped. So 28x28 with three levels runs
as 28, 14, 7; with four levels it would run as 32, 16, 8, 4.

Taps, ``[b, h, w, c]`` after each block: ``encoder_l_i``, ``down_l``, ``middle_0``, ``middle_1``,
``up_l`` and ``decoder_l_i`` for level l, 0 the finest.

References:
    Song et al. 2021, arXiv 2011.13456 (DDPM++); Karras et al. 2022, arXiv 2206.00364, appendix F.2.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks._module import from_module
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape

_HALF = 0.5**0.5


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("unet", ...)``.

    Attributes:
        data_shape: ``(height, width, channels)``.
        channels: channels of the first level.
        channel_mult: one entry per level: its channels in multiples of ``channels``.
        num_blocks: residual blocks per level of the encoder (the decoder has one more).
        attention: image heights, after padding, at which to attend; None is the last level only,
            ``()`` nowhere.
        num_heads: attention heads.
        dropout: rate inside the blocks.
        num_classes: 0 for an unconditional network.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.
    """

    data_shape: tuple[int, ...]
    channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2)
    num_blocks: int = 1
    attention: tuple[int, ...] | None = None
    num_heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0
    dtype: str = "float32"

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width at the first level."""
        multiple = 2 ** (len(self.channel_mult) - 1)
        return (
            -(-self.data_shape[0] // multiple) * multiple,
            -(-self.data_shape[1] // multiple) * multiple,
        )

    @property
    def margins(self) -> tuple[int, int]:
        """Rows above and columns left of the image that are padding."""
        return (
            (self.padded[0] - self.data_shape[0]) // 2,
            (self.padded[1] - self.data_shape[1]) // 2,
        )

    @property
    def heights(self) -> tuple[int, ...]:
        """Image height at each level."""
        return tuple(self.padded[0] // 2**level for level in range(len(self.channel_mult)))

    @property
    def attended(self) -> tuple[int, ...]:
        """Image heights at which to attend."""
        return self.heights[-1:] if self.attention is None else self.attention


class _Block(nn.Module):
    """Residual block, maybe resampling, maybe followed by attention."""

    channels: int
    dropout: float
    index: int
    resample: str = ""
    num_heads: int = 0

    @nn.compact
    def __call__(self, x: Any, e: Any, keys: Any) -> Array:
        h = _resample(jax.nn.silu(layers.GroupNorm(name="norm_0")(x)), self.resample)
        h = layers.Conv(self.channels, name="conv_0")(h)
        scale, shift = jnp.split(layers.Dense(2 * self.channels, name="film")(e), 2, axis=-1)
        h = jax.nn.silu(layers.GroupNorm(name="norm_1")(h, (scale, shift)))
        h = layers.dropout(h, self.dropout, keys, self.index)
        h = layers.Conv(self.channels, zero=True, name="conv_1")(h)
        x = _resample(x, self.resample)
        if x.shape[-1] != self.channels:
            x = layers.Dense(self.channels, name="skip")(x)
        x = (x + h) * _HALF
        if self.num_heads:
            tokens = layers.GroupNorm(name="norm_2")(x)
            tokens = tokens.reshape(x.shape[0], -1, self.channels)
            qkv = jnp.split(layers.Dense(3 * self.channels, name="qkv")(tokens), 3, axis=-1)
            h = layers.attend(*qkv, num_heads=self.num_heads)
            h = layers.Dense(self.channels, zero=True, name="mix")(h)
            x = (x + h.reshape(x.shape)) * _HALF
        return x


def _resample(x: Array, how: str) -> Array:
    b, h, w, c = x.shape
    if how == "down":
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    if how == "up":
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return x.reshape(b, 2 * h, 2 * w, c)
    return x


def encode(parent: nn.Module, config: Config, x: Any, c_noise: Any, cond: Any, keys: Any) -> Any:
    """Return what a decoder reads: features, the skips and ``e``; layers become ``parent``'s."""
    height, width, _ = config.data_shape
    top, left = config.margins
    below, right = config.padded[0] - height - top, config.padded[1] - width - left
    if below or right:
        x = jnp.pad(x, ((0, 0), (top, below), (left, right), (0, 0)), mode="edge")
    emb = layers.Embedding(4 * config.channels, config.num_classes, name="embedding")
    e = emb(c_noise, cond, x.dtype)
    block = _blocks(parent, config, e, keys)
    last = len(config.channel_mult) - 1
    h = layers.Conv(config.channels * config.channel_mult[0], name="in")(x)
    skips = [h]
    for level in range(last + 1):
        if level:
            h = block(h, f"down_{level}", level, resample="down")
            skips.append(h)
        for i in range(config.num_blocks):
            h = block(h, f"encoder_{level}_{i}", level, attend=True)
            skips.append(h)
    h = block(h, "middle_0", last, attend=True)
    return block(h, "middle_1", last), skips, e


def decode(parent: nn.Module, config: Config, encoded: Any, keys: Any) -> Array:
    """Return the output for what :func:`encode` found, maybe with other ``channels``."""
    h, skips, e = encoded
    height, width, channels_out = config.data_shape
    top, left = config.margins
    skips = list(skips)
    block = _blocks(parent, config, e, keys, done=len(skips) + 1)
    last = len(config.channel_mult) - 1
    for level in reversed(range(last + 1)):
        if level != last:
            h = block(h, f"up_{level}", level, resample="up")
        for i in range(config.num_blocks + 1):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = block(h, f"decoder_{level}_{i}", level, attend=i == config.num_blocks)
    h = jax.nn.silu(layers.GroupNorm(name="norm")(h))
    h = layers.Conv(channels_out, zero=True, name="out")(h)
    return h[:, top : top + height, left : left + width]


def _blocks(parent: nn.Module, config: Config, e: Any, keys: Any, done: int = 0) -> Any:
    """Return ``(h, name, level) -> h``, the next block; ``done`` blocks came before."""
    count = done

    def block(h: Any, name: str, level: int, resample: str = "", attend: bool = False) -> Any:
        nonlocal count
        count += 1
        attend = attend and config.heights[level] in config.attended
        h = _Block(
            channels=config.channels * config.channel_mult[level],
            dropout=config.dropout,
            index=count,
            resample=resample,
            num_heads=config.num_heads if attend else 0,
            name=name,
        )(h, e, keys)
        layers.tap(parent, name, h)
        return h

    return block


class _UNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        return decode(self, self.config, encode(self, self.config, x, c_noise, cond, keys), keys)


def checked_config(config: Config) -> Config:
    """Return the options, sequences as tuples; raise for those that do not fit."""
    data_shape = check_data_shape("unet", config.data_shape, 3)
    config = replace(config, data_shape=data_shape, channel_mult=tuple(config.channel_mult))
    check_common("unet", config)
    check_int("unet", "channels", config.channels)
    check_int("unet", "num_blocks", config.num_blocks)
    check_int("unet", "num_heads", config.num_heads)
    if not config.channel_mult:
        raise fail("unet", "empty channel_mult", "one entry per level", config.channel_mult)
    for mult in config.channel_mult:
        check_int("unet", "channel_mult entry", mult)
    if config.attention is not None:
        attention = tuple(config.attention)
        config = replace(config, attention=attention)
        for size in attention:
            if size not in config.heights:
                expected = "heights among " + ", ".join(map(str, config.heights))
                raise fail("unet", "attention at a size that no level has", expected, size)
    for level, mult in enumerate(config.channel_mult):
        if config.heights[level] in config.attended and config.channels * mult % config.num_heads:
            raise fail(
                "unet",
                f"num_heads does not divide the channels of level {level}",
                f"a divisor of {config.channels * mult}",
                config.num_heads,
            )
    return config


def build(config: Config) -> Network:
    """Return the network."""
    config = checked_config(config)
    return from_module("unet", _UNet(config), config)
