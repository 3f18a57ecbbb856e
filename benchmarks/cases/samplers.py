"""What a sampler adds to the denoiser calls it makes, and whole runs beside torch's loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.cases._nets import BATCH, CHANNELS, IMAGES
from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers import samplers as loops
from benchmarks.peers import unets
from lowdim_diffusion import denoisers, linalg, sampling, schedules, sharding, solvers
from lowdim_diffusion.distributions import MoLRG

STEPS = 18
BETAS = schedules.beta_table("linear")
SHAPE = {"smoke": (8, 48), "small": (64, 48), "medium": (256, 192), "large": (256, 3072)}
OVERHEAD = {
    "heun": (solvers.heun(), 18, 1.5, loops.heun, 1 / 8),
    "ddim": (solvers.ddim(), 50, 1.5, loops.euler, 1 / 8),
    "dpmpp": (solvers.dpmpp_2m(), 20, 2.6, loops.dpmpp_2m, 1 / 4.6),
    "ancestral": (solvers.ancestral(), 50, 1.5, None, None),
}
"""Solver, steps, how much of the bare calls' time it may take; a loop in torch, and of its time."""


def _overhead(name: str, size: str) -> list[Variant]:
    """An almost free denoiser, so that what remains is the sampler itself."""
    solver, num_steps, most, loop, most_of_loop = OVERHEAD[name]
    schedule, ts = schedules.VE(), schedules.karras_grid(num_steps)
    denoise_fn = lambda x, t: x / (1 + t**2)
    x = 80 * jax.random.normal(jax.random.key(0), SHAPE[size])
    draw = lambda key, x: sampling.sample(key, denoise_fn, schedule, ts, x, solver=solver)
    nfe = draw(jax.random.key(0), x).nfe
    if solver.stochastic:
        bare = _calls_and_noise(denoise_fn, ts, nfe, x)
    else:
        bare = _calls(denoise_fn, ts, nfe, x, nfe)
    ours = jitted(
        f"{solver.name}, {num_steps} steps",
        lambda key, x: draw(key, x).x,
        jax.random.key(0),
        x,
        units=nfe,
        bars={bare.name: most, "torch, loop": most_of_loop or most},
    )
    if loop is None or not peers.present("torch"):
        return [bare, ours]
    import torch  # pyright: ignore[reportMissingImports]

    start, sigmas = torch.tensor(np.asarray(x)), np.asarray(ts, np.float64)

    def theirs() -> Any:
        with torch.inference_mode():
            return loop(denoise_fn, start, sigmas)

    unets.check_close("torch, loop", theirs(), ours.call(), 1e-4)
    return [bare, ours, Variant("torch, loop", theirs, nfe, ours=False)]


def _calls_and_noise(denoise_fn: Any, ts: Any, nfe: int, x: Any) -> Variant:
    """As many calls of the denoiser, and one normal array of the examples' own keys for each."""
    levels = jnp.asarray(np.resize(ts[:-1], nfe), x.dtype)
    keys = sharding.example_keys(jax.random.key(0), jnp.arange(len(x)))

    def run(x: Any) -> Any:
        def body(x: Any, step: Any) -> tuple[Any, None]:
            t, i = step
            one = lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:])
            return denoise_fn(x, t) + t * jax.vmap(one)(keys), None

        return jax.lax.scan(body, x, (levels, jnp.arange(nfe)))[0]

    return jitted(f"{nfe} bare calls and draws", run, x, units=nfe, ours=False)


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


def _ours(
    denoise_fn: Any, schedule: Any, ts: Any, x: Any, solver: Any, bars: dict[str, float]
) -> Variant:
    run = lambda x: sampling.sample(jax.random.key(0), denoise_fn, schedule, ts, x, solver=solver).x
    name = f"{solver.name}, {len(ts) - 1} steps"
    return jitted(name, run, x, units=x.shape[0], bars=bars)


def _calls(denoise_fn: Any, ts: Any, nfe: int, x: Any, units: int) -> Variant:
    """As many calls of the denoiser, and nothing else."""
    levels = jnp.asarray(np.resize(ts[:-1], nfe), x.dtype)

    def run(x: Any) -> Any:
        return jax.lax.scan(lambda x, t: (denoise_fn(x, t), None), x, levels)[0]

    return jitted(f"{nfe} bare calls", run, x, units=units, ours=False)


def _theirs(name: str, ours: Variant, x: Any, sample: Any) -> Variant:
    import torch  # pyright: ignore[reportMissingImports]

    start = unets.to_torch(x)

    def call() -> Any:
        with torch.inference_mode():
            return sample(start)

    unets.check_agreement(name, call(), ours.call(), 5e-3)
    return Variant(name, call, ours.units, ours=False)


def _heun_18(size: str) -> list[Variant]:
    """EDM's sampler."""
    model, denoise_fn, schedule, x = _unet(size)
    sigmas = np.asarray(schedules.karras_grid(18, 0.02, 80.0), np.float64)
    ts = np.asarray(schedules.times_from_sigmas(schedule, sigmas), np.float64)
    alpha = float(schedule.alpha(ts[0]))
    ours = _ours(denoise_fn, schedule, ts, x, solvers.heun(), {"35 bare calls": 1.02})
    variants = [ours, _calls(denoise_fn, ts, 35, x, len(x))]
    if model is None:
        return variants
    denoise = loops.denoiser(model, BETAS)
    theirs = lambda x: loops.edm_heun(denoise, x / alpha, sigmas)
    return [*variants, _theirs("torch, EDM's loop", ours, x, theirs)]


def _dpmpp_20(size: str) -> list[Variant]:
    """DPM-Solver++(2M)."""
    model, denoise_fn, schedule, x = _unet(size)
    # Twenty of diffusers' evenly spaced steps; its first one is 999, counted from 0.
    ts = np.append(np.linspace(0, 999, 21).round()[:0:-1] + 1, 0.0)
    ours = _ours(denoise_fn, schedule, ts, x, solvers.dpmpp_2m(), {"20 bare calls": 1.02})
    variants = [ours, _calls(denoise_fn, ts, 20, x, len(x))]
    if model is None:
        return variants
    scheduler = loops.diffusers_scheduler("DPMSolverMultistepScheduler", BETAS)
    loop = lambda x: loops.diffusers_loop(model, scheduler, x, 20)
    variants.append(_theirs("torch, diffusers", ours, x, loop))
    if peers.present("k_diffusion"):
        levels = np.asarray(schedules.noise_levels(schedule, ts[:-1]), np.float64)
        sigmas, denoise = np.append(levels, 0.0), loops.denoiser(model, BETAS)
        alpha = float(schedule.alpha(ts[0]))
        theirs = lambda x: loops.k_diffusion_2m(denoise, x / alpha, sigmas)
        variants.append(_theirs("torch, k-diffusion", ours, x, theirs))
    return variants


def _ddim_50(size: str) -> list[Variant]:
    """DDIM."""
    model, denoise_fn, schedule, x = _unet(size)
    ts = np.append(np.arange(980, -1, -20) + 1.0, 0.0)
    ours = _ours(denoise_fn, schedule, ts, x, solvers.ddim(), {"50 bare calls": 1.02})
    variants = [ours, _calls(denoise_fn, ts, 50, x, len(x))]
    if model is None:
        return variants
    scheduler = loops.diffusers_scheduler("DDIMScheduler", BETAS)
    loop = lambda x: loops.diffusers_loop(model, scheduler, x, 50)
    return [*variants, _theirs("torch, diffusers", ours, x, loop)]


def _ddim_50_jax(size: str) -> list[Variant]:
    """DDIM in JAX: the same network under rectified flow."""
    shape = IMAGES[size]
    net, params = unets.network(shape, CHANNELS[size], None)
    schedule = schedules.RectifiedFlow()
    denoise_fn = denoisers.from_network(net, params, schedule, data_std=0.5)
    ts = np.linspace(1 - 1e-6, 1e-6, 51)
    x = jax.random.normal(jax.random.key(0), (BATCH[size], *shape))
    ours = _ours(denoise_fn, schedule, ts, x, solvers.ddim(), {"50 bare calls": 1.02})
    variants = [ours, _calls(denoise_fn, ts, 50, x, len(x))]
    if peers.present("hackable_diffusion"):
        key, theirs = jax.random.key(0), loops.hackable_ddim(denoise_fn, 50)
        variants.append(jitted("hackable_diffusion", theirs, key, x, units=len(x), ours=False))
        unets.check_close("hackable_diffusion", variants[-1].call(), ours.call(), 5e-3)
    return variants


CASES = [
    *(
        Case(
            f"sampler-overhead-{name}",
            "denoiser call",
            functools.partial(_overhead, name),
            peers=("torch",) if OVERHEAD[name][3] else (),
        )
        for name in OVERHEAD
    ),
    Case("sampler-molrg", "sample", _exact),
    Case("sampler-heun-18", "sample", _heun_18, most_rounds=5, peers=("torch", "diffusers")),
    Case(
        "sampler-dpmpp-20",
        "sample",
        _dpmpp_20,
        most_rounds=5,
        peers=("torch", "diffusers", "k_diffusion"),
    ),
    Case("sampler-ddim-50", "sample", _ddim_50, most_rounds=5, peers=("torch", "diffusers")),
    Case(
        "sampler-ddim-50-jax",
        "sample",
        _ddim_50_jax,
        most_rounds=5,
        peers=("hackable_diffusion",),
    ),
]
