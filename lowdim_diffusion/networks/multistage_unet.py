"""A U-Net with one encoder and a decoder for each interval of noise levels (see ``_stages``).

Encoder and middle are those of ``unet``; a decoder is that of a U-Net of other ``channels`` on the
same features. Taps: those of the encoder, and ``stage_s.up_l`` and ``stage_s.decoder_l_i``, what
decoder s makes of the examples, whatever their noise level.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import flax.linen as nn

from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import unet
from lowdim_diffusion.networks._network import Network
from lowdim_diffusion.networks._stages import check_stages, from_stages


@dataclass(frozen=True, kw_only=True)
class Config(unet.Config):
    """Options of ``make("multistage_unet", ...)``: those of ``"unet"`` and two more.

    Attributes:
        bounds: ascending noise levels ``sigma / alpha`` between the stages; those of the paper for
            CIFAR-10 by default. A level equal to a bound belongs to the stage above it.
        decoder_channels: channels of each decoder at the first level, low noise first.
    """

    bounds: tuple[float, ...] = (2.5, 7.4)
    decoder_channels: tuple[int, ...] = (48, 32, 4)


class _Encoder(nn.Module):
    config: unet.Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Any:
        return unet.encode(self, self.config, x, c_noise, cond, keys)


class _Decoder(nn.Module):
    config: unet.Config

    @nn.compact
    def __call__(self, encoded: Any, keys: Any = None) -> Array:
        return unet.decode(self, self.config, encoded, keys)


def build(config: Config) -> Network:
    """Return the network."""
    name = "multistage_unet"
    bounds, widths = check_stages(name, config.bounds, "decoder_channels", config.decoder_channels)
    names = [f.name for f in fields(unet.Config)]
    plain = unet.checked_config(unet.Config(**{n: getattr(config, n) for n in names}))
    decoders = [unet.checked_config(replace(plain, channels=width)) for width in widths]
    options = {n: getattr(plain, n) for n in names}
    config = Config(**options, bounds=bounds, decoder_channels=widths)
    return from_stages(name, config, _Encoder(plain), [_Decoder(part) for part in decoders])
