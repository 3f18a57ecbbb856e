r"""The exact posterior of a linear measurement ``y = A x_0 + s n`` of a mixture of Gaussians.

For a component with mean m and covariance ``C = L L^T`` write ``B = [A L, s I]``, so that y has
covariance ``S = A C A^T + s^2 I = B B^T``. With the singular value decomposition
``B = P diag(b) V^T`` and Q those rows of V that belong to L,

.. math::

   G &= C A^T S^{-1} = L\, Q\, b^{-1} P^T, \qquad E[x_0 | y] = m + G (y - A m),\\
   \operatorname{Cov}[x_0 | y] &= F F^T, \qquad F = [(I - G A) L,\; s G],\\
   \log N(y; A m, S) &= -\tfrac12 \sum_i \big[ (P^T (y - A m))_i^2 / b_i^2
       + \log (2 \pi b_i^2)\big],

which never forms S and so keeps the digits that squaring would lose. Components are weighted by
``pi_k N(y; A m_k, S_k)``.

Without noise, with less variance than measurements, some b are zero. They are raised to the
rounding of the largest, the limit of ever smaller noise: of the components that explain y, the one
with the fewest dimensions wins.

References:
    Bishop 2006, *Pattern recognition and machine learning*, eqs. (2.113)-(2.117).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, PRNGKey, Scalar
from lowdim_diffusion.distributions._base import real_array, register_pytree
from lowdim_diffusion.distributions.gaussian import Gaussian
from lowdim_diffusion.distributions.molrg import MoLRG, _safe_log
from lowdim_diffusion.linalg import log_2pi

__all__ = ["Posterior", "condition"]

_HIGHEST = jax.lax.Precision.HIGHEST


@register_pytree
@dataclass(frozen=True, eq=False)
class Posterior:
    """The law of ``x_0`` given measurements ``y: [b, m]``: for each y a mixture of K Gaussians.

    Attributes:
        weights: ``[b, K]``, the probability of each component given y.
        means: ``[b, K, n]``, the components' means given y.
        factors: ``[K, n, r]``; ``factors factors^T`` are the components' covariances given y, which
            do not depend on y. r is the prior's rank plus m, and plus n if it has a floor.
        log_evidence: ``[b]``, the log-density of y.
    """

    weights: Float[Array, "b components"]
    means: Float[Array, "b components dim"]
    factors: Float[Array, "components dim r"]
    log_evidence: Float[Array, " b"]

    def mean(self) -> Float[Array, "b dim"]:
        """Return ``E[x_0 | y]``, the least-squares optimal estimate."""
        return jnp.einsum("bk,bkn->bn", self.weights, self.means, precision=_HIGHEST)

    def covariance(self) -> Float[Array, "b dim dim"]:
        """Return ``Cov[x_0 | y]``, within and between components."""
        factors = self.factors
        within = jnp.einsum("bk,knr,kmr->bnm", self.weights, factors, factors, precision=_HIGHEST)
        spread = self.means - self.mean()[:, None, :]
        between = "bk,bkn,bkm->bnm"
        return within + jnp.einsum(between, self.weights, spread, spread, precision=_HIGHEST)

    def variance(self) -> Float[Array, " b"]:
        """Return the trace of the covariance, the least mean squared error of any estimate."""
        within = jnp.matmul(self.weights, jnp.sum(self.factors**2, (1, 2)), precision=_HIGHEST)
        spread = self.means - self.mean()[:, None, :]
        return within + jnp.sum(self.weights * jnp.sum(spread**2, -1), -1)

    def sample(
        self, key: PRNGKey, num_samples: int
    ) -> tuple[Float[Array, "num_samples b dim"], Int[Array, "num_samples b"]]:
        """Return exact, independent draws ``[num_samples, b, n]`` and the components' labels."""
        check_int("Posterior.sample", "num_samples", num_samples)
        label_key, inner_key = jax.random.split(key)
        batch, num_components, _ = self.means.shape
        shape = (num_samples, batch)
        labels = jax.random.categorical(label_key, _safe_log(self.weights)[None], shape=shape)
        chosen = jax.nn.one_hot(labels, num_components, dtype=self.means.dtype)
        inner = jax.random.normal(inner_key, (*shape, self.factors.shape[-1]), self.means.dtype)
        means = jnp.einsum("sbk,bkn->sbn", chosen, self.means, precision=_HIGHEST)
        spread = [
            chosen[..., k, None] * jnp.matmul(inner, factor.T, precision=_HIGHEST)
            for k, factor in enumerate(self.factors)
        ]
        return means + sum(spread), labels

    def log_prob(self, x: Float[Array, "b dim"]) -> Float[Array, " b"]:
        """Return the log-density at ``x: [b, n]``, one point for each y.

        A posterior on a subspace has no density; its value is that of the law with noise at
        rounding added, large on the subspace and very negative off it.
        """
        batch, _, dim = self.means.shape
        check_shape("Posterior.log_prob", "x", x, (batch, dim), "one point per measurement")
        missing = max(dim - self.factors.shape[-1], 0)
        factors = jnp.pad(self.factors, ((0, 0), (0, 0), (0, missing)))
        left, spread, _ = jnp.linalg.svd(factors, full_matrices=False)
        log_parts = _log_normal(left, _raised(spread), x[:, None, :] - self.means)
        return jax.nn.logsumexp(log_parts, axis=-1, b=self.weights)


def condition(
    p: Gaussian | MoLRG, a: ArrayLike, y: ArrayLike, noise_std: Scalar = 0.0
) -> Posterior:
    """Return the exact law of ``x_0`` given ``y = a x_0 + noise_std n``.

    The noise is standard normal and the prior a :class:`Gaussian` or a :class:`MoLRG`. For measured
    images take ``a = operator.matrix()``. Costs K singular value decompositions of
    ``[m, rank + n + m]``, or of ``[m, rank + m]`` if the prior is known to have no floor.

    Args:
        p: the prior.
        a: ``[m, n]``, any rank.
        y: ``[b, *measurement]`` of m numbers each.
        noise_std: standard deviation, >= 0.

    Raises:
        ValueError: on shapes that do not fit, or negative noise.
        TypeError: for a prior that is neither.

    Examples:
        >>> import jax.numpy as jnp
        >>> p = MoLRG(bases=jnp.eye(2)[:, :, None])  # the two axes of the plane
        >>> given = condition(p, jnp.array([[1.0, 0.0]]), jnp.array([[0.5]]), noise_std=0.1)
        >>> print(given.weights.round(2), given.mean().round(2))  # noise alone would not do
        [[1. 0.]] [[0.5 0. ]]
    """
    where = "condition"
    if isinstance(p, Gaussian):
        p = p._mixture()
    if not isinstance(p, MoLRG):
        raise TypeError(f"{where}: p must be a Gaussian or a MoLRG, got {type(p).__name__}.")
    _, dim, _ = p.bases.shape
    check_shape(where, "a", a, (None, dim), "one row per measured number, one column per entry")
    check_range(where, "noise_std", noise_std, 0, high_open=True)
    y = real_array(y)
    num_rows = jnp.shape(a)[0]
    if y.ndim < 2 or math.prod(y.shape[1:]) != num_rows:
        expected = f"(b, *measurement) with {num_rows} numbers each"
        raise fail(where, "wrong shape of y", expected, y.shape, "y[None] for one measurement")
    dtype = jnp.result_type(y.dtype, p.bases.dtype)
    a, y = jnp.asarray(a, dtype), y.reshape(y.shape[0], -1).astype(dtype)
    noise_std = jnp.asarray(noise_std, dtype)

    matmul = lambda u, v: jnp.matmul(u, v, precision=_HIGHEST)
    prior = (p.bases * p.scales[:, None, :]).astype(dtype)
    if not (is_concrete(p.noise_std) and np.asarray(p.noise_std) == 0):
        floor = p.noise_std.astype(dtype) * jnp.eye(dim, dtype=dtype)
        prior = jnp.concatenate([prior, jnp.broadcast_to(floor, (len(prior), dim, dim))], -1)
    seen = matmul(a, prior)
    noise = jnp.broadcast_to(
        noise_std * jnp.eye(num_rows, dtype=dtype), (*seen.shape[:2], num_rows)
    )
    left, spread, right = jnp.linalg.svd(jnp.concatenate([seen, noise], -1), full_matrices=False)
    raised = _raised(spread)
    inverse = jnp.where(spread < raised, 0, 1 / raised)
    right = right[:, :, : prior.shape[-1]] * inverse[..., None]
    gain = matmul(matmul(prior, jnp.swapaxes(right, -1, -2)), jnp.swapaxes(left, -1, -2))

    means = p.means.astype(dtype)
    residual = y[:, None, :] - matmul(means, a.T)[None]
    log_parts = _log_normal(left, raised, residual) + _safe_log(p.weights).astype(dtype)[None]
    moved = jnp.einsum("knm,bkm->bkn", gain, residual, precision=_HIGHEST)
    return Posterior(
        jax.nn.softmax(log_parts, axis=-1),
        means[None] + moved,
        jnp.concatenate([prior - matmul(gain, seen), noise_std * gain], -1),
        jax.nn.logsumexp(log_parts, axis=-1),
    )


def _raised(spread: Array) -> Array:
    """Singular values ``[K, m]``, those below rounding raised to it."""
    largest = jnp.max(spread)
    return jnp.maximum(spread, jnp.maximum(10 * jnp.finfo(spread.dtype).eps * largest, 1e-12))


def _log_normal(left: Array, spread: Array, residual: Array) -> Array:
    """Log-densities ``[b, K]`` of ``N(0, left spread^2 left^T)`` at residuals ``[b, K, m]``."""
    turned = jnp.einsum("kmi,bkm->bki", left, residual, precision=_HIGHEST) / spread[None]
    log_scale = jnp.sum(jnp.log(spread), -1) + 0.5 * spread.shape[-1] * log_2pi()
    return -0.5 * jnp.sum(turned**2, -1) - log_scale[None]
