"""Ten leading singular triplets of a U-Net's Jacobian by block Krylov iteration, and by others.

- the whole Jacobian, and its singular value decomposition;
- the power method as published with LOCO (Chen et al. 2024, arXiv 2409.02374, algorithm 1): as many
  vectors as triplets, stopped when no entry of V changes by more than 1e-4 (signs aligned), after
  10 iterations at least and 50 at most; and the same with just as many iterations as its values
  need to come within 1e-3 of the dense ones, which nobody knows beforehand;
- the whole Jacobian and the published method in PyTorch (torch.func) on the same network, where
  torch and diffusers are installed.

Every variant's singular values are compared with the dense ones when the case is made; those of
ours within 1e-3, or the case fails. What the published rule reaches is in the variant's name.

The network's weights are random, and its spectrum is flat: at n = 3072 the tenth value was .89 of
the first with one set of weights. That is the hard case for every iteration; a trained denoiser's
values fall faster at all but the lowest noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers import unets
from lowdim_diffusion import denoisers, schedules, subspaces

RANK = 10
TOLERANCE = 1e-3
SHAPES = {"smoke": (8, 8, 1), "small": (8, 8, 3), "medium": (16, 16, 3), "large": (32, 32, 3)}
"""n = 64, 192, 768, 3072."""
CHANNELS = 16
MAX_POWER = 400
T: Any = 500.0


class _Power(NamedTuple):
    """State of the published power method."""

    num_iters: Any
    v: Any
    s: Any
    change: Any


def _published(fn: Any, x: Any, key: Any, true: Any = None) -> _Power:
    """Algorithm 1 of the paper with the constants of its code, or until within 1e-3 of ``true``."""
    _, push = jax.linearize(fn, x)
    pull = jax.linear_transpose(push, x)
    columns = lambda product: lambda v: jax.vmap(product, in_axes=-1, out_axes=-1)(v)
    forward = columns(lambda v: push(v.reshape(x.shape)).reshape(-1))
    backward = columns(lambda v: pull(v.reshape(x.shape))[0].reshape(-1))

    def step(at: _Power) -> _Power:
        new, squared, _ = jnp.linalg.svd(backward(forward(at.v)), full_matrices=False)
        new = new * jnp.sign(jnp.sum(new * at.v, axis=0))[None]
        return _Power(at.num_iters + 1, new, jnp.sqrt(squared), jnp.abs(new - at.v).max())

    def going(at: _Power) -> Any:
        if true is None:
            return (at.num_iters < 10) | ((at.num_iters < 50) & (at.change > 1e-4))
        return (at.num_iters < MAX_POWER) & (jnp.abs(at.s / true - 1).max() > TOLERANCE)

    v = jnp.linalg.qr(jax.random.normal(key, (x.size, RANK)))[0]
    start = _Power(jnp.asarray(0), v, jnp.zeros(RANK), jnp.asarray(jnp.inf))
    return jax.lax.while_loop(going, step, start)


def _build(size: str) -> list[Variant]:
    model = unets.torch_model(SHAPES[size], CHANNELS, forward_mode=True)
    net, params = unets.network(SHAPES[size], CHANNELS, model)
    schedule = schedules.Discrete.from_betas(schedules.beta_table("linear"))
    key = jax.random.key(2)
    x = jax.random.normal(key, (1, *SHAPES[size]))

    def denoise(x: Any) -> Any:
        return denoisers.from_network(net, params, schedule, parametrization="eps", data_std=1.0)(
            x, T
        )

    ours = lambda x: subspaces.jacobian_svd(denoise, x, RANK, key=key, tol=5e-3)[1]
    dense = lambda x: subspaces.jacobian_spectrum(denoise, x)[:, :RANK]
    most = 0.02 if size == "large" else 0.2
    bars = {"whole Jacobian": most, "torch, whole Jacobian": most}
    variants = [
        jitted("jacobian_svd, tol 5e-3", ours, x, bars=bars),
        jitted("whole Jacobian", dense, x),
    ]
    true = np.asarray(variants[1].call())[0]
    off = np.abs(np.asarray(variants[0].call())[0] / true - 1).max()
    if not off < TOLERANCE:
        raise RuntimeError(f"jacobian_svd is off by {off:.1e}, more than {TOLERANCE:g}")
    for known in (None, true):
        method = lambda x, known=known: _published(denoise, x, key, known)
        power = jitted("", method, x, ours=False)
        found = power.call()
        error = np.abs(np.asarray(found.s) / true - 1).max()
        name = f"power method, {int(found.num_iters)} its, off {error:.0e}"
        variants.append(power._replace(name=name))
    return variants + ([] if model is None else _torch(model, schedule, x, denoise(x)))


def _torch(model: Any, schedule: Any, x: Any, y: Any) -> list[Variant]:
    import torch  # pyright: ignore[reportMissingImports]

    alpha, sigma = float(schedule.alpha(T)), float(schedule.sigma(T))
    point = unets.to_torch(x)
    model.requires_grad_(False)

    def fn(flat: Any) -> Any:
        image = flat.reshape(point.shape)
        eps = model(image, torch.tensor(T - 1)).sample
        return ((image - sigma * eps) / alpha).reshape(-1)

    flat = point.reshape(-1)

    def dense() -> Any:
        jacobian = torch.func.jacrev(fn, chunk_size=64)(flat)
        return torch.linalg.svdvals(jacobian)[:RANK]

    def power() -> Any:
        torch.manual_seed(0)
        v = torch.linalg.qr(torch.randn(flat.numel(), RANK))[0]
        rows = lambda product: lambda v: torch.func.vmap(product)(v.T.contiguous()).T
        push = rows(lambda w: torch.func.jvp(fn, (flat,), (w,))[1])
        pull_one = torch.func.vjp(fn, flat)[1]
        pull = rows(lambda w: pull_one(w)[0])
        for i in range(50):
            new, squared, _ = torch.linalg.svd(pull(push(v)), full_matrices=False)
            new = new * torch.sign((new * v).sum(0))
            change, v = (new - v).abs().max(), new
            if i >= 9 and change < 1e-4:
                break
        return squared.sqrt()

    unets.check_agreement("the torch network", fn(flat).reshape(point.shape), y, 1e-4)
    return [
        Variant("torch, whole Jacobian", dense, ours=False),
        Variant("torch, power method", power, ours=False),
    ]


CASES = [
    Case(
        "jacobian-top10",
        "example",
        _build,
        "within 1e-3 of the dense values",
        most_rounds=3,
        peers=("torch", "diffusers"),
    )
]
