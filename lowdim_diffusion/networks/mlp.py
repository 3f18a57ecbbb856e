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


def encode(parent: nn.Module, config: Config, x: Any, c_noise: Any, cond: Any, keys: Any) -> Any:
    """Return the features after the blocks and ``e``; layers become ``parent``'s."""
    emb = layers.Embedding(config.width, config.num_classes, name="embedding")
    e = emb(c_noise, cond, x.dtype)
    h = layers.Dense(config.width, name="in")(x.reshape(x.shape[0], -1))
    return blocks(parent, h, e, keys, range(config.depth), config.dropout), e


def blocks(parent: nn.Module, h: Any, e: Any, keys: Any, numbers: range, dropout: float) -> Array:
    """Return ``h`` after the residual blocks of these numbers, all as wide as ``h``."""
    width = h.shape[-1]
    for i in numbers:
        scale, shift = jnp.split(layers.Dense(2 * width, name=f"film_{i}")(e), 2, -1)
        y = layers.Dense(width, name=f"first_{i}")(layers.layer_norm(h))
        y = jax.nn.silu(layers.modulate(y, scale, shift))
        layers.tap(parent, f"hidden_{i}", y)
        y = layers.dropout(y, dropout, keys, i)
        h = h + layers.Dense(width, name=f"second_{i}")(y)
        layers.tap(parent, f"block_{i}", h)
    return h


def head(parent: nn.Module, h: Any, data_shape: tuple[int, ...]) -> Array:
    """Return the output ``[b, *data_shape]``."""
    y = jax.nn.silu(layers.layer_norm(h))
    layers.tap(parent, "last", y)
    y = layers.Dense(math.prod(data_shape), zero=True, name="out")(y)
    return y.reshape(h.shape[0], *data_shape)


class _MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        h, _ = encode(self, self.config, x, c_noise, cond, keys)
        return head(self, h, self.config.data_shape)


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(config, data_shape=check_data_shape("mlp", config.data_shape))
    check_common("mlp", config)
    check_int("mlp", "width", config.width)
    check_int("mlp", "depth", config.depth)
    return from_module("mlp", _MLP(config), config)
