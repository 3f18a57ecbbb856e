r"""Subspace learning by training the low-rank denoiser: many small fits in one program.

The denoiser is that of :mod:`lowdim_diffusion.networks.lowrank`, the frames are its parameters and
stay orthonormal: gradients are projected to the tangent space, and every update is followed by a
retraction (:func:`lowdim_diffusion.training.optimizers.on_frames`). Training data are all
points at every step, with fresh noise.

For one subspace, or for hard assignment by the clean point, the noise integrates out: with
``c = 1 / (1 + sigma^2)`` (sigma the noise level, alpha = 1)

.. math:: E_\epsilon \lVert c\,U U^T (x + \sigma\epsilon) - x \rVert^2
    = \lVert x \rVert^2 - (2c - c^2) \lVert U^T x \rVert^2 + c^2 \sigma^2 d ,

so at every noise level the denoising loss falls exactly as the energy held by the frames grows:
minimizing it is principal component analysis, or K-subspaces. ``objective="analytic"`` trains on
that, ``"monte-carlo"`` on drawn noise as a diffusion model is trained.

References:
    Wang et al. 2024, arXiv 2409.02426, lemma 1 and theorems 1-4.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowdim_diffusion import linalg, networks, subspaces
from lowdim_diffusion._checks import check_choice, check_int, check_range, fail
from lowdim_diffusion._types import Array, Float, Int, PRNGKey, Scalar
from lowdim_diffusion.subspaces.clustering import check_finite, check_problem
from lowdim_diffusion.training import optimizers
from lowdim_diffusion.training.fit import fit

__all__ = ["SubspaceFit", "denoising_loss", "fit_subspaces"]

_LEVELS = 16
_DRAWS = 4


class SubspaceFit(NamedTuple):
    """What :func:`fit_subspaces` found."""

    bases: Float[Array, "num_components n rank"]
    """Frames of the best restart, orthonormal."""
    labels: Int[Array, " num_samples"]
    """The component with the largest posterior weight of each (clean) point."""
    loss: Float[Array, ""]
    """Denoising loss of the best restart, :func:`denoising_loss`."""
    losses: Float[Array, " num_restarts"]
    """That of every restart, from the same noise."""
    history: Float[Array, "num_restarts num_steps"]
    """Training loss of every step."""


def denoising_loss(
    key: PRNGKey,
    x: Float[Array, "num_samples n"],
    bases: Float[Array, "num_components n rank"],
    *,
    assignment: Literal["soft", "hard"] = "soft",
    sigmas: tuple[float, float] = (0.05, 3.0),
    max_weight: Scalar = 25.0,
) -> Float[Array, ""]:
    r"""Return the denoising loss of the low-rank autoencoder, over noise drawn once from ``key``.

    .. math:: \tfrac1N \sum_i E_{\sigma,\epsilon}\, w(\sigma)
        \lVert \hat x_0(x_i + \sigma\epsilon) - x_i \rVert^2, \qquad
        w = \min(\sigma^{-2}, \texttt{max\_weight}),

    sigma log-uniform between the two of ``sigmas``, evenly spread. Rows of zeros count as absent.

    Raises:
        ValueError: outside ``jit``, if columns of ``bases`` are neither orthonormal nor zero, or
            ``x`` is not finite; if there are no rows.
    """
    linalg.check_frames("denoising_loss", "bases", bases)
    check_finite("denoising_loss", x)
    if not x.shape[0]:
        raise fail("denoising_loss", "no points", "at least one row", x.shape)
    net = _network(bases, assignment)
    grid = np.geomspace(*sigmas, 2 * _LEVELS + 1)[1::2]

    def at(inputs: Any) -> Array:
        sigma, k = inputs
        return _loss(net, bases, x, jnp.full(x.shape[0], sigma, x.dtype), k, max_weight)

    levels = jnp.tile(jnp.asarray(grid, x.dtype), _DRAWS)
    return jnp.mean(jax.lax.map(at, (levels, jax.random.split(key, levels.shape[0]))))


def fit_subspaces(
    key: PRNGKey,
    x: Float[Array, "num_samples n"],
    num_components: int,
    rank: int,
    *,
    assignment: Literal["soft", "hard"] = "soft",
    orthogonal: bool = False,
    objective: Literal["monte-carlo", "analytic"] = "monte-carlo",
    num_steps: int = 1000,
    lr: Scalar = 3e-2,
    num_restarts: int = 1,
    start: Literal["random", "spectral", "mixed"] = "random",
    active_rank: Any = None,
    sigmas: tuple[float, float] = (0.05, 3.0),
    max_weight: Scalar = 25.0,
) -> SubspaceFit:
    r"""Return the subspaces that a low-rank denoiser learns from the rows of ``x``.

    One ``lax.scan`` over the steps, vmapped over the restarts, of which the one with the smallest
    denoising loss is returned. Map it over seeds and data sets as you like; rows of zeros weigh
    nothing, and ``active_rank`` may be traced, so that sets of different size and rank share a
    program.

    The theory has unit variance along the subspaces: scale data so that the mean of ``||x||^2`` is
    about ``rank`` (hard assignment does not mind other scales).

    Args:
        key: typed random key.
        x: ``[N, n]``, one example per row.
        num_components: K.
        rank: d.
        assignment: ``"soft"`` (soft-max of the noisy point) or ``"hard"`` (arg-max of the clean
            one).
        orthogonal: keep ``[U_1 .. U_K]`` orthonormal together; needs ``K d <= n``.
        objective: see the module; ``"analytic"`` needs ``num_components=1`` or hard assignment.
        num_steps: Adam steps; the learning rate falls to 0 as a cosine.
        lr: first learning rate, > 0.
        num_restarts: how many starts.
        start: ``"random"`` frames inside the leading K d principal directions, ``"spectral"`` ones
            as :func:`lowdim_diffusion.subspaces.k_subspaces` has, or every other one of both.
        active_rank: if given, only so many columns of each frame are used, the others are zero.
        sigmas: smallest and largest noise level, > 0; log-uniform between them.
        max_weight: bound on the weight ``1 / sigma^2`` of the squared error.

    Returns:
        A :class:`SubspaceFit`.

    Raises:
        ValueError: as :func:`lowdim_diffusion.subspaces.k_subspaces`, or for an objective that does
            not exist.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import linalg, subspaces
        >>> u = linalg.random_frames(jax.random.key(0), 1, 48, 3)[0]
        >>> x = jax.random.normal(jax.random.key(1), (12, 3)) @ u.T
        >>> found = fit_subspaces(jax.random.key(2), x, 1, 3, num_steps=300)
        >>> bool(subspaces.projector_distance(found.bases[0], u) < 0.05)
        True
    """
    where = "fit_subspaces"
    check_choice(where, "assignment", assignment, ("soft", "hard"))
    check_choice(where, "objective", objective, ("monte-carlo", "analytic"))
    check_int(where, "num_steps", num_steps)
    check_range(where, "lr", lr, 0, low_open=True)
    check_range(where, "sigmas", np.asarray(sigmas), 0, low_open=True)
    check_range(where, "max_weight", max_weight, 0, low_open=True)
    if objective == "analytic" and num_components > 1 and assignment == "soft":
        fix = 'pass assignment="hard" or objective="monte-carlo"'
        raise fail(where, "objective", "one subspace or hard assignment", repr(objective), fix)
    check_problem(where, x, num_components, rank, orthogonal, num_restarts, start, active_rank)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start_key, fit_key, loss_key = jax.random.split(key, 3)
    starts = subspaces.starts(
        start_key,
        x,
        num_components,
        rank,
        orthogonal=orthogonal,
        num_restarts=num_restarts,
        start=start,
        active_rank=active_rank,
    )
    net = _network(starts[0], assignment)
    gain = _mean_gain(sigmas, max_weight)
    optimizer = optimizers.on_frames(
        optax.adam(optax.cosine_decay_schedule(lr, num_steps)), joint=orthogonal
    )

    def loss_fn(bases: Array, batch: Any, key: Any) -> Array:
        del batch
        if objective == "analytic":
            return _analytic(x, bases, gain)
        sigma_key, noise_key = jax.random.split(key)
        low, high = (jnp.log(jnp.asarray(s, x.dtype)) for s in sigmas)
        level = jax.random.uniform(sigma_key, x.shape[:1], x.dtype)
        return _loss(net, bases, x, jnp.exp(low + level * (high - low)), noise_key, max_weight)

    def train(key: Any, bases: Array) -> tuple[Array, Array]:
        bases, metrics = fit(key, bases, loss_fn, optimizer, lambda key, step: (), num_steps)
        return bases, metrics["loss"]

    bases, history = jax.vmap(train)(jax.random.split(fit_key, num_restarts), starts)
    measure = lambda b: denoising_loss(
        loss_key, x, b, assignment=assignment, sigmas=sigmas, max_weight=max_weight
    )
    losses = jax.vmap(measure)(bases)
    best = jnp.nanargmin(losses)
    labels = subspaces.assign_points(x, bases[best])
    return SubspaceFit(bases[best], labels, losses[best], losses, history)


def _network(bases: Array, assignment: str) -> networks.Network:
    num_components, dim, rank = bases.shape
    return networks.make(
        "lowrank",
        data_shape=(dim,),
        num_components=num_components,
        rank=rank,
        orthonormal="none",
        assignment=assignment,
    )


def _present(x: Array) -> Array:
    """One for each row that is not all zeros, over their number: ``[N]``."""
    present = jnp.any(x != 0, axis=1).astype(x.dtype)
    return present / jnp.maximum(jnp.sum(present), 1)


def _loss(
    net: networks.Network, bases: Array, x: Array, sigma: Array, key: Any, max_weight: Any
) -> Array:
    """Weighted squared error at one draw of the noise."""
    x_t = x + sigma[:, None] * jax.random.normal(key, x.shape, x.dtype)
    clean = {"clean": x} if net.takes_clean else {}
    x0_hat = net.apply({"bases": bases}, x_t, jnp.log(sigma) / 4, **clean)
    errors = jnp.sum((x0_hat - x) ** 2, axis=1)
    return jnp.sum(_present(x) * jnp.minimum(1 / sigma**2, max_weight) * errors)


def _mean_gain(sigmas: tuple[float, float], max_weight: Any) -> tuple[Any, Any, Any]:
    """Means over the noise level of ``w``, ``w (2c - c^2)`` and ``w c^2 sigma^2``."""
    sigma = np.geomspace(*sigmas, 1001)
    weight = jnp.minimum(1 / jnp.asarray(sigma) ** 2, max_weight)
    c = 1 / (1 + sigma**2)
    return jnp.mean(weight), jnp.mean(weight * (2 * c - c**2)), jnp.mean(weight * (c * sigma) ** 2)


def _analytic(x: Array, bases: Array, gain: tuple[Any, Any, Any]) -> Array:
    constant, held, noise = gain
    inside = jnp.einsum("bn,knd->bkd", x, bases, precision=jax.lax.Precision.HIGHEST)
    energy = jnp.max(jnp.sum(inside**2, axis=-1), axis=1)
    rank = jnp.sum(bases[0] ** 2)
    per_point = constant * jnp.sum(x**2, axis=1) - held * energy + noise * rank
    return jnp.sum(_present(x) * per_point).astype(x.dtype)
