"""A residual MLP with a decoder for each interval of noise levels (see ``_stages``).

The encoder is ``mlp`` without its last layer; a decoder is a layer to its own width, if that is
another, further blocks and the last layer. Taps: those of the encoder, and ``stage_s.hidden_i``,
``stage_s.block_i`` and ``stage_s.last``, what decoder s makes of the examples, whatever their noise
level.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn

from lowdim_diffusion._checks import check_int
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks import mlp
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape
from lowdim_diffusion.networks._stages import check_stages, from_stages


@dataclass(frozen=True, kw_only=True)
class Config(mlp.Config):
    """Options of ``make("multistage_mlp", ...)``: those of ``"mlp"`` and three more.

    ``width`` and ``depth`` are those of the encoder.

    Attributes:
        bounds: ascending noise levels ``sigma / alpha`` between the stages. A level equal to a
            bound belongs to the stage above it.
        decoder_widths: features of a layer in each decoder, low noise first.
        decoder_depth: residual blocks of a decoder.
    """

    depth: int = 2
    bounds: tuple[float, ...] = (2.5, 7.4)
    decoder_widths: tuple[int, ...] = (384, 256, 32)
    decoder_depth: int = 1


class _Encoder(nn.Module):
    config: mlp.Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Any:
        return mlp.encode(self, self.config, x, c_noise, cond, keys)


class _Decoder(nn.Module):
    config: Config
    width: int

    @nn.compact
    def __call__(self, encoded: Any, keys: Any = None) -> Array:
        config = self.config
        h, e = encoded
        if self.width != config.width:
            h = layers.Dense(self.width, name="in")(h)
        numbers = range(config.depth, config.depth + config.decoder_depth)
        h = mlp.blocks(self, h, e, keys, numbers, config.dropout)
        return mlp.head(self, h, config.data_shape)


def build(config: Config) -> Network:
    """Return the network."""
    name = "multistage_mlp"
    config = replace(config, data_shape=check_data_shape(name, config.data_shape))
    check_common(name, config)
    check_int(name, "width", config.width)
    check_int(name, "depth", config.depth)
    check_int(name, "decoder_depth", config.decoder_depth)
    bounds, widths = check_stages(name, config.bounds, "decoder_widths", config.decoder_widths)
    config = replace(config, bounds=bounds, decoder_widths=widths)
    return from_stages(name, config, _Encoder(config), [_Decoder(config, w) for w in widths])
