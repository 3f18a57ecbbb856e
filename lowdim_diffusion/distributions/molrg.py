r"""Mixture of low-rank Gaussians, the model in which diffusion learns subspaces.

.. math:: x_0 \sim \sum_k \pi_k\, N(m_k,\; U_k \operatorname{diag}(\lambda_k) U_k^T + \delta^2 I),
   \qquad \lambda_{k,i} = \text{scales}_{k,i}^2,\quad \delta = \text{noise\_std}.

For ``x = a x_0 + s eps`` write ``base = a^2 delta^2 + s^2``, ``top_k = a^2 lambda_k + base``,
``c_k = U_k^T (x - a m_k)`` and ``r_k = x - a m_k - U_k c_k``. Then

.. math::

   \log p_k(x) &= -\tfrac12\Big[n\log(2\pi\, base) + \sum_i \log(top_{k,i}/base)
       + \sum_i c_{k,i}^2/top_{k,i} + \|r_k\|^2/base\Big],\\
   w &= \operatorname{softmax}_k(\log\pi_k + \log p_k),\\
   score(x) &= -\sum_k w_k\,(U_k\, c_k/top_k + r_k/base),\\
   E_k &= m_k + U_k\,(a\lambda_k/top_k)\,c_k, \qquad
   D(x) = \frac{a\delta^2}{base}\,x + \frac{s^2}{base}\sum_k w_k E_k,\\
   \frac{dD}{dx} &= \frac{a\delta^2}{base} I
       + \frac{s^2}{base}\sum_k w_k U_k \operatorname{diag}(a\lambda_k/top_k) U_k^T
       + \frac{a s^2}{base^2}\sum_k w_k (E_k - \bar E)(E_k - \bar E)^T .

The last line is symmetric and positive semi-definite term by term and divides by neither ``a`` nor
``s`` alone, so it holds at ``a = 0`` and at ``s = 0``. The residual ``r_k`` is formed as a vector:
``||x||^2 - ||c||^2`` would cancel. Cost and memory are ``b K n d`` and ``b K n``; an n x n matrix
appears only in :meth:`MoLRG.posterior_jacobian` and :meth:`MoLRG.moments`.

References:
    Wang, Zhang, Zhang, Chen, Ma, Qu 2024, arXiv 2409.02426 (the model, lemma 1);
    Chen, Zhang, Guo, Lu, Wang, Qu 2024, arXiv 2409.02374 (lemma 2, the Jacobian).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, PRNGKey
from lowdim_diffusion.distributions._base import (
    Distribution,
    noisy_arguments,
    real_array,
    register_pytree,
    resolvable_noise,
    set_fields,
)
from lowdim_diffusion.linalg import check_frames, log_2pi

_HIGHEST = jax.lax.Precision.HIGHEST


class _Parts(NamedTuple):
    """The quantities of the module's formulas at one batch of points."""

    x: Array  # [b, n]
    alpha: Array  # [b]
    sigma: Array  # [b], raised to the resolvable noise where base would be 0
    base: Array  # [b], > 0
    degenerate: Array  # [b], whether base was 0
    bases: Array  # [K, n, d], columns of zero scale set to 0
    top: Array  # [b, K, d], > 0
    gain: Array  # [b, K, d], a lambda / top
    coefficients: Array  # [b, K, d], c
    residual: Array  # [b, K, n], r
    rank: Array  # [K], number of nonzero scales
    log_ratio: Array  # [b, K], log pi_k + log p_k - log_common
    log_common: Array  # [b], log-density of N(0, base I) at 0

    @property
    def weights(self) -> Array:
        return jax.nn.softmax(self.log_ratio, axis=-1)


@register_pytree
@dataclass(frozen=True, eq=False, init=False)
class MoLRG(Distribution):
    """Mixture of K low-rank Gaussians on subspaces that need not be orthogonal to each other.

    Args:
        bases: ``[K, n, d]``, orthonormal columns within each component.
        weights: ``[K]``, >= 0, brought to sum 1; uniform if None.
        means: ``[K, n]``; zero if None.
        scales: ``[K, d]`` standard deviations along the columns, >= 0; one if None. A zero scale
            drops its direction, which is how components of unequal rank are written.
        noise_std: standard deviation, >= 0, of isotropic noise that belongs to the data (the
            floor).

    Raises:
        ValueError: on shapes that do not fit, negative scales or weights, or columns that are
            visibly not orthonormal (values are checked outside ``jit`` only).

    Examples:
        >>> import jax.numpy as jnp
        >>> p = MoLRG(bases=jnp.eye(2)[:, :, None])  # the two axes of the plane
        >>> x = jnp.array([[1.0, 0.0]])
        >>> print([f"{w:.3f}" for w in p.posterior_weights(x, 1.0, 1.0)[0]])
        ['0.562', '0.438']
        >>> print([f"{v:.3f}" for v in p.posterior_mean(x, 1.0, 1.0)[0]])
        ['0.281', '0.000']

    References:
        Wang et al. 2024, arXiv 2409.02426.
    """

    bases: Float[Array, "components dim rank"]
    weights: Float[Array, " components"]
    means: Float[Array, "components dim"]
    scales: Float[Array, "components rank"]
    noise_std: Float[Array, ""]

    def __init__(
        self,
        bases: ArrayLike,
        weights: ArrayLike | None = None,
        means: ArrayLike | None = None,
        scales: ArrayLike | None = None,
        noise_std: ArrayLike = 0.0,
    ) -> None:
        where = "MoLRG"
        check_shape(where, "bases", bases, (None, None, None), "give [components, dim, rank]")
        num_components, dim, rank = np.shape(bases)
        if num_components < 1 or not 1 <= rank <= dim:
            expected = "at least one component and 1 <= rank <= dim"
            raise fail(where, "impossible shape of bases", expected, np.shape(bases))
        scales = np.ones((num_components, rank)) if scales is None else scales
        means = np.zeros((num_components, dim)) if means is None else means
        weights = np.full(num_components, 1 / num_components) if weights is None else weights
        check_shape(where, "scales", scales, (num_components, rank), "one per column of each basis")
        check_shape(where, "means", means, (num_components, dim))
        check_shape(where, "weights", weights, (num_components,))
        check_shape(where, "noise_std", noise_std, ())
        check_range(where, "scales", scales, 0, high_open=True)
        check_range(where, "weights", weights, 0, high_open=True)
        check_range(where, "noise_std", noise_std, 0, high_open=True)
        if is_concrete(weights) and not np.any(np.asarray(weights) > 0):
            raise fail(where, "weights are all zero", "at least one positive", np.asarray(weights))
        if is_concrete(bases) and is_concrete(scales):
            _check_orthonormal(where, np.asarray(bases), np.asarray(scales))
        bases = real_array(bases)
        weights = jnp.asarray(weights, bases.dtype)
        set_fields(
            self,
            bases=bases,
            weights=weights / jnp.sum(weights),
            means=jnp.asarray(means, bases.dtype),
            scales=jnp.asarray(scales, bases.dtype),
            noise_std=jnp.asarray(noise_std, bases.dtype),
        )

    @classmethod
    def noisy(
        cls, bases: ArrayLike, cross_std: ArrayLike, weights: ArrayLike | None = None
    ) -> "MoLRG":
        r"""Return the mixture whose examples have noise in the other components' subspaces.

        .. math:: x_0 = U_k a + \delta \sum_{l \ne k} U_l e_l, \qquad
            a, e_l \sim N(0, I_d),

        the model of classes that share what is not their own, for mutually orthogonal subspaces.

        Args:
            bases: ``[K, n, d]``, ``[U_1 .. U_K]`` orthonormal together, which needs ``K d <= n``;
                zero columns are left out, which is how unequal ranks are written.
            cross_std: delta >= 0.
            weights: ``[K]``, as for the class.

        Raises:
            ValueError: (outside ``jit``) for subspaces that are not orthogonal.

        Examples:
            >>> import jax.numpy as jnp
            >>> MoLRG.noisy(jnp.eye(2)[:, :, None], 0.1).scales.round(3).tolist()
            [[1.0, 0.100...], [1.0, 0.100...]]

        References:
            Li et al. 2025, arXiv 2502.05743 ("noisy MoLRG").
        """
        where = "MoLRG.noisy"
        check_shape(where, "bases", bases, (None, None, None), "give [components, dim, rank]")
        check_shape(where, "cross_std", cross_std, ())
        check_range(where, "cross_std", cross_std, 0, high_open=True)
        bases = real_array(bases)
        num, dim, rank = bases.shape
        if is_concrete(bases):
            check_frames(
                where, "[U_1 .. U_K]", np.moveaxis(np.asarray(bases), 0, 1).reshape(dim, -1)
            )
        own_first = jnp.stack([jnp.roll(bases, -k, axis=0) for k in range(num)])
        columns = jnp.moveaxis(own_first, 1, 2).reshape(num, dim, num * rank)
        sizes = jnp.full(num * rank, cross_std, bases.dtype).at[:rank].set(1)
        scales = jnp.where(jnp.any(columns != 0, axis=1), sizes[None], 0)
        return cls(columns, weights, scales=scales)

    def sample(
        self, key: PRNGKey, num_samples: int
    ) -> tuple[Float[Array, "num_samples dim"], Int[Array, " num_samples"]]:
        """Return ``(x0 [num_samples, n], labels [num_samples])``."""
        check_int("MoLRG.sample", "num_samples", num_samples)
        label_key, inner_key, noise_key = jax.random.split(key, 3)
        num_components, dim, rank = self.bases.shape
        labels = jax.random.categorical(label_key, _safe_log(self.weights), shape=(num_samples,))
        inner = jax.random.normal(inner_key, (num_samples, rank), self.bases.dtype)
        noise = jax.random.normal(noise_key, (num_samples, dim), self.bases.dtype)
        chosen = jax.nn.one_hot(labels, num_components, dtype=self.bases.dtype)
        coefficients = chosen[:, :, None] * (self.scales[labels] * inner)[:, None, :]
        x0 = jnp.einsum("knd,bkd->bn", self.bases, coefficients, precision=_HIGHEST)
        return x0 + self.means[labels] + self.noise_std * noise, labels

    def log_prob(
        self, x: ArrayLike, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0
    ) -> Float[Array, " b"]:
        """Return the log-density ``[b]`` of ``alpha x_0 + sigma eps`` at ``x: [b, *data]``.

        Where the law has no density (no floor, ``sigma = 0``, rank below n) this is the limit
        ``sigma -> 0``: plus infinity on the support (within rounding), minus infinity off it.
        """
        q = self._parts("MoLRG.log_prob", x, alpha, sigma)
        dim = q.x.shape[-1]
        size = jnp.linalg.norm(q.x, axis=-1)[:, None]
        size = size + q.alpha[:, None] * jnp.linalg.norm(self.means, axis=-1)[None, :]
        tolerance = 10 * jnp.finfo(q.x.dtype).eps * dim**0.5 * size
        inside = jnp.linalg.norm(jax.lax.stop_gradient(q.residual), axis=-1) <= tolerance
        limit = jnp.where(inside & (self.weights > 0)[None, :], jnp.inf, -jnp.inf)
        no_density = q.degenerate[:, None] & (q.rank < dim)[None, :]
        log_ratio = jnp.where(no_density, limit, q.log_ratio)
        return jax.nn.logsumexp(log_ratio, axis=-1) + q.log_common

    def score(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> Float[Array, "b *data"]:
        """Return ``grad_x log p(x)``, shaped like ``x: [b, *data]``.

        The score exists for ``sigma > 0`` or a positive floor. Without both, the value is the one
        at the smallest noise that the rounding of ``x`` resolves.
        """
        q = self._parts("MoLRG.score", x, alpha, sigma)
        w = q.weights
        along = w[:, :, None] * q.coefficients / q.top
        across = jnp.einsum("bk,bkn->bn", w, q.residual, precision=_HIGHEST)
        inside = jnp.einsum("knd,bkd->bn", q.bases, along, precision=_HIGHEST)
        return -(inside + across / q.base[:, None]).reshape(jnp.shape(x))

    def posterior_mean(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b *data"]:
        """Return ``E[x_0 | x]``, shaped like ``x: [b, *data]``; at ``sigma = 0`` its limit.

        That limit is ``x / alpha`` with a floor; without one, the projection of ``x / alpha`` onto
        the nearest of the affine subspaces.
        """
        q = self._parts("MoLRG.posterior_mean", x, alpha, sigma)
        w = q.weights
        along = w[:, :, None] * q.gain * q.coefficients
        low_rank = jnp.einsum("knd,bkd->bn", q.bases, along, precision=_HIGHEST)
        low_rank = low_rank + jnp.matmul(w, self.means.astype(w.dtype), precision=_HIGHEST)
        keep, shrink = self._isotropic_gains(q)
        return (keep[:, None] * q.x + shrink[:, None] * low_rank).reshape(jnp.shape(x))

    def posterior_weights(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b components"]:
        """Return ``w: [b, K]``, the probability of each component given ``x``; rows sum to 1."""
        return self._parts("MoLRG.posterior_weights", x, alpha, sigma).weights

    def posterior_jacobian(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b dim dim"]:
        """Return ``d E[x_0|x] / dx = (alpha / sigma^2) Cov[x_0 | x]``: ``[b, n, n]``.

        Symmetric and positive semi-definite. Without a floor its rank is at most the sum of the
        ranks; between two components its eigenvalues may exceed 1.
        """
        q = self._parts("MoLRG.posterior_jacobian", x, alpha, sigma)
        w, dim = q.weights, q.x.shape[-1]
        columns = q.bases.transpose(1, 0, 2).reshape(dim, -1)
        gains = (w[:, :, None] * q.gain).reshape(w.shape[0], 1, -1)
        inside = jnp.matmul(columns[None] * gains, columns.T, precision=_HIGHEST)
        means = jnp.einsum("knd,bkd->bkn", q.bases, q.gain * q.coefficients, precision=_HIGHEST)
        means = means + self.means[None]
        spread = means - jnp.einsum("bk,bkn->bn", w, means, precision=_HIGHEST)[:, None, :]
        spread = spread * (q.sigma / q.base)[:, None, None]
        between = jnp.einsum("bk,bkn,bkm->bnm", w, spread, spread, precision=_HIGHEST)
        keep, shrink = self._isotropic_gains(q)
        jacobian = shrink[:, None, None] * inside + q.alpha[:, None, None] * between
        jacobian = jacobian + keep[:, None, None] * jnp.eye(dim, dtype=w.dtype)[None]
        return 0.5 * (jacobian + jnp.swapaxes(jacobian, -1, -2))

    def moments(self) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
        """Return the mean ``[n]`` and covariance ``[n, n]`` of ``x_0``."""
        dim, w = self.means.shape[-1], self.weights
        mean = jnp.matmul(w, self.means, precision=_HIGHEST)
        spread = self.means - mean[None]
        factors = self.bases * self.scales[:, None, :]
        covariance = jnp.einsum("k,knd,kmd->nm", w, factors, factors, precision=_HIGHEST)
        covariance = covariance + jnp.einsum("k,kn,km->nm", w, spread, spread, precision=_HIGHEST)
        return mean, covariance + self.noise_std**2 * jnp.eye(dim, dtype=w.dtype)

    def _isotropic_gains(self, q: _Parts) -> tuple[Array, Array]:
        """``(a delta^2 / base, s^2 / base)``, each ``[b]``."""
        root = jnp.sqrt(q.base)
        return q.alpha * (self.noise_std / root) ** 2, (q.sigma / root) ** 2

    def _parts(self, where: str, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> _Parts:
        dim = self.bases.shape[-2]
        x, alpha, sigma = noisy_arguments(where, x, alpha, sigma, self.bases, dim)
        var = (self.scales**2).astype(x.dtype)
        active = var > 0
        rank = jnp.sum(active, axis=-1)
        bases = jnp.where(active[:, None, :], self.bases, 0).astype(x.dtype)

        base = (alpha * self.noise_std) ** 2 + sigma**2
        degenerate = base <= 0
        floor = resolvable_noise(x)
        sigma = jnp.where(degenerate, floor, sigma)
        base = jnp.where(degenerate, floor**2, base)
        signal = alpha[:, None, None] ** 2 * var[None]
        top = jnp.where(active[None], signal + base[:, None, None], 1)

        centred = x[:, None, :] - alpha[:, None, None] * self.means[None]
        c = jnp.einsum("knd,bkn->bkd", bases, centred, precision=_HIGHEST)
        residual = centred - jnp.einsum("knd,bkd->bkn", bases, c, precision=_HIGHEST)
        residual = jnp.where((rank < dim)[None, :, None], residual, 0)  # else rounding only

        quadratic = jnp.sum(c**2 / top, -1)
        quadratic = quadratic + jnp.sum((residual / jnp.sqrt(base)[:, None, None]) ** 2, -1)
        # What all components share stays out of their log-ratios: it would round the weights.
        ratio = jnp.where(active[None], signal / base[:, None, None], 0)
        log_ratio = _safe_log(self.weights)[None] - 0.5 * (
            jnp.sum(jnp.log1p(ratio), -1) + quadratic
        )
        log_common = -0.5 * dim * (log_2pi() + jnp.log(base))
        gain = alpha[:, None, None] * var[None] / top
        return _Parts(
            x,
            alpha,
            sigma,
            base,
            degenerate,
            bases,
            top,
            gain,
            c,
            residual,
            rank,
            log_ratio,
            log_common,
        )


def _safe_log(weights: Array) -> Array:
    positive = weights > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, weights, 1)), -jnp.inf)


def _check_orthonormal(where: str, bases: np.ndarray, scales: np.ndarray) -> None:
    """Raise where columns with a nonzero scale are not orthonormal to about three digits."""
    gram = np.einsum("knd,kne->kde", bases, bases, optimize=True)
    used = (scales[:, :, None] > 0) & (scales[:, None, :] > 0)
    error = np.max(np.abs(np.where(used, gram - np.eye(gram.shape[-1]), 0)))
    if not error < 1e-3:
        fix = "orthonormalise with linalg.orthonormalize and put lengths into scales"
        raise fail(
            where, "columns of bases are not orthonormal", "U^T U = I", f"error {error:.2g}", fix
        )
