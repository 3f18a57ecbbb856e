"""What a sampler adds to the denoiser calls it makes."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import Case, Variant, jitted
from lowdim_diffusion import linalg, sampling, schedules, solvers
from lowdim_diffusion.distributions import MoLRG

STEPS = 18
SHAPE = {"smoke": (8, 48), "small": (64, 48), "medium": (256, 192), "large": (256, 3072)}


def _overhead(size: str) -> list[Variant]:
    """An almost free denoiser, so that what remains is the sampler itself."""
    schedule = schedules.VE()
    ts = schedules.karras_grid(STEPS)
    shape = SHAPE[size]
    denoise_fn = lambda x, t: x / (1 + t**2)
    levels = schedules.karras_grid(2 * STEPS - 1)[:-1]

    def bare(x: Any) -> Any:
        """As many denoiser calls as Heun makes, and nothing else."""
        body = lambda x, t: (denoise_fn(x, t), None)
        return jax.lax.scan(body, x, levels)[0]

    x = 80 * jax.random.normal(jax.random.key(0), shape)
    variants = [jitted("bare denoiser calls", bare, x, units=2 * STEPS - 1)]
    for solver in _solvers():

        def draw(key: Any, x: Any, solver: Any = solver) -> Any:
            return sampling.sample(key, denoise_fn, schedule, ts, x, solver=solver).x

        nfe = sampling.sample(jax.random.key(0), denoise_fn, schedule, ts, x, solver=solver).nfe
        variants.append(jitted(solver.name, draw, jax.random.key(0), x, units=nfe))
    return variants


def _exact(size: str) -> list[Variant]:
    """Samples per second with the exact denoiser of a mixture of low-rank Gaussians."""
    schedule, shape = schedules.VE(), SHAPE[size]
    ts = schedules.karras_grid(STEPS)
    p = MoLRG(linalg.random_frames(jax.random.key(1), 2, shape[1], 6))
    denoise_fn = p.denoiser(schedule)
    x = 80 * jax.random.normal(jax.random.key(0), shape, jnp.float32)
    variants = []
    for solver in _solvers():

        def draw(key: Any, x: Any, solver: Any = solver) -> Any:
            return sampling.sample(key, denoise_fn, schedule, ts, x, solver=solver).x

        variants.append(jitted(solver.name, draw, jax.random.key(0), x, units=shape[0]))
    return variants


def _solvers() -> list[solvers.Solver]:
    return [
        solvers.heun(),
        solvers.euler(),
        solvers.ddim(),
        solvers.dpmpp_2m(),
        solvers.ancestral(),
    ]


CASES = [
    Case("sampler-overhead", "denoiser call", _overhead, "heun at most 1.7 of the bare calls"),
    Case("sampler-molrg", "sample", _exact),
]
