"""Forward passes of the denoisers."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases._nets import BATCH, inputs, unet
from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers import torch_unet
from lowdim_diffusion import networks

DIM = {"smoke": 48, "small": 48, "medium": 192, "large": 1000}


UNET_BARS = {"small": 0.47, "medium": 0.74}
"""16x16 and 32x32, of the time in PyTorch."""


def _forward(name: str, net: networks.Network, batch: int, **options: Any) -> Variant:
    params, x, c_noise = inputs(net, batch)
    apply = lambda p, x, c: net.apply(p, x, c)
    return jitted(name, apply, params, x, jnp.asarray(c_noise), units=batch, **options)


def _images(size: str) -> list[Variant]:
    net, batch = unet(size), BATCH[size]
    shape = net.data_shape
    width = {"smoke": 32, "small": 128, "medium": 192, "large": 384}[size]
    dit = networks.make("dit", data_shape=shape, patch_size=shape[0] // 4, width=width)
    bars = {"unet, torch": UNET_BARS[size]} if size in UNET_BARS else {}
    variants = [_forward("unet", net, batch, bars=bars), _forward("dit", dit, batch)]
    params, x, c_noise = inputs(net, batch)
    model = torch_unet.unet(net, params, x, c_noise)
    if model is None:
        return variants
    import torch  # pyright: ignore[reportMissingImports]

    arguments = torch_unet.arguments(x, c_noise)

    def theirs() -> Any:
        with torch.inference_mode():
            return model(*arguments)

    return [*variants, Variant("unet, torch", theirs, batch, ours=False)]


def _init(size: str) -> list[Variant]:
    """Fresh parameters, in a process without compiled programs, and the compile of one forward."""
    net = unet(size)
    x, c_noise = jnp.zeros((BATCH[size], *net.data_shape)), jnp.zeros(BATCH[size])

    def init() -> Any:
        jax.clear_caches()
        return jax.block_until_ready(net.init(jax.random.key(0)))

    def compiled() -> Any:
        jax.clear_caches()
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        return jax.jit(net.apply).lower(shapes, x, c_noise).compile()

    return [
        Variant("init", init, bars={"compile of the forward pass": 1.0}),
        Variant("compile of the forward pass", compiled),
    ]


def _precision(size: str) -> list[Variant]:
    batch = BATCH[size]
    variants = []
    base = unet(size)
    for dtype in ("float32", "bfloat16"):
        net = networks.make("unet", **{**base.config, "dtype": dtype})
        variants.append(_forward(dtype, net, batch))
    return variants


def _vectors(size: str) -> list[Variant]:
    batch, dim = 256, DIM[size]
    nets = {
        "lowrank": networks.make("lowrank", data_shape=(dim,), num_components=2, rank=6),
        "linear": networks.make("linear", data_shape=(dim,)),
        "mlp": networks.make("mlp", data_shape=(dim,), width=256),
    }
    return [_forward(name, net, batch) for name, net in nets.items()]


CASES = [
    Case("forward-images", "image", _images, peers=("torch",)),
    Case("network-init", "network", _init, most_rounds=3),
    Case("forward-precision", "image", _precision),
    Case("forward-vectors", "vector", _vectors),
]
