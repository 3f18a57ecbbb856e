"""Gaussians and their low-rank mixture from the papers' formulas, apart from the package."""

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion.linalg import expand_right


def molrg_mean(bases, x, sigma):
    """Posterior mean of the equal-weight noise-free mixture, VE: papers' lemma 1."""
    coefficients = jnp.einsum("knd,bn->bkd", bases, x, precision="highest")
    w = jax.nn.softmax((coefficients**2).sum(-1) / (2 * sigma**2 * (1 + sigma**2)), axis=-1)
    mean = jnp.einsum("bk,knd,bkd->bn", w, bases, coefficients, precision="highest")
    return mean / (1 + sigma**2)


def molrg_jacobian(bases, x, sigma):
    """Its Jacobian in closed form (Chen et al. 2024, lemma 2, in EDM variables), float64 numpy."""
    bases, x = np.asarray(bases, np.float64), np.asarray(x, np.float64)
    out = []
    for xi in x:
        p = np.stack([u @ u.T @ xi for u in bases])
        logit = (p**2).sum(-1) / (2 * sigma**2 * (1 + sigma**2))
        w = np.exp(logit - logit.max())
        w /= w.sum()
        m = w @ p
        c = 1 / (sigma**2 * (1 + sigma**2))
        j = sum(wk * u @ u.T for wk, u in zip(w, bases, strict=True))
        j = j + c * sum(wk * np.outer(pk, pk) for wk, pk in zip(w, p, strict=True))
        out.append((j - c * np.outer(m, m)) / (1 + sigma**2))
    return np.stack(out)


def molrg_data(key, bases, num):
    label_key, key = jax.random.split(key)
    k, _, d = bases.shape
    labels = jax.random.randint(label_key, (num,), 0, k)
    return jnp.einsum("bnd,bd->bn", bases[labels], jax.random.normal(key, (num, d)))


def gaussian(schedule, mean, var):
    """``(denoise_fn, log_prob_fn)`` of independent coordinates ``N(mean [n], var [n])``."""
    mean, var = jnp.array(mean)[None], jnp.array(var)[None]

    def levels(t):
        a, s = (expand_right(c(t), 2) for c in (schedule.alpha, schedule.sigma))
        return a, a**2 * var + s**2

    def denoise_fn(x, t):
        a, spread = levels(t)
        return mean + a * var / spread * (x - a * mean)

    def log_prob_fn(x, t):
        a, spread = levels(t)
        return -0.5 * jnp.sum((x - a * mean) ** 2 / spread + jnp.log(spread), axis=1)

    return denoise_fn, log_prob_fn
