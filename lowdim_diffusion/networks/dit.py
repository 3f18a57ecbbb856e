r"""A diffusion transformer (DiT) for images, modulated by noise level and class through AdaLN-zero.

The image is cut into patches, each a token with a fixed sine-cosine position; a block is

.. math::
    h \leftarrow h + g_1\,\mathrm{attention}(\mathrm{mod}_1(\mathrm{norm}\,h)),\qquad
    h \leftarrow h + g_2\,\mathrm{mlp}(\mathrm{mod}_2(\mathrm{norm}\,h)),

where gates ``g`` and the scales and shifts of ``mod`` are linear in the features of noise level and
label and start at zero: a block starts as the identity.

Taps: ``block_i``, h after block i, ``[b, tokens, width]``.

References:
    Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks._module import from_module
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("dit", ...)``.

    Attributes:
        data_shape: ``(height, width, channels)``.
        patch_size: side of a patch; divides height and width.
        width: features of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden features of a block's MLP in multiples of ``width``.
        dropout: rate after attention and inside the MLP.
        num_classes: 0 for an unconditional network.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.
    """

    data_shape: tuple[int, ...]
    patch_size: int = 2
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    num_classes: int = 0
    dtype: str = "float32"


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Return ``[rows * columns, width]``: sines and cosines of row and column, a quarter each."""
    frequencies = 1e4 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


class _Block(nn.Module):
    config: Config
    index: int

    @nn.compact
    def __call__(self, h: Any, e: Any, keys: Any) -> Array:
        config, width = self.config, self.config.width
        modulation = layers.Dense(6 * width, zero=True, name="modulation")(e)
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        y = layers.modulate(layers.layer_norm(h), scale_1, shift_1)
        qkv = jnp.split(layers.Dense(3 * width, name="qkv")(y), 3, axis=-1)
        y = layers.Dense(width, name="mix")(layers.attend(*qkv, num_heads=config.num_heads))
        y = layers.dropout(y, config.dropout, keys, 2 * self.index)
        h = h + gate_1[:, None] * y
        y = layers.modulate(layers.layer_norm(h), scale_2, shift_2)
        y = jax.nn.gelu(layers.Dense(config.mlp_ratio * width, name="first")(y))
        y = layers.dropout(y, config.dropout, keys, 2 * self.index + 1)
        return h + gate_2[:, None] * layers.Dense(width, name="second")(y)


class _DiT(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        config = self.config
        (b, height, width, channels), p = x.shape, config.patch_size
        rows, columns = height // p, width // p
        tokens = x.reshape(b, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
        h = layers.Dense(config.width, name="in")(tokens.reshape(b, rows * columns, -1))
        h = h + jnp.asarray(positions(rows, columns, config.width), h.dtype)[None]
        emb = layers.Embedding(config.width, config.num_classes, name="embedding")
        e = emb(c_noise, cond, x.dtype)
        for i in range(config.depth):
            h = _Block(config, i, name=f"block_{i}")(h, e, keys)
            layers.tap(self, f"block_{i}", h)
        modulation = layers.Dense(2 * config.width, zero=True, name="modulation")(e)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = layers.modulate(layers.layer_norm(h), scale, shift)
        h = layers.Dense(p * p * channels, zero=True, name="out")(h)
        h = h.reshape(b, rows, columns, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return h.reshape(x.shape)


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(config, data_shape=check_data_shape("dit", config.data_shape, 3))
    check_common("dit", config)
    for name in ("patch_size", "width", "depth", "num_heads", "mlp_ratio"):
        check_int("dit", name, getattr(config, name))
    height, width, _ = config.data_shape
    if height % config.patch_size or width % config.patch_size:
        raise fail(
            "dit",
            "patch_size does not divide the image",
            f"a divisor of {height} and {width}",
            config.patch_size,
        )
    if config.width % 4 or config.width % config.num_heads:
        expected = f"a multiple of 4 and of num_heads = {config.num_heads}"
        raise fail("dit", "wrong width", expected, config.width)
    return from_module("dit", _DiT(config), config)
