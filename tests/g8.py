"""Fixture G8 of the literature's comparisons: a mixture and its own noisy examples as starts."""

import jax
import jax.numpy as jnp

from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.linalg import random_frames


def mixture():
    """Two rank-2 components in eight dimensions with a floor."""
    bases = random_frames(jax.random.key(0), 2, 8, 2, dtype=jnp.result_type(float))
    means = jnp.stack([0.6 * bases[0, :, 0], -0.6 * bases[0, :, 0]])
    scales = jnp.array([[1.0, 0.5], [0.5**0.5, 0.5**0.5]])
    return MoLRG(bases, means=means, scales=scales, noise_std=0.1)


def starts(schedule, num_starts):
    """``(mixture, x_T)``, these at the schedule's largest noise level."""
    p, t = mixture(), schedule.t_max
    x_0, _ = p.sample(jax.random.key(1), num_starts)
    noise = jax.random.normal(jax.random.key(2), x_0.shape)
    return p, schedule.alpha(t) * x_0 + schedule.sigma(t) * noise
