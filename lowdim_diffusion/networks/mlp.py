r"""A residual MLP on the flattened example, modulated by noise level and class.

.. math:: h \leftarrow h + W_2\,\mathrm{silu}\bigl((1+\gamma)\,W_1\mathrm{norm}(h) + \beta\bigr),
    \qquad (\gamma, \beta) = W_3 e,

with ``e`` the features of noise level and label. The last layer starts at zero.

Taps, all ``[b, width]``: ``hidden_i``, what ``W_2`` of block i reads; ``block_i``, h after block i;
``last``, what the last layer reads.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks._module import from_module
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("mlp", ...)``.

    Attributes:
        data_shape: shape of one example.
        width: features of a layer.
        depth: number of residual blocks, two layers each.
        dropout: rate inside the blocks.
        num_classes: 0 for an unconditional network.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.
    """

    data_shape: tuple[int, ...]
    width: int = 256
    depth: int = 3
    dropout: float = 0.0
    num_classes: int = 0
    dtype: str = "float32"


class _MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        config = self.config
        emb = layers.Embedding(config.width, config.num_classes, name="embedding")
        e = emb(c_noise, cond, x.dtype)
        h = layers.Dense(config.width, name="in")(x.reshape(x.shape[0], -1))
        for i in range(config.depth):
            scale, shift = jnp.split(layers.Dense(2 * config.width, name=f"film_{i}")(e), 2, -1)
            y = layers.Dense(config.width, name=f"first_{i}")(layers.layer_norm(h))
            y = jax.nn.silu(layers.modulate(y, scale, shift))
            layers.tap(self, f"hidden_{i}", y)
            y = layers.dropout(y, config.dropout, keys, i)
            h = h + layers.Dense(config.width, name=f"second_{i}")(y)
            layers.tap(self, f"block_{i}", h)
        y = jax.nn.silu(layers.layer_norm(h))
        layers.tap(self, "last", y)
        return layers.Dense(math.prod(config.data_shape), zero=True, name="out")(y).reshape(x.shape)


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(config, data_shape=check_data_shape("mlp", config.data_shape))
    check_common("mlp", config)
    check_int("mlp", "width", config.width)
    check_int("mlp", "depth", config.depth)
    return from_module("mlp", _MLP(config), config)
