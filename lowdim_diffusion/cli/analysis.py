r"""Measurements on a trained run: samples, nearest training examples, Jacobian ranks, subspaces.

All noise levels are those of one sampling trajectory, so the Jacobians are taken where the model is
used. Where the distribution of the data is known (synthetic data), the exact denoiser is measured
at the same states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import data, generalization, sampling, schedules, subspaces
from lowdim_diffusion._types import DenoiseFn
from lowdim_diffusion.cli import build, drawing
from lowdim_diffusion.cli.loading import LoadedRun

__all__ = ["FULL", "Analysis", "analyze"]

FULL = 1024
"""Up to this dimension all singular values are computed, beyond it the leading ones."""
_CHEAP = 256
"""Up to this dimension that is cheap enough to do it for several examples."""
_APART = 1000
"""Training examples compared with all others to learn how alike two different ones are."""


class Analysis(NamedTuple):
    """What was measured."""

    samples: np.ndarray
    """``[N, *data]``."""
    distance: np.ndarray
    """``[N]`` Euclidean distance of each sample to the nearest training example."""
    index: np.ndarray
    """``[N]`` which one."""
    memorized: float | None
    """Share of samples much nearer to one training example than to any other."""
    novel: float | None
    """Share of samples that resemble no training example more than :attr:`threshold`."""
    threshold: float | None
    """Cosine that 1 % of training examples reach with one of the others; None with under 500."""
    distance_ratio: float | None
    """Mean distance to the data over that of fresh examples, where the distribution is known."""
    trajectory: np.ndarray
    """``[T + 1, b, *data]`` states of the first samples, noise to data."""
    ts: np.ndarray
    """``[T + 1]`` their times."""
    sigmas: np.ndarray
    """``[T + 1]`` their noise levels ``sigma / alpha``; the last is 0."""
    spectrum: subspaces.Atlas
    """At the first T states."""
    exact: subspaces.Atlas | None
    """The same of the exact denoiser, where there is one."""
    angles: dict[str, np.ndarray]
    """Principal angles in radians, ascending, by the names of the two subspaces."""


def analyze(
    loaded: LoadedRun,
    dataset: data.Dataset,
    *,
    num_samples: int = 64,
    num_spectra: int | None = None,
    rank: int = 16,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Analysis:
    """Return the measurements of a run.

    Args:
        loaded: the run.
        dataset: what it was trained on.
        num_samples: samples to draw and compare with the training data.
        num_spectra: of these, how many to follow with Jacobians; None takes 4 where that is cheap,
            else 1.
        rank: leading singular values to compute where the dimension is beyond :data:`FULL`, and the
            largest dimension of the subspaces compared.
        seed: decides the noise.
        note: told what is being done.
    """
    model, params = loaded.model, loaded.averaged
    settings = model.config.sample
    labels = drawing.default_labels(model, num_samples)
    note(f"drawing {num_samples} samples of step {loaded.step}")
    chosen = settings.__class__(**{**vars(settings), "num_samples": num_samples})
    samples = drawing.sampler(model, config=chosen)(params, seed, labels)

    note(f"comparing them with {dataset.num_examples} training examples")
    train = dataset.floats()
    near = generalization.nearest(samples, train, k=min(2, dataset.num_examples))
    memorized = None
    if dataset.num_examples > 1:
        memorized = float(generalization.is_memorized(near).mean())
    novel, threshold = _novelty(samples, train, seed)
    ratio = None
    if dataset.truth is not None and np.isfinite(samples).all():
        fresh, _ = dataset.truth.sample(jax.random.key(seed), num_samples)
        fresh = fresh.reshape(samples.shape).astype(samples.dtype)
        ratio = float(generalization.distance_ratio_score(samples, train, fresh))

    dim = int(np.prod(model.net.data_shape))
    if num_spectra is None:
        num_spectra = 1 if _CHEAP < dim <= FULL else 4
    followed = min(num_spectra, num_samples)
    cond = None if labels is None else jnp.asarray(labels[:followed])
    denoise_fn = build.denoiser(model, params, cond)
    ts = build.grid(settings, model.schedule)
    key = jax.random.key(seed)

    @jax.jit
    def follow(key: Any) -> Any:
        shape = (followed, *model.net.data_shape)
        solver = build.solver(settings)
        return sampling.sample(
            key, denoise_fn, model.schedule, ts, shape, solver=solver, save="all"
        ).trajectory

    states = follow(key)
    note(f"Jacobians of {followed} samples at {len(ts) - 1} noise levels, dimension {dim}")
    spectrum = _spectrum(denoise_fn, model, states[:-1], ts[:-1], rank, key)
    exact = None
    if dataset.truth is not None:
        truth = dataset.truth.denoiser(model.schedule)
        exact = _spectrum(truth, model, states[:-1], ts[:-1], rank, key)

    note("principal angles")
    angles = _sample_angles(samples, train, rank, seed)
    if dataset.truth is not None and hasattr(dataset.truth, "bases"):
        angles |= _true_angles(denoise_fn, model, dataset.truth, states[:-1], ts[:-1], key)
    levels = np.asarray(schedules.noise_levels(model.schedule, ts))
    return Analysis(
        samples,
        np.asarray(near.distance[:, 0]),
        np.asarray(near.index[:, 0]),
        memorized,
        novel,
        threshold,
        ratio,
        np.asarray(states),
        np.asarray(ts),
        levels,
        spectrum,
        exact,
        {name: np.asarray(value) for name, value in angles.items()},
    )


def _novelty(
    samples: np.ndarray, train: np.ndarray, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """The generalization score, and its threshold from training examples among each other."""
    apart = min(len(train) // 5, _APART)
    if apart < 100 or not np.isfinite(samples).all():
        return None, None
    rows = np.random.default_rng(seed).permutation(len(train))
    held_out, others = train[rows[:apart]], train[rows[apart:]]
    threshold = jax.jit(generalization.calibrate_threshold)(held_out, others)
    novel = jax.jit(generalization.generalization_score)(samples, train, threshold)
    return float(novel), float(threshold)


def _spectrum(
    denoise_fn: DenoiseFn, model: build.Model, states: Any, ts: Any, rank: int, key: Any
) -> subspaces.Atlas:
    dim = int(np.prod(model.net.data_shape))
    options: Any = {} if dim <= FULL else {"rank": min(rank, dim), "tol": 1e-2}

    @jax.jit
    def run(states: Any, ts: Any) -> Any:
        return subspaces.spectral_atlas(key, denoise_fn, model.schedule, states, ts, **options)

    return jax.tree.map(np.asarray, run(states, jnp.asarray(ts, states.dtype)))


def _sample_angles(samples: np.ndarray, train: np.ndarray, rank: int, seed: int) -> dict[str, Any]:
    """Principal subspaces of samples and data, with that of two disjoint draws of data to compare.

    Every subspace comes from as many examples as there are samples: with few of them a subspace is
    uncertain, and only the comparison tells how much of an angle is that.
    """
    count = min(len(samples), len(train) // 2)
    dim = int(np.prod(train.shape[1:]))
    rank = min(rank, count // 4, dim // 2)
    if rank < 1:
        return {}
    rows = np.random.default_rng(seed).permutation(len(train))
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1))
    one, two = flat(train[rows[:count]]), flat(train[rows[count : 2 * count]])
    basis = lambda x: subspaces.pca(x - x.mean(0, keepdims=True), rank)
    between = jax.jit(lambda a, b: subspaces.principal_angles(basis(a), basis(b)))
    return {
        f"samples, data (PCA of {count}, rank {rank})": between(flat(samples[:count]), one),
        f"data, other data (PCA of {count}, rank {rank})": between(one, two),
    }


def _true_angles(
    denoise_fn: DenoiseFn, model: build.Model, truth: Any, states: Any, ts: Any, key: Any
) -> dict[str, Any]:
    """Angles between the true subspaces and the range of the model's Jacobian.

    At the noise level nearest to a fifth of the spread of the data, where the component of a state
    is decided and the Jacobian still has the full rank of its subspace.
    """
    num_components, _, rank = truth.bases.shape
    sigmas = np.asarray(schedules.noise_levels(model.schedule, ts))
    wanted = 0.2 * (model.config.loss.data_std or 1)
    level = int(np.argmin(np.abs(np.log(np.maximum(sigmas, 1e-12) / wanted))))

    @jax.jit
    def run(x: Any, t: Any) -> tuple[Any, Any]:
        u, _, _ = subspaces.jacobian_svd(lambda x: denoise_fn(x, t), x, rank, key=key)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        weights = truth.posterior_weights(x.reshape(len(x), -1), alpha, sigma)
        component = jnp.argmax(weights, axis=1)
        frames = u.reshape(len(x), -1, rank)
        return component, subspaces.principal_angles(frames, truth.bases[component])

    component, angles = run(states[level], jnp.asarray(ts[level], states.dtype))
    found = {}
    for k in range(num_components):
        mine = np.asarray(component) == k
        if mine.any():
            name = f"Jacobian at sigma {sigmas[level]:.2g}, true subspace {k}"
            found[name] = np.asarray(angles)[mine].mean(0)
    return found
