"""The grid of small trainings behind a phase diagram: one program against the loops people write.

Every variant trains rank-8 low-rank denoisers on 16 points in 48 dimensions, all points at each
step with fresh noise, Adam. The loops keep the frame orthonormal by a QR factorisation in the loss,
as scripts do.
"""

from typing import Any

import jax
import optax

from benchmarks import peers
from benchmarks.harness import Case, Variant
from lowdim_diffusion import linalg, losses, networks, schedules, training

DIM, RANK, COUNT = 48, 8, 16
SIZES = {
    "smoke": (4, 10, 1),
    "small": (64, 200, 1),
    "medium": (256, 1000, 1),
    "large": (2100, 1000, 2),
}
"""Trainings in the sweep, steps, trainings in a loop."""


def _points(key: Any) -> jax.Array:
    frame_key, inner_key = jax.random.split(key)
    basis = linalg.random_frames(frame_key, 1, DIM, RANK)[0]
    return jax.random.normal(inner_key, (COUNT, RANK)) @ basis.T


def _sweep(num_trainings: int, num_steps: int) -> Variant:
    def fit(point: dict[str, Any]) -> jax.Array:
        data_key, fit_key = jax.random.split(jax.random.key(point["seed"]))
        found = training.fit_subspaces(fit_key, _points(data_key), 1, RANK, num_steps=num_steps)
        return found.loss

    call = lambda: training.sweep(
        fit, {"seed": range(num_trainings)}, chunk=num_trainings, batch_size=256
    )
    bars = {"PyTorch loop": 1 / 17, "PyTorch, batched by hand": 1 / 2.6}
    return Variant("training.sweep, compiled each time", call, num_trainings, bars=bars)


def _loop(num_trainings: int, num_steps: int) -> Variant:
    net = networks.make("lowrank", data_shape=(DIM,), rank=RANK)
    loss_fn = losses.make_loss(
        net,
        schedules.VE(),
        parametrization="x0",
        weight=losses.uniform_weight(),
        level=losses.log_uniform(),
    )
    optimizer = optax.adam(3e-2)
    step = jax.jit(training.make_train_step(loss_fn, optimizer))

    def call() -> None:
        for seed in range(num_trainings):
            data_key, init_key, fit_key = jax.random.split(jax.random.key(seed), 3)
            x, state = _points(data_key), training.init_state(net.init(init_key), optimizer)
            for _ in range(num_steps):
                state, _ = step(state, {"x": x}, jax.random.fold_in(fit_key, state.step))
            jax.block_until_ready(state)

    return Variant("Python loop over a jitted step", call, num_trainings, ours=False)


def _torch(many: int, few: int, num_steps: int) -> list[Variant]:
    if not peers.present("torch"):
        return []
    import torch  # pyright: ignore[reportMissingImports]

    def loop() -> None:
        for seed in range(few):
            torch.manual_seed(seed)
            basis = torch.linalg.qr(torch.randn(DIM, RANK))[0]
            x = torch.randn(COUNT, RANK) @ basis.T
            _torch_train(torch.randn(DIM, RANK, requires_grad=True), x, num_steps)

    def batched() -> None:
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(many, DIM, RANK))[0]
        x = torch.randn(many, COUNT, RANK) @ basis.mT
        free = torch.randn(many, DIM, RANK, requires_grad=True)
        _torch_train(free, x, num_steps)

    return [
        Variant("PyTorch loop", loop, few, ours=False),
        Variant("PyTorch, batched by hand", batched, many, ours=False),
    ]


def _torch_train(free: Any, x: Any, num_steps: int) -> None:
    """Train one frame ``[n, d]`` on points ``[N, n]``, or several at once on as many sets."""
    import torch  # pyright: ignore[reportMissingImports]

    optimizer = torch.optim.Adam([free], lr=3e-2)
    for _ in range(num_steps):
        u = torch.linalg.qr(free)[0]
        sigma = torch.exp(torch.empty(*x.shape[:-1], 1).uniform_(-3.0, 1.1))
        noisy = x + sigma * torch.randn_like(x)
        error = (noisy @ u) @ u.mT / (1 + sigma**2) - x
        weight = torch.clamp(sigma**-2, max=25.0)
        loss = (weight * error**2).sum(-1).mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _build(size: str) -> list[Variant]:
    many, num_steps, few = SIZES[size]
    return [_sweep(many, num_steps), _loop(few, num_steps), *_torch(many, few, num_steps)]


CASES = [
    Case(
        "sweep-lowrank",
        "training",
        _build,
        "2,100 trainings of 1,000 steps (size large) in under 60 s on two cores, compile included",
        peers=("torch",),
    )
]
