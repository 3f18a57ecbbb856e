"""Forward passes of the denoisers."""

import jax.numpy as jnp

from benchmarks.cases._nets import BATCH, inputs, unet
from benchmarks.harness import Case, Variant, jitted
from lowdim_diffusion import networks

DIM = {"smoke": 48, "small": 48, "medium": 192, "large": 1000}


def _images(size: str) -> list[Variant]:
    nets = {"unet": unet(size)}
    shape = nets["unet"].data_shape
    width = {"smoke": 32, "small": 128, "medium": 192, "large": 384}[size]
    nets["dit"] = networks.make("dit", data_shape=shape, patch_size=shape[0] // 4, width=width)
    batch = BATCH[size]
    variants = []
    for name, net in nets.items():
        params, x, c_noise = inputs(net, batch)
        apply = lambda p, x, c, net=net: net.apply(p, x, c)
        variants.append(jitted(name, apply, params, x, c_noise, units=batch))
    return variants


def _precision(size: str) -> list[Variant]:
    batch = BATCH[size]
    variants = []
    base = unet(size)
    for dtype in ("float32", "bfloat16"):
        net = networks.make("unet", **{**base.config, "dtype": dtype})
        params, x, c_noise = inputs(net, batch)
        apply = lambda p, x, c, net=net: net.apply(p, x, c)
        variants.append(jitted(dtype, apply, params, x, c_noise, units=batch))
    return variants


def _vectors(size: str) -> list[Variant]:
    batch, dim = 256, DIM[size]
    nets = {
        "lowrank": networks.make("lowrank", data_shape=(dim,), num_components=2, rank=6),
        "linear": networks.make("linear", data_shape=(dim,)),
        "mlp": networks.make("mlp", data_shape=(dim,), width=256),
    }
    variants = []
    for name, net in nets.items():
        params, x, c_noise = inputs(net, batch)
        apply = lambda p, x, c, net=net: net.apply(p, x, c)
        variants.append(jitted(name, apply, params, x, jnp.asarray(c_noise), units=batch))
    return variants


CASES = [
    Case("forward-images", "image", _images),
    Case("forward-precision", "image", _precision),
    Case("forward-vectors", "vector", _vectors),
]
