"""What a sampler adds to the denoiser calls it makes, and whole runs beside torch's loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases._nets import BATCH, CHANNELS, IMAGES
from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers import samplers as peers
from benchmarks.peers import unets
from lowdim_diffusion import denoisers, linalg, sampling, schedules, solvers
from lowdim_diffusion.distributions import MoLRG

STEPS = 18
BETAS = schedules.beta_table("linear")
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


def _unet(size: str) -> tuple[Any, Any, Any, jax.Array]:
    """A U-Net in torch (or None), as a denoiser of ours, its schedule and starts."""
    shape, channels = IMAGES[size], CHANNELS[size]
    model = unets.torch_model(shape, channels)
    net, params = unets.network(shape, channels, model)
    schedule = schedules.Discrete.from_betas(BETAS)
    denoise_fn = denoisers.from_network(net, params, schedule, parametrization="eps", data_std=1.0)
    x = jax.random.normal(jax.random.key(0), (BATCH[size], *shape))
    return model, denoise_fn, schedule, x


def _ours(denoise_fn: Any, schedule: Any, ts: Any, x: Any, solver: Any) -> Variant:
    run = lambda x: sampling.sample(jax.random.key(0), denoise_fn, schedule, ts, x, solver=solver).x
    return jitted(f"{solver.name}, {len(ts) - 1} steps", run, x, units=x.shape[0])


def _calls(denoise_fn: Any, ts: Any, nfe: int, x: Any) -> Variant:
    """As many calls of the denoiser, and nothing else."""
    levels = jnp.asarray(np.resize(ts[:-1], nfe), x.dtype)

    def run(x: Any) -> Any:
        return jax.lax.scan(lambda x, t: (denoise_fn(x, t), None), x, levels)[0]

    return jitted(f"{nfe} bare calls", run, x, units=x.shape[0])


def _theirs(name: str, ours: Variant, x: Any, sample: Any) -> Variant:
    import torch  # pyright: ignore[reportMissingImports]

    start = unets.to_torch(x)

    def call() -> Any:
        with torch.inference_mode():
            return sample(start)

    unets.check_agreement(name, call(), ours.call(), 5e-3)
    return Variant(name, call, ours.units)


def _heun_18(size: str) -> list[Variant]:
    """EDM's sampler."""
    model, denoise_fn, schedule, x = _unet(size)
    sigmas = np.asarray(schedules.karras_grid(18, 0.02, 80.0), np.float64)
    ts = np.asarray(schedules.times_from_sigmas(schedule, sigmas), np.float64)
    alpha = float(schedule.alpha(ts[0]))
    ours = _ours(denoise_fn, schedule, ts, x, solvers.heun())
    variants = [ours, _calls(denoise_fn, ts, 35, x)]
    if model is None:
        return variants
    denoise = peers.denoiser(model, BETAS)
    theirs = lambda x: peers.edm_heun(denoise, x / alpha, sigmas)
    return [*variants, _theirs("torch, EDM's loop", ours, x, theirs)]


def _dpmpp_20(size: str) -> list[Variant]:
    """DPM-Solver++(2M)."""
    model, denoise_fn, schedule, x = _unet(size)
    # Twenty of diffusers' evenly spaced steps; its first one is 999, counted from 0.
    ts = np.append(np.linspace(0, 999, 21).round()[:0:-1] + 1, 0.0)
    ours = _ours(denoise_fn, schedule, ts, x, solvers.dpmpp_2m())
    variants = [ours, _calls(denoise_fn, ts, 20, x)]
    if model is None:
        return variants
    scheduler = peers.diffusers_scheduler("DPMSolverMultistepScheduler", BETAS)
    loop = lambda x: peers.diffusers_loop(model, scheduler, x, 20)
    variants.append(_theirs("torch, diffusers", ours, x, loop))
    if peers.has_k_diffusion():
        levels = np.asarray(schedules.noise_levels(schedule, ts[:-1]), np.float64)
        sigmas, denoise = np.append(levels, 0.0), peers.denoiser(model, BETAS)
        alpha = float(schedule.alpha(ts[0]))
        theirs = lambda x: peers.k_diffusion_2m(denoise, x / alpha, sigmas)
        variants.append(_theirs("torch, k-diffusion", ours, x, theirs))
    return variants


def _ddim_50(size: str) -> list[Variant]:
    """DDIM."""
    model, denoise_fn, schedule, x = _unet(size)
    ts = np.append(np.arange(980, -1, -20) + 1.0, 0.0)
    ours = _ours(denoise_fn, schedule, ts, x, solvers.ddim())
    variants = [ours, _calls(denoise_fn, ts, 50, x)]
    if model is None:
        return variants
    scheduler = peers.diffusers_scheduler("DDIMScheduler", BETAS)
    loop = lambda x: peers.diffusers_loop(model, scheduler, x, 50)
    return [*variants, _theirs("torch, diffusers", ours, x, loop)]


CASES = [
    Case("sampler-overhead", "denoiser call", _overhead, "heun at most 1.7 of the bare calls"),
    Case("sampler-molrg", "sample", _exact),
    Case("sampler-heun-18", "sample", _heun_18, most_rounds=5),
    Case("sampler-dpmpp-20", "sample", _dpmpp_20, most_rounds=5),
    Case("sampler-ddim-50", "sample", _ddim_50, most_rounds=5),
]
