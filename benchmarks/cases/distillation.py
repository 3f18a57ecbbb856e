"""The best linear stand-in of a denoiser: least squares in closed form against training it.

The denoiser is the memorizing optimum of 64 digits, as far from linear as a denoiser can be; its
best linear fit on noisy versions of these digits is known, the Wiener filter, so every variant is
named with the error of its weights (relative, mean over the noise levels). The published way is
Adam at batch 256 on inputs divided by sqrt(n), each noise level with the learning rate of 5e-5,
5e-4, .., 5e-1 that suits it; here the best of them, the search not counted.

References:
    Li, Dai, Qu 2024, arXiv 2410.24060, section 3.2 and the released script.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers
from benchmarks.harness import Case, Variant, jitted
from lowdim_diffusion import data, distributions, generalization, schedules

SIZES = {
    "smoke": (2, 20, 4),
    "small": (4, 2000, 64),
    "medium": (10, 10_000, 256),
    "large": (10, 50_000, 1024),
}
"""Noise levels, training steps, noises per digit."""

RATES = (5e-5, 5e-4, 5e-3, 5e-2, 5e-1)
BATCH = 256


def _build(size: str) -> list[Variant]:
    count, num_steps, num_draws = SIZES[size]
    x = jnp.asarray(data.load("digits", num_examples=64, seed=0).floats().reshape(64, -1))
    dim, schedule = x.shape[1], schedules.VE()
    denoise_fn = distributions.Empirical(x).denoiser(schedule)
    sigmas = jnp.asarray(np.geomspace(10, 0.1, count), jnp.float32)
    truth = generalization.wiener_filter(distributions.Gaussian.fit(x), schedule, sigmas).weight
    key = jax.random.key(0)

    def error(weight: Any, truth: Any) -> Any:
        return jnp.linalg.norm(weight - truth) / jnp.linalg.norm(truth)

    def variant(name: str, fn: Any, *args: Any, ours: bool) -> Variant:
        made = jitted(name, fn, *args, units=count, ours=ours)
        mean = float(jax.vmap(error)(made.call(), truth).mean())
        return made._replace(name=f"{name}, error {mean:.3f}")

    def closed(x: Any) -> Any:
        return generalization.distill_linear(
            key, denoise_fn, schedule, sigmas, x, num_draws=num_draws
        ).weight

    def trained(sigma: Any, rate: Any) -> Any:
        optimizer = optax.adam(rate)

        def loss(params: Any, noisy: Any, y: Any) -> Any:
            weight, bias = params
            return jnp.mean((noisy / dim**0.5 @ weight.T + bias[None] - y) ** 2)

        def step(state: Any, i: Any) -> tuple[Any, None]:
            params, opt_state = state
            row_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
            rows = jax.random.randint(row_key, (BATCH,), 0, len(x))
            noisy = x[rows] + sigma * jax.random.normal(noise_key, (BATCH, dim))
            grads = jax.grad(loss)(params, noisy, denoise_fn(noisy, sigma))
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        params = (jnp.zeros((dim, dim)), jnp.zeros(dim))
        start = (params, optimizer.init(params))
        (weight, _), _ = jax.lax.scan(step, start, jnp.arange(num_steps))[0]
        return weight / dim**0.5

    def search(sigma: Any, truth: Any) -> Any:
        rates = jnp.asarray(RATES)
        return rates[
            jnp.argmin(jax.lax.map(lambda rate: error(trained(sigma, rate), truth), rates))
        ]

    rates = jax.jit(lambda: jax.lax.map(lambda level: search(*level), (sigmas, truth)))()
    variants = [
        variant("closed form", closed, x, ours=True),
        variant(
            "Adam",
            lambda rates: jax.lax.map(lambda level: trained(*level), (sigmas, rates)),
            rates,
            ours=False,
        ),
    ]
    return variants + _torch(np.asarray(x), float(sigmas[count // 2]), num_steps)


def _torch(x: np.ndarray, sigma: float, num_steps: int) -> list[Variant]:
    """The script's loop, for one level."""
    if not peers.present("torch"):
        return []
    import torch  # pyright: ignore[reportMissingImports]

    clean, dim = torch.from_numpy(x), x.shape[1]

    def call() -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(dim, dim)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(num_steps):
            rows = clean[torch.randint(len(clean), (BATCH,))]
            noisy = rows + sigma * torch.randn_like(rows)
            with torch.no_grad():
                shares = torch.softmax(-(torch.cdist(noisy, clean) ** 2) / (2 * sigma**2), 1)
                y = shares @ clean
            loss = torch.nn.functional.mse_loss(model(noisy / dim**0.5), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return [Variant("PyTorch script, Adam", call, ours=False)]


CASES = [
    Case(
        "linear-distillation",
        "noise level",
        _build,
        "the closed form is faster than training at no larger error",
        most_rounds=3,
        peers=("torch",),
    )
]
