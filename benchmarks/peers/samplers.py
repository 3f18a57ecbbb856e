"""Loops around a torch network: EDM's Heun, k-diffusion's DPM-Solver++(2M), diffusers' schedulers.

And, in JAX, the sampler of google's hackable_diffusion. Each torch function returns samples
``[b, c, h, w]`` of a discrete noise-predicting model. EDM's and k-diffusion's samplers want a
denoiser of ``x / alpha``; it is wrapped as both libraries do it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np


def denoiser(model: Any, betas: np.ndarray) -> Callable[[Any, Any], Any]:
    """Return ``D(x, sigma)`` of a model that predicts the noise at steps of a table of betas."""
    import torch  # pyright: ignore[reportMissingImports]

    log_alphas = np.cumsum(np.log1p(-betas))
    log_sigmas = torch.tensor(0.5 * (np.log(-np.expm1(log_alphas)) - log_alphas))

    def step_of(sigma: Any) -> Any:
        log_sigma = torch.log(sigma)
        low = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1) - 1
        weight = (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
        return low + weight

    def denoise(x: Any, sigma: Any, **_: Any) -> Any:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[0]
        scale = float((1 + sigma**2) ** -0.5)
        return x - float(sigma) * model(scale * x, step_of(sigma).float()).sample

    return denoise


def edm_heun(denoise: Callable[[Any, Any], Any], x: Any, sigmas: np.ndarray) -> Any:
    """Algorithm 1 of EDM, step by step, with its float64 state."""
    import torch  # pyright: ignore[reportMissingImports]

    wide = lambda x, sigma: denoise(x.float(), sigma).to(torch.float64)
    return heun(wide, x.to(torch.float64), sigmas).float()


def euler(denoise: Callable[[Any, Any], Any], x: Any, sigmas: np.ndarray) -> Any:
    """Euler's steps in sigma, which are DDIM's, in the precision of ``x``."""
    for now, after in itertools.pairwise(sigmas.tolist()):
        x = x + (after - now) / now * (x - denoise(x, now))
    return x


def heun(denoise: Callable[[Any, Any], Any], x: Any, sigmas: np.ndarray) -> Any:
    """Heun's steps in sigma as in EDM, in the precision of ``x``."""
    for now, after in itertools.pairwise(sigmas.tolist()):
        slope = (x - denoise(x, now)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            slope = 0.5 * (slope + (ahead - denoise(ahead, after)) / after)
            ahead = x + (after - now) * slope
        x = ahead
    return x


def dpmpp_2m(denoise: Callable[[Any, Any], Any], x: Any, sigmas: np.ndarray) -> Any:
    """k-diffusion's loop of DPM-Solver++(2M), its coefficients on the host."""
    old, step = None, 0.0
    for now, after in itertools.pairwise(sigmas.tolist()):
        found = denoise(x, now)
        if after == 0:
            return found
        last, step = step, math.log(now / after)
        half = 0.0 if old is None else 0.5 * step / last
        point = found if old is None else (1 + half) * found - half * old
        x, old = after / now * x + (1 - after / now) * point, found
    return x


def k_diffusion_2m(denoise: Callable[[Any, Any], Any], x: Any, sigmas: np.ndarray) -> Any:
    """``k_diffusion.sampling.sample_dpmpp_2m``."""
    import torch  # pyright: ignore[reportMissingImports]
    from k_diffusion import sampling  # pyright: ignore[reportMissingImports]

    return sampling.sample_dpmpp_2m(denoise, x, torch.tensor(sigmas).float(), disable=True)


def diffusers_loop(model: Any, scheduler: Any, x: Any, num_steps: int) -> Any:
    """The loop of diffusers' pipelines."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x


def diffusers_scheduler(name: str, betas: np.ndarray) -> Any:
    """Return a scheduler of diffusers that draws no noise and does not clip."""
    import diffusers  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"trained_betas": betas}
    if name == "DDIMScheduler":
        options["clip_sample"] = False
    return getattr(diffusers, name)(**options)


def hackable_ddim(denoise_fn: Callable[[Any, Any], Any], num_steps: int) -> Callable[..., Any]:
    """Return ``(key, x_T) -> x``: its DDIM on straight lines, ``num_steps`` evaluations."""
    from hackable_diffusion.lib import corruption  # pyright: ignore[reportMissingImports]
    from hackable_diffusion.lib import sampling as theirs  # pyright: ignore[reportMissingImports]

    process = corruption.GaussianProcess(schedule=corruption.RFSchedule())
    sampler = theirs.DiffusionSampler(
        time_schedule=theirs.UniformTimeSchedule(),
        stepper=theirs.DDIMStep(corruption_process=process, stoch_coeff=0.0),
        num_steps=num_steps + 1,
    )
    infer = lambda xt, conditioning, time: {"x0": denoise_fn(xt, time.reshape(-1))}
    return lambda key, x: sampler(infer, key, x)[0].xt
