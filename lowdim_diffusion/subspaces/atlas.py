r"""How low-dimensional and how linear a denoiser is, noise level by noise level.

Between the level where the image is decided and the level where only its texture is left, the
Jacobian of a denoiser has low rank and the denoiser is nearly linear:

.. math:: \hat x_0(x_t + \lambda v) \approx \hat x_0(x_t) + \lambda J v .

There its singular vectors edit an image in one step. The atlas shows where that window is.

References:
    Wang et al. 2024, arXiv 2409.02426, eq. (52) (rank); Chen et al. 2024, arXiv 2409.02374, sec. 3
    (rank ratio, norm ratio and cosine along the noise level).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, DenoiseFn, Float, PRNGKey, Scalar, Schedule
from lowdim_diffusion.sharding import vary_like
from lowdim_diffusion.solvers._base import CLEAN_TOLERANCE
from lowdim_diffusion.subspaces.jacobian import (
    jacobian_asymmetry,
    jacobian_frobenius,
    jacobian_spectrum,
    jacobian_svd,
)
from lowdim_diffusion.subspaces.spectra import numerical_rank

STEPS = (0.18, 0.36, 0.72)
"""Steps at which linearity is tested, in units of :func:`step_length`: the published ``lambda = 10,
20, 40`` at n = 3072."""


def step_length(schedule: Schedule, t: Any, data_shape: tuple[int, ...]) -> Array:
    r"""Return ``sqrt(n) sqrt(alpha(t)^2 + sigma(t)^2)``, the unit of a step in x_t.

    It is the norm of a typical x_t for data of unit variance, ``sqrt(n)`` in every
    variance-preserving schedule, so that one relative step means the same at every image size,
    noise level and schedule: 0.72 of it is the published ``lambda = 40`` at n = 3072.

    Args:
        schedule: noise schedule.
        t: time, any shape.
        data_shape: shape of one example; n is the product.

    Examples:
        >>> from lowdim_diffusion.schedules import VE, VPLinear
        >>> float(step_length(VPLinear(), 0.3, (8, 8, 1))), float(step_length(VE(), 0.75, (4,)))
        (8.0, 2.5)
    """
    _check_times("step_length", schedule, t)
    scale = jnp.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)
    return math.sqrt(math.prod(data_shape)) * scale


def _check_times(where: str, schedule: Schedule, t: Any) -> None:
    """Raise if known times lie outside the schedule."""
    if is_concrete(schedule.t_max):
        high = float(schedule.t_max) * (1 + CLEAN_TOLERANCE)
        check_range(where, "t", t, 0, high, fix=f"the schedule's last time is {schedule.t_max:g}")


class Linearity(NamedTuple):
    """How ``f(x + lambda v)`` compares with ``l = f(x) + lambda J v``."""

    norm_ratio: Float[Array, "b num_steps"]
    """``||f|| / ||l||``; 1 if linear."""
    cosine: Float[Array, "b num_steps"]
    """Of the angle between f and l; 1 if linear."""
    error: Float[Array, "b num_steps"]
    """``||f - l|| / ||l||``; 0 if linear."""


def linearity(
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    direction: Float[Array, "b *data"],
    lengths: Float[Array, " num_steps"],
) -> Linearity:
    """Return how nearly linear ``fn`` is at ``x`` along one direction per example.

    Args:
        fn: ``[b, *data] -> [b, *out]``, each example alone, e.g. ``lambda x: denoise_fn(x, t)``.
        x: ``[b, *data]``.
        direction: ``[b, *data]``, of any length but 0; the unit vector along it is taken.
        lengths: ``[num_steps]``, lambda: how far to go, either sign, in the units of x.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, steps = jnp.ones((1, 2)), jnp.array([0.1, 1.0])
        >>> linearity(lambda x: 2 * x, x, x, steps).cosine.round(3).tolist()
        [[1.0, 1.0]]

    References:
        Chen et al. 2024, arXiv 2409.02374, sec. 3.2.
    """
    check_shape("linearity", "direction", direction, x.shape, "one per example")
    flat = lambda a: a.reshape(a.shape[0], -1)
    norms = jnp.linalg.norm(flat(direction), axis=1)
    unit = direction / norms.reshape((-1,) + (1,) * (x.ndim - 1))
    y, slope = jax.jvp(fn, (x,), (unit,))

    def one(length: Array) -> Linearity:
        f, line = flat(fn(x + length * unit)), flat(y + length * slope)
        norm = lambda a: jnp.linalg.norm(a, axis=1)
        tiny = jnp.finfo(f.dtype).tiny
        size = jnp.maximum(norm(line), tiny)
        cosine = jnp.sum(f * line, axis=1) / jnp.maximum(norm(f) * size, tiny)
        return Linearity(norm(f) / size, cosine, norm(f - line) / size)

    steps = jax.lax.map(one, jnp.asarray(lengths, x.dtype))
    return jax.tree.map(lambda a: a.T, steps)


class Atlas(NamedTuple):
    """What :func:`spectral_atlas` found at T noise levels of b examples; average over axis 1."""

    values: Float[Array, "T b m"]
    """Leading (or all) singular values of ``d x0_hat / d (x_t / alpha)``, descending."""
    energy: Float[Array, "T b"]
    """Share of ``||J||_F^2`` that they hold; 1 if they are all."""
    rank_ratio: Float[Array, "T b"]
    """Numerical rank over n; ``(m + 1) / n`` says that it is more than m."""
    asymmetry: Float[Array, "T b"]
    """``||J - J^T||_F / ||J + J^T||_F``."""
    norm_ratio: Float[Array, "T b num_steps"]
    """See :class:`Linearity`, along a random direction."""
    cosine: Float[Array, "T b num_steps"]
    """See :class:`Linearity`."""


def spectral_atlas(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    states: Float[Array, "T b *data"],
    ts: Float[Array, " num_times"],
    *,
    rank: int | None = None,
    energy: Scalar = 0.99,
    steps: tuple[float, ...] = STEPS,
    num_probes: int = 32,
    chunk: int = 64,
    max_iters: int = 50,
    tol: float = 1e-3,
) -> Atlas:
    r"""Return spectrum, rank and linearity of a denoiser at each noise level of a trajectory.

    Derivatives are taken with respect to ``x_t / alpha(t)``, EDM's variable, so that spectra of
    different schedules agree: ``alpha(t)`` times ``d x0_hat / d x_t``, whose rank is the same. One
    compiled program: noise levels run one after the other, the leading vectors of one starting the
    search at the next; examples and vectors run together. What is not used is not computed under
    ``jit``.

    Args:
        key: draws the directions and probes.
        denoise_fn: ``(x_t [b, *data], t scalar) -> x0_hat [b, *data]``.
        schedule: gives ``alpha(t)``.
        states: ``[T, b, *data]``, x_t as a sampler saves them, or clean data with noise added.
        ts: ``[T]``, their times; leave out t = 0, where the denoiser is the identity.
        rank: None for all ``m = n`` singular values by
            :func:`~lowdim_diffusion.subspaces.jacobian_spectrum` (n up to about a thousand), else
            the leading ``m = rank`` by :func:`~lowdim_diffusion.subspaces.jacobian_svd`; the rank
            rule then takes the rest of the energy from probes.
        energy: eta of :func:`~lowdim_diffusion.subspaces.numerical_rank`.
        steps: lengths at which to test linearity, in units of :func:`step_length`.
        num_probes: for asymmetry, and for the energy beyond ``rank``.
        chunk: vectors pushed through at once, to bound the memory of the network's pass.
        max_iters: as in ``jacobian_svd``.
        tol: as in ``jacobian_svd``.

    Raises:
        ValueError: if the lengths differ, or a known time lies outside the schedule.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> basis = jnp.eye(4)[:, :2]  # data N(0, U U^T): x0_hat = U U^T x_t / (1 + t^2)
        >>> fn = lambda x, t: x @ basis @ basis.T / (1 + t**2)
        >>> key, ts = jax.random.key(0), jnp.array([2.0, 1.0])
        >>> found = spectral_atlas(key, fn, schedules.VE(), jnp.ones((2, 3, 4)), ts)
        >>> [f"{s:.3f}" for s in found.values[0, 0]], found.rank_ratio[:, 0].tolist()
        (['0.200', '0.200', '0.000', '0.000'], [0.5, 0.5])

    References:
        Wang et al. 2024, arXiv 2409.02426, Jacobian figure; Chen et al. 2024, arXiv 2409.02374.
    """
    if states.shape[0] != ts.shape[0]:
        raise fail("spectral_atlas", "one time per state", f"{states.shape[0]} times", ts.shape[0])
    _check_times("spectral_atlas", schedule, ts)
    batch, data_shape = states.shape[1], states.shape[2:]
    dim = math.prod(data_shape)
    wide = jnp.promote_types(states.dtype, jnp.float32)
    svd_key, probe_key, direction_key = jax.random.split(key, 3)
    direction = jax.random.normal(direction_key, states.shape[1:], states.dtype)

    def level(start: Array | None, state: tuple[Array, Array]) -> tuple[Array | None, Atlas]:
        x, t = state
        fn = lambda x: denoise_fn(x, t)
        options: Any = {"max_iters": max_iters, "tol": tol, "chunk": chunk}
        if rank is None:
            s, total = jacobian_spectrum(fn, x, chunk=chunk), None
        else:
            _, s, start = jacobian_svd(fn, x, rank, key=svd_key, start=start, **options)
            tail = jacobian_frobenius(probe_key, fn, x, num_probes=num_probes, without=start)
            total = jnp.sum(s**2, axis=1) + tail**2
        held = jnp.sum(s**2, axis=1)
        known = jnp.isfinite(held)
        share = jnp.where(known, 1, jnp.nan)
        if total is not None:
            share = held / jnp.where(total == 0, 1, total)
        ratio = jnp.where(known, numerical_rank(s, energy, total=total) / dim, jnp.nan)
        lengths = jnp.asarray(steps, x.dtype) * step_length(schedule, t, data_shape).astype(x.dtype)
        along = linearity(fn, x, direction, lengths)
        return start, Atlas(
            s * schedule.alpha(t).astype(s.dtype),
            share,
            ratio,
            jacobian_asymmetry(probe_key, fn, x, num_probes=num_probes),
            along.norm_ratio,
            along.cosine,
        )

    if rank is None:
        return jax.lax.map(lambda state: level(None, state)[1], (states, ts))
    start = jax.random.normal(svd_key, (1, rank, dim), wide)
    start = vary_like(jnp.broadcast_to(start, (batch, rank, dim)), states)
    return jax.lax.scan(level, start, (states, ts))[1]
