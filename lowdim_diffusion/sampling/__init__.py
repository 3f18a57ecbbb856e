r"""Sampling: one scan that runs any solver with any denoiser, and the way back from data to noise.

A run starts from ``x_T = sigma(ts[0]) eps``, or from a given array, and makes ``num_steps`` solver
steps along ``ts``, from noise to data. What it keeps of the trajectory is the caller's choice
(``save``); unless asked for, memory does not grow with the number of steps.

Randomness belongs to examples: example ``i`` (its *global* index) owns ``fold_in(key, i)``, and
each of its draws is folded from that. Samples therefore do not depend on how the examples are split
into batches or over devices.

Runs are differentiable; :func:`sample_adjoint` does so in memory that does not grow with steps.

Nothing is jitted here. Compile once at the outside::

    draw = jax.jit(lambda key: sample(key, denoise_fn, schedule, ts, (64, 48), solver=heun()).x)
"""

from lowdim_diffusion.sampling.adaptive import AdaptiveResult, sample_adaptive
from lowdim_diffusion.sampling.adjoint import sample_adjoint
from lowdim_diffusion.sampling.driver import SampleResult, initial_noise, sample, sample_batched
from lowdim_diffusion.sampling.inversion import invert
from lowdim_diffusion.sampling.restart import Restart, sample_restart
from lowdim_diffusion.sampling.search import (
    GridSearch,
    SamplerSearch,
    search_grid,
    search_sampler,
)

__all__ = [
    "AdaptiveResult",
    "GridSearch",
    "Restart",
    "SampleResult",
    "SamplerSearch",
    "initial_noise",
    "invert",
    "sample",
    "sample_adaptive",
    "sample_adjoint",
    "sample_batched",
    "sample_restart",
    "search_grid",
    "search_sampler",
]
