"""Networks and batches of the sizes that the cases share."""

from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion import networks

IMAGES = {"smoke": (8, 8, 1), "small": (16, 16, 3), "medium": (32, 32, 3), "large": (64, 64, 3)}
CHANNELS = {"smoke": 8, "small": 32, "medium": 32, "large": 64}
BATCH = {"smoke": 4, "small": 16, "medium": 16, "large": 16}


def unet(size: str) -> networks.Network:
    """A U-Net of the size class; about 0.7 to 1.3 million parameters at small and medium."""
    mult = (1,) if size == "smoke" else (1, 2, 2)
    side = IMAGES[size][0]
    return networks.make(
        "unet",
        data_shape=IMAGES[size],
        channels=CHANNELS[size],
        channel_mult=mult,
        num_blocks=1,
        attention=() if size == "smoke" else (side // 4,),
    )


def inputs(net: networks.Network, batch: int) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters moved off their zero-initialised layers, noisy examples, noise conditioning."""
    key = jax.random.key(0)
    params = jax.tree.map(lambda p: p + 0.01, net.init(key))
    return params, jax.random.normal(key, (batch, *net.data_shape)), jnp.zeros(batch)
