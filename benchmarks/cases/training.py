"""The training step alone, inside a scan, inside the trainer's loop, and as PyTorch scripts do."""

from typing import Any

import jax
import optax

from benchmarks import peers
from benchmarks.cases._nets import BATCH, inputs, unet
from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers import torch_unet
from benchmarks.peers import training as peers_training
from lowdim_diffusion import losses, networks, schedules, sharding, training

BARS = {"one jitted step": 1.05}
TORCH = "PyTorch step"
UNET_BARS = {"medium": 0.80}
"""32x32, of the time in PyTorch."""
LOWRANK_BARS = {"small": 0.15, "medium": 0.28, "large": 0.47}
DIMS = {"smoke": 48, "small": 48, "medium": 192, "large": 1000}
STEPS = {"smoke": 2, "small": 4, "medium": 4, "large": 2}


def _step(net: networks.Network, axis_name: str | None = None) -> tuple[Any, Any]:
    """A training step as users run it, with Adam and an average, and its first state."""
    loss_fn = losses.make_loss(net, schedules.VE())
    optimizer, decay = optax.adam(1e-4), training.ema.classic(0.999)
    step = training.make_train_step(loss_fn, optimizer, ema=decay, axis_name=axis_name)
    return step, training.init_state(net.init(jax.random.key(0)), optimizer, ema=decay)


def _variants(
    net: networks.Network, batch_size: int, count: int, most_of_torch: float | None
) -> list[Variant]:
    step, state = _step(net)
    key = jax.random.key(1)
    x = jax.random.normal(key, (batch_size, *net.data_shape))

    def one(state: Any, x: Any, key: Any) -> Any:
        return step(state, {"x": x}, key)

    def scanned(state: Any, x: Any, key: Any) -> Any:
        body = lambda state, i: step(state, {"x": x}, jax.random.fold_in(key, i))
        return jax.lax.scan(body, state, jax.numpy.arange(count))

    bars = BARS | ({TORCH: most_of_torch} if most_of_torch else {})
    variants = [
        jitted("one jitted step", one, state, x, key),
        jitted(f"scan of {count}", scanned, state, x, key, units=count, bars=bars),
    ]
    return [*variants, _loop(net, batch_size, count, x)]


def _loop(net: networks.Network, batch_size: int, count: int, x: Any) -> Variant:
    """The trainer's loop: batches drawn on the device, the number of steps an argument."""
    mesh = sharding.data_mesh(1)
    step, state = _step(net, sharding.AXIS)
    state = sharding.replicate(state, mesh)
    key = sharding.replicate(jax.random.key(2), mesh)
    arrays = sharding.replicate(x, mesh)
    examples = lambda arrays, key, step, index: {"x": arrays[index], "index": index}
    loop = training.compile_loop(step, examples, batch_size, mesh, state, arrays)
    held = [state]

    def call() -> None:
        held[0] = loop(held[0], arrays, key, count).state

    return Variant("trainer's loop", call, count, bars=BARS)


def _unet(size: str) -> list[Variant]:
    net, batch = unet(size), BATCH[size]
    variants = _variants(net, batch, STEPS[size], UNET_BARS.get(size))
    model = torch_unet.unet(net, *inputs(net, batch))
    if model is None:
        return variants
    x = torch_unet.arguments(jax.random.normal(jax.random.key(1), (batch, *net.data_shape)), 0.0)[0]
    return [*variants, Variant(TORCH, peers_training.unet_step(model, x), ours=False)]


def _lowrank(size: str) -> list[Variant]:
    dim, batch = DIMS[size], 256
    net = networks.make("lowrank", data_shape=(dim,), num_components=2, rank=6)
    variants = _variants(net, batch, 100, LOWRANK_BARS.get(size))
    if not peers.present("torch"):
        return variants
    import torch  # pyright: ignore[reportMissingImports]

    step = peers_training.lowrank_step(torch.randn(2, dim, 6), torch.randn(batch, dim))
    return [*variants, Variant(TORCH, step, ours=False)]


CASES = [
    Case("train-step-unet", "step", _unet, peers=("torch",)),
    Case("train-step-lowrank", "step", _lowrank, peers=("torch",)),
]
