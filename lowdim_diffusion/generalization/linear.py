r"""How linear a denoiser is, the best linear one beside it, and how far two denoisers are apart.

With noisy inputs ``x = alpha x_0 + sigma eps`` at one noise level, the best affine stand-in of a
denoiser D is a least-squares fit, closed in form,

.. math::
    D_L(x) = W x + b, \qquad W = \mathrm{Cov}(D(x), x)\, \mathrm{Cov}(x)^{-1}, \qquad
    b = E[D(x)] - W E[x].

If D is the posterior mean of *any* law with mean m and covariance C, then D_L is the denoiser of
the Gaussian with that mean and covariance, the Wiener filter
``W = alpha C (alpha^2 C + sigma^2 I)^{-1}``, because ``E[D(x) x^T] = E[x_0 x^T]``. A trained
network that generalizes is near that filter itself (the hidden Gaussian structure); one that
memorizes is near the posterior mean of its training set, which is far from any linear map between
the highest and the lowest noise levels. A mixture of subspaces is not: there even the exact
posterior mean is far from its Wiener filter at low noise, and the Gaussian structure is a
property of images, not of diffusion.

References:
    Li, Dai, Qu 2024, "Understanding generalizability of diffusion models requires rethinking the
    hidden Gaussian structure", arXiv 2410.24060, sections 3-4 and theorem 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import (
    check_int,
    check_shape,
    check_time,
    fail,
    is_concrete,
)
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.corruption import LOG_SNR_LIMIT
from lowdim_diffusion.distributions import Gaussian
from lowdim_diffusion.generalization._inputs import level_times
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.sharding import example_keys
from lowdim_diffusion.subspaces.angles import affinity

_RESERVE = 2  # noisy directions per dimension: with fewer, the fit is badly conditioned


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _examples(where: str, x: ArrayLike, least: int = 1) -> Array:
    """The examples as floats, refused if too few, empty or not finite."""
    x = jnp.asarray(x)
    if x.ndim < 2 or 0 in x.shape[1:] or x.shape[0] < least:
        raise fail(where, "wrong shape of x", f"(N, *data) with N >= {least}", x.shape)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if is_concrete(x) and not bool(jnp.all(jnp.isfinite(x))):
        raise fail(where, "x is not finite", "finite entries", "NaN or infinity")
    return x


def _blocks(num: int, block: int) -> tuple[int, int]:
    """Number and size of nearly equal blocks; the last one may reach beyond the end."""
    num_blocks = math.ceil(num / block)
    return num_blocks, math.ceil(num / num_blocks)


def _drawn(key: PRNGKey, x: Array, index: Array, draw: Array) -> tuple[Array, Array, Array]:
    """Examples, their noise of one draw, and which of them there are; the last one stands in."""
    keys = example_keys(jax.random.fold_in(key, draw), index)
    eps = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
    return x[jnp.minimum(index, len(x) - 1)], eps, index < len(x)


def _denoised(where: str, denoise_fn: DenoiseFn, x_t: Array, t: Array) -> Array:
    y = denoise_fn(x_t, t)
    check_shape(where, "what denoise_fn returned", y, x_t.shape, "a denoiser keeps the shape")
    return y.astype(x_t.dtype)


def _norm(x: Array) -> Array:
    """Euclidean norm of ``[..., *data]`` over the last axis; keeps NaN, finite derivative at 0."""
    squared = jnp.sum(x**2, axis=-1)
    return jnp.where(jnp.isnan(squared), squared, safe_sqrt(squared))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LinearDenoiser:
    """A denoiser that is affine at each of T noise levels: ``x0_hat = W_i x_t + b_i`` at ``ts[i]``.

    Between two levels it mixes theirs linearly in the log-SNR, each applied to
    ``x_t alpha(ts[i]) / alpha(t)``, the input at its own scale; beyond the outer levels it is the
    outer one. A pytree.

    Attributes:
        schedule: the noise schedule that ``t`` refers to.
        ts: ``[T]``, in any order.
        weight: ``[T, n, n]``.
        bias: ``[T, n]``.
    """

    schedule: Any
    ts: Array
    weight: Array
    bias: Array

    def __call__(self, x_t: Float[Array, "b *data"], t: Any) -> Float[Array, "b *data"]:
        """Return the denoised examples; ``t`` is a scalar or ``[b]``."""
        check_time("LinearDenoiser", t, x_t.shape[0])
        dim = self.bias.shape[-1]
        if math.prod(x_t.shape[1:]) != dim:
            fix = "it was made from examples of another size"
            raise fail("LinearDenoiser", "size of an example", dim, x_t.shape[1:], fix)
        flat = x_t.reshape(x_t.shape[0], dim)
        level, size = self._position(self.ts)
        order = jnp.argsort(level)
        at, own_size = self._position(jnp.asarray(t, self.ts.dtype))
        hats = jnp.eye(len(order), dtype=level.dtype)[:, order]
        share = jax.vmap(lambda hat: jnp.interp(at, level[order], hat))(hats)  # [T] or [T, b]
        scaled = share * jnp.expand_dims(size, tuple(range(1, share.ndim))) / own_size[None]
        share, scaled = share.astype(flat.dtype), scaled.astype(flat.dtype)
        weight, bias = self.weight.astype(flat.dtype), self.bias.astype(flat.dtype)
        if share.ndim == 1:
            mixed = jnp.tensordot(scaled, weight, 1, precision="highest")
            out = _matmul(flat, mixed.T) + _matmul(share, bias)[None]
        else:

            def add(out: Array, level: tuple[Array, ...]) -> tuple[Array, None]:
                share, scaled, w, b = level
                return out + scaled[:, None] * _matmul(flat, w.T) + share[:, None] * b[None], None

            out, _ = jax.lax.scan(add, jnp.zeros_like(flat), (share, scaled, weight, bias))
        return out.reshape(x_t.shape)

    def _position(self, t: Array) -> tuple[Array, Array]:
        """Log-SNR and signal scale, both bounded where there is no signal or no noise."""
        level = jnp.clip(self.schedule.log_snr(t), -LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        floor = self.schedule.sigma(t) * math.exp(-LOG_SNR_LIMIT / 2)
        return level, jnp.maximum(self.schedule.alpha(t), floor)


def wiener_filter(p: Gaussian, schedule: Schedule, ts: Any) -> LinearDenoiser:
    """Return the exact denoiser of a Gaussian with its weights written out, to compare them.

    ``W = alpha C (alpha^2 C + sigma^2 I)^{-1}`` and ``b = (I - alpha W) m``; for use as a denoiser
    alone ``p.denoiser(schedule)`` is cheaper, and exact at all times.

    Args:
        p: e.g. ``Gaussian.fit(data)``.
        schedule: noise schedule.
        ts: ``[T]``, times in (0, t_max].

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> p = distributions.Gaussian(jnp.ones(1), jnp.ones((1, 1)))
        >>> found = wiener_filter(p, schedules.VE(), [1.0, 3.0])
        >>> [f"{w:.2f} x + {b:.2f}" for w, b in zip(found.weight[:, 0, 0], found.bias[:, 0])]
        ['0.50 x + 0.50', '0.10 x + 0.90']
    """
    dtype = p.mean.dtype
    ts = jnp.atleast_1d(level_times("wiener_filter", schedule, ts, dtype))
    origin = jnp.zeros((1, *p.mean.shape), dtype)

    def level(t: Array) -> tuple[Array, Array]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        weight = p.posterior_jacobian(origin, alpha, sigma)[0]
        return weight, p.posterior_mean(origin, alpha, sigma)[0]

    return LinearDenoiser(schedule, ts, *jax.lax.map(level, ts))


def distill_linear(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x: ArrayLike,
    *,
    num_draws: int = 8,
    block: int = 256,
) -> LinearDenoiser:
    r"""Return the affine denoiser nearest to ``denoise_fn`` in mean square, at each noise level.

    .. math:: \min_{W, b} \sum_{i, j} \| W x_{ij} + b - D(x_{ij}, t) \|^2, \qquad
       x_{ij} = \alpha x_i \pm \sigma \epsilon_{ij},

    solved in closed form from one pass over the noisy examples at each level. Each noise comes with
    both signs, which removes the error of the means and what the even part of D adds. Before
    products are summed, the inputs are whitened by their exact covariance
    ``alpha^2 C + sigma^2 I``, and the Wiener filter of ``x`` is taken off: the normal equations
    have a condition number of about one and only what is left has to be fitted, so that float32 is
    enough from sigma = 0.002 to 80 and for data of any rank.

    An affine denoiser is found to rounding, whatever the noise. Otherwise the relative error of W
    is about ``sqrt(n / (2 N num_draws))`` times the share of D that is not linear.

    Args:
        key: draws the noise; that of example i, draw j is of ``fold_in(fold_in(key, j), i)``, at
            all levels and for any ``block``.
        denoise_fn: any denoiser; a trained network, an exact posterior mean.
        schedule: the noise schedule that ``t`` refers to.
        ts: scalar or ``[T]``, times in (0, t_max]; published are the ten levels of
            ``karras_grid(10)[:-1]``.
        x: clean examples ``[N, *data]``, best ones that the network was not trained on.
        num_draws: noises per example, each with both signs. ``N (num_draws + 1) >= 2 n``.
        block: examples whose noisy versions are in memory together; ``2 block`` go through the
            denoiser at once. Beyond that, memory is ``T n^2`` for the result and a few ``n^2``.

    Returns:
        A :class:`LinearDenoiser`: itself a denoiser, with ``weight`` ``[T, n, n]``.

    Raises:
        ValueError: for examples that are empty, not finite or too few for n unknown directions, a
            time without noise or beyond the schedule, a denoiser that changes the shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> x = jax.random.normal(jax.random.key(1), (32, 2))
        >>> shrink = lambda x_t, t: 0.5 * x_t + 1.0
        >>> found = distill_linear(jax.random.key(0), shrink, schedules.VE(), [0.1, 10.0], x)
        >>> abs(found.weight[1]).round(3).tolist(), found.bias[1].round(3).tolist()
        ([[0.5, 0.0], [0.0, 0.5]], [1.0, 1.0])

    References:
        Li, Dai, Qu 2024, arXiv 2410.24060, section 3.2, where W and b are trained by Adam.
    """
    where = "distill_linear"
    x = _examples(where, x)
    check_int(where, "num_draws", num_draws)
    check_int(where, "block", block)
    ts = jnp.atleast_1d(level_times(where, schedule, ts, x.dtype))
    num, shape = x.shape[0], x.shape[1:]
    dim = math.prod(shape)
    if num * (num_draws + 1) < _RESERVE * dim:
        fix = f"num_draws of {math.ceil(_RESERVE * dim / num) - 1} or more examples"
        got = f"{num} examples x ({num_draws} draws + 1)"
        raise fail(where, "too few noisy examples", f"at least 2 n = {_RESERVE * dim}", got, fix)
    num_blocks, block = _blocks(num, block)
    p = Gaussian.fit(x)
    mean, basis, var = p.mean, p.basis, p.scales**2

    def level(t: Array) -> tuple[Array, Array]:
        alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)
        var_t = alpha**2 * var + sigma**2
        along = lambda values: _matmul(basis * values[None], basis.T)
        wiener = along(alpha * var / var_t)
        whiten = along(jax.lax.rsqrt(var_t) - 1 / sigma) + jnp.eye(dim, dtype=x.dtype) / sigma
        whiten_data = along(alpha * jax.lax.rsqrt(var_t))  # alpha whiten, on the span of the data

        def add(sums: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
            index = i // num_draws * block + jnp.arange(block)
            clean, eps, real = _drawn(key, x, index, i % num_draws)
            noise = jnp.concatenate([sigma * eps, -sigma * eps])
            both = lambda a: jnp.concatenate([a, a])
            x_t = both(alpha * clean) + noise
            noise = (x_t - both(alpha * clean)).reshape(-1, dim)  # as it was rounded
            centred = clean.reshape(-1, dim) - mean[None]
            y = _denoised(where, denoise_fn, x_t, t).reshape(-1, dim) - mean[None]
            rest = y - _matmul(both(alpha * centred) + noise, wiener)
            u = both(_matmul(centred, whiten_data)) + _matmul(noise, whiten)
            rest, u = (jnp.where(both(real)[:, None], a, 0) for a in (rest, u))
            gram, cross, offset = sums
            return (gram + _matmul(u.T, u), cross + _matmul(u.T, rest), offset + rest.sum(0)), None

        square, row = jnp.zeros((dim, dim), x.dtype), jnp.zeros(dim, x.dtype)
        sums, _ = jax.lax.scan(add, (square, square, row), jnp.arange(num_blocks * num_draws))
        gram, cross, offset = (s / (2 * num * num_draws) for s in sums)
        factor = jax.scipy.linalg.cho_factor(gram)
        weight = wiener + _matmul(whiten, jax.scipy.linalg.cho_solve(factor, cross)).T
        return weight, mean + offset - alpha * _matmul(weight, mean)

    return LinearDenoiser(schedule, ts, *jax.lax.map(level, ts))


class WeightComparison(NamedTuple):
    """How two linear denoisers differ at each of their T noise levels."""

    nmse: Float[Array, " T"]
    """``||W_a - W_b||_F^2 / ||W_b||_F^2``."""
    affinity: Float[Array, " T"]
    """Of their leading left singular subspaces: 1 if equal, about ``sqrt(rank / n)`` by chance."""


def compare_weights(a: LinearDenoiser, b: LinearDenoiser, *, rank: int = 100) -> WeightComparison:
    """Return the distance of the weights of ``a`` from those of ``b``, and of what they keep.

    Near sigma = 0 every good denoiser is the identity: no directions lead there, and the affinity
    says nothing. Nor does it where ``rank`` exceeds the rank of the data.

    Args:
        a: e.g. from :func:`distill_linear`.
        b: at the same ``ts``, e.g. from :func:`wiener_filter`.
        rank: directions compared, the published 100 by default; at most n.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> make = lambda w: LinearDenoiser(schedules.VE(), jnp.ones(1), w[None], jnp.zeros((1, 2)))
        >>> found = compare_weights(make(1.1 * jnp.eye(2)), make(jnp.eye(2)), rank=1)
        >>> print(f"{found.nmse[0]:.3f} {found.affinity[0]:.3f}")
        0.010 1.000
    """
    where = "compare_weights"
    check_shape(where, "the weights of b", b.weight, a.weight.shape, "distil both at the same ts")
    dim = a.weight.shape[-1]
    check_int(where, "rank", rank)
    rank = min(rank, dim)
    squared = lambda w: jnp.sum(w**2, axis=(1, 2))
    size = squared(b.weight)
    nmse = squared(a.weight - b.weight) / jnp.where(size > 0, size, 1)
    leading = lambda w: jnp.linalg.svd(w, full_matrices=False)[0][:, :rank]
    pairs = (a.weight, b.weight)
    return WeightComparison(
        nmse, jax.lax.map(lambda w: affinity(leading(w[0]), leading(w[1])), pairs)
    )


class LinearityScore(NamedTuple):
    """Is the denoised combination the combination of the denoised? Shaped like ``ts``."""

    cosine: Array
    """Mean of ``|cos|`` of the angle between the two; 1 if linear."""
    error: Array
    """Mean of the norm of their difference over the norm of the first; 0 if linear."""


def linearity_score(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x: ArrayLike,
    *,
    coefficients: Sequence[float] = (0.5**0.5, 0.5**0.5),
    about: ArrayLike | None = None,
    num_tuples: int = 100,
    block: int = 64,
) -> LinearityScore:
    r"""Return how nearly linear a denoiser is on its own inputs, at each noise level.

    .. math:: \mathrm{LS}(t) = E\, \Big| \cos\big( D(\textstyle\sum_k c_k x_k),
       \sum_k c_k D(x_k) \big) \Big|, \qquad \textstyle\sum_k c_k^2 = 1,

    with independent noisy examples x_k, so that the combination has the noise level (and the
    covariance) of its parts. As published there are two of equal weight, and D is taken as it is:
    a linear D scores 1, but an affine one with bias b is off by ``(sum c - 1) b``, and where the
    mean of the data is large it dominates both vectors.

    The combination 2/3, 2/3, -1/3 also sums to one: it keeps the mean as well, and every *affine*
    denoiser scores 1. With ``about`` the mean of the data, the angle is that of the deviations from
    it, which says more than the angle of two images that are both mostly their mean::

        linearity_score(..., coefficients=(2 / 3, 2 / 3, -1 / 3), about=x.mean(0))

    At low noise every good denoiser is near the identity and scores 1.

    Args:
        key: draws examples and noise, the same at all levels.
        denoise_fn: the denoiser.
        schedule: the noise schedule that ``t`` refers to.
        ts: scalar or ``[T]``, times in (0, t_max].
        x: clean examples ``[N, *data]``, at least as many as coefficients.
        coefficients: weights of the combination, their squares adding up to 1.
        about: ``[*data]``, subtracted from both vectors before they are compared; None for nothing.
        num_tuples: combinations to average over, 100 in the paper.
        block: combinations denoised at once.

    Raises:
        ValueError: for coefficients that change the noise level, too few examples, a time without
            noise or beyond the schedule.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> key, x = jax.random.key(0), jnp.eye(4)
        >>> halve, clip = lambda x, t: x / 2, lambda x, t: jnp.clip(x, -1, 1)
        >>> score = lambda fn: linearity_score(key, fn, schedules.VE(), 2.0, x).cosine
        >>> print(f"{score(halve):.3f} {score(clip):.1f}")
        1.000 0.9

    References:
        Li, Dai, Qu 2024, arXiv 2410.24060, eq. (6) (the cosine) and appendix (the error).
    """
    where = "linearity_score"
    c = np.asarray(coefficients, np.float64)
    if c.ndim != 1 or not abs(np.sum(c**2) - 1) < 1e-6:
        fix = "e.g. (0.5**0.5, 0.5**0.5), or (2/3, 2/3, -1/3) for affine denoisers"
        raise fail(where, "bad coefficients", "squares that add up to 1", coefficients, fix)
    x = _examples(where, x, len(c))
    check_int(where, "num_tuples", num_tuples)
    check_int(where, "block", block)
    num, shape = x.shape[0], x.shape[1:]
    center = jnp.zeros(shape, x.dtype) if about is None else jnp.asarray(about, x.dtype)
    check_shape(where, "about", center, shape, "one example, such as x.mean(0)")
    ts = level_times(where, schedule, ts, x.dtype)
    c = jnp.asarray(c, x.dtype)
    combine = lambda a: jnp.einsum("k,bk...->b...", c, a, precision="highest")
    num_blocks, block = _blocks(num_tuples, block)
    order_key, noise_key = jax.random.split(key)
    order = jax.random.permutation(order_key, num)

    def level(t: Array) -> LinearityScore:
        alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)

        def some(i: Array) -> tuple[Array, Array]:
            index = i * block + jnp.arange(block)
            rows = order[(len(c) * index[:, None] + jnp.arange(len(c))[None]) % num]
            keys = example_keys(noise_key, index)
            eps = jax.vmap(lambda k: jax.random.normal(k, (len(c), *shape), x.dtype))(keys)
            x_t = alpha * x[rows] + sigma * eps
            x_t = jnp.concatenate([x_t, combine(x_t)[:, None]], axis=1)
            y = _denoised(where, denoise_fn, x_t.reshape(-1, *shape), t).reshape(x_t.shape)
            a, b = y[:, -1] - center[None], combine(y[:, :-1]) - center[None]
            a, b = a.reshape(block, -1), b.reshape(block, -1)
            size, tiny = _norm(a), jnp.finfo(x.dtype).tiny
            cosine = jnp.sum(a * b, axis=1) / jnp.maximum(size * _norm(b), tiny)
            return jnp.abs(cosine), _norm(a - b) / jnp.maximum(size, tiny)

        found = jax.lax.map(some, jnp.arange(num_blocks))
        return LinearityScore(*(f.reshape(-1)[:num_tuples].mean() for f in found))

    return jax.tree.map(lambda f: f.reshape(ts.shape), jax.lax.map(level, ts.reshape(-1)))


def denoiser_rmse(
    key: PRNGKey,
    denoise_a: DenoiseFn,
    denoise_b: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x: ArrayLike,
    *,
    num_draws: int = 1,
    block: int = 256,
) -> Array:
    r"""Return how far two denoisers are apart on the same noisy examples, shaped like ``ts``.

    .. math:: E_{x_0, \epsilon} \sqrt{ \| D_a(x_t, t) - D_b(x_t, t) \|^2 / n }

    Args:
        key: draws the noise, as in :func:`distill_linear`.
        denoise_a: one denoiser.
        denoise_b: the other; swapping them changes nothing.
        schedule: the noise schedule that ``t`` refers to.
        ts: scalar or ``[T]``, times in (0, t_max].
        x: clean examples ``[N, *data]``.
        num_draws: noises per example.
        block: examples denoised at once.

    Raises:
        ValueError: for examples that are empty or not finite, a time without noise or beyond the
            schedule, a denoiser that changes the shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> a, b = lambda x, t: x, lambda x, t: x + 0.25
        >>> x, ts = jnp.zeros((5, 3)), jnp.array([0.1, 1.0])
        >>> denoiser_rmse(jax.random.key(0), a, b, schedules.VE(), ts, x).round(4).tolist()
        [0.25, 0.25]

    References:
        Li, Dai, Qu 2024, arXiv 2410.24060, section 3.2 ("score difference").
    """
    where = "denoiser_rmse"
    x = _examples(where, x)
    check_int(where, "num_draws", num_draws)
    check_int(where, "block", block)
    ts = level_times(where, schedule, ts, x.dtype)
    num, shape = x.shape[0], x.shape[1:]
    num_blocks, block = _blocks(num, block)

    def level(t: Array) -> Array:
        alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)

        def add(total: Array, i: Array) -> tuple[Array, None]:
            index = i // num_draws * block + jnp.arange(block)
            clean, eps, real = _drawn(key, x, index, i % num_draws)
            x_t = alpha * clean + sigma * eps
            a, b = (_denoised(where, fn, x_t, t) for fn in (denoise_a, denoise_b))
            return total + jnp.where(real, _norm((a - b).reshape(block, -1)), 0).sum(), None

        total, _ = jax.lax.scan(add, jnp.zeros((), x.dtype), jnp.arange(num_blocks * num_draws))
        return total / (num * num_draws * math.prod(shape) ** 0.5)

    return jax.lax.map(level, ts.reshape(-1)).reshape(ts.shape)
