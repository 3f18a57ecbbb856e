r"""An affine network ``out = W x + b`` on the flattened example, the same at every noise level.

Trained as the network inside EDM's preconditioning or on one noise level at a time, it is the
linear denoiser against which the hidden Gaussian structure of trained networks is measured. Its one
tap is ``out``, its output.

References:
    Li, Dai, Qu 2024, "Understanding Generalizability of Diffusion Models Requires Rethinking the
    Hidden Gaussian Structure", arXiv 2410.24060.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from lowdim_diffusion._types import Array, Params
from lowdim_diffusion.networks._network import Network, check_data_shape, check_key, checked


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("linear", ...)``.

    Attributes:
        data_shape: shape of one example.
    """

    data_shape: tuple[int, ...]


def build(config: Config) -> Network:
    """Return the network; it starts at zero."""
    config = replace(config, data_shape=check_data_shape("linear", config.data_shape))
    data_shape = config.data_shape
    dim = math.prod(data_shape)

    def init(key: Any) -> Params:
        check_key("linear.init", key)
        return {"kernel": jnp.zeros((dim, dim)), "bias": jnp.zeros((dim,))}

    def forward(
        params: Params, x: Array, c_noise: Array, cond: Array | None, keys: Array | None
    ) -> Array:
        del c_noise, cond, keys
        flat = x.reshape(x.shape[0], -1)
        out = flat @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)[None]
        return out.reshape(x.shape)

    def collect(*inputs: Any) -> dict[str, Array]:
        return {"out": forward(*inputs)}

    return Network(
        "linear",
        data_shape,
        init,
        checked("linear.apply", data_shape, forward),
        asdict(config),
        taps=("out",),
        collect=checked("linear.features", data_shape, collect),
    )
