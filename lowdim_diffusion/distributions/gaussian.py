r"""Gaussian with a low-rank plus isotropic covariance, and its exact probability flow.

.. math:: x_0 \sim N(m,\; F F^T + \delta^2 I),\qquad F F^T = U \operatorname{diag}(\lambda) U^T .

One singular value decomposition of F, at construction, gives U and lambda; the rest is the
one-component case of :mod:`lowdim_diffusion.distributions.molrg`. In particular the posterior mean
is the Wiener filter

.. math:: D(x) = m + C a (a^2 C + s^2 I)^{-1} (x - a m),\qquad C = F F^T + \delta^2 I ,

the best denoiser that is affine in ``x`` for any data with this mean and covariance. The
probability-flow ODE moves each eigendirection by the ratio of its standard deviations:

.. math:: x' = a' m + (a'^2 C + s'^2 I)^{1/2} (a^2 C + s^2 I)^{-1/2} (x - a m).

References:
    Li, Dai, Qu 2024, arXiv 2410.24060 (theorem 1; section 5 of the closed-form flow);
    Song et al. 2021, arXiv 2011.13456 (the probability-flow ODE).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, PRNGKey
from lowdim_diffusion.distributions._base import (
    Distribution,
    noisy_arguments,
    real_array,
    register_pytree,
    resolvable_noise,
    set_fields,
)
from lowdim_diffusion.distributions.molrg import MoLRG
from lowdim_diffusion.linalg import safe_sqrt

_HIGHEST = jax.lax.Precision.HIGHEST


@register_pytree
@dataclass(frozen=True, eq=False, init=False)
class Gaussian(Distribution):
    """Gaussian with covariance ``cov_factor cov_factor^T + noise_std^2 I``.

    The factor is stored in canonical form: the same covariance, orthogonal columns by decreasing
    length, those below rounding set to zero. Derivatives with respect to the *given* factor pass
    through an SVD and fail where singular values coincide; to learn a covariance, differentiate a
    one-component :class:`MoLRG` instead.

    Args:
        mean: ``[n]``.
        cov_factor: ``[n, d]``, any d >= 1 and any rank; zero is allowed.
        noise_std: isotropic standard deviation, >= 0.

    Raises:
        ValueError: on shapes that do not fit or a negative ``noise_std``.

    Examples:
        >>> import jax.numpy as jnp
        >>> p = Gaussian(jnp.zeros(2), jnp.array([[1.0], [0.0]]))
        >>> print(p.posterior_mean(jnp.array([[1.0, 1.0]]), 1.0, 1.0))
        [[0.5 0. ]]
    """

    mean: Float[Array, " dim"]
    cov_factor: Float[Array, "dim rank"]
    noise_std: Float[Array, ""]

    def __init__(self, mean: ArrayLike, cov_factor: ArrayLike, noise_std: ArrayLike = 0.0) -> None:
        check_shape("Gaussian", "mean", mean, (None,), "flatten the data axes")
        check_shape(
            "Gaussian", "cov_factor", cov_factor, (np.shape(mean)[0], None), "give [dim, rank]"
        )
        check_shape("Gaussian", "noise_std", noise_std, ())
        check_range("Gaussian", "noise_std", noise_std, 0, high_open=True)
        if 0 in np.shape(cov_factor):
            raise fail("Gaussian", "empty cov_factor", "at least one column", np.shape(cov_factor))
        factor = real_array(cov_factor)
        u, s, _ = jnp.linalg.svd(factor, full_matrices=False)
        set_fields(
            self,
            mean=jnp.asarray(mean, factor.dtype),
            cov_factor=u * _without_rounding(s, max(factor.shape))[None, :],
            noise_std=jnp.asarray(noise_std, factor.dtype),
        )

    @classmethod
    def fit(
        cls, data: ArrayLike, *, rank: int | None = None, noise_std: ArrayLike = 0.0
    ) -> "Gaussian":
        """Return the Gaussian with the mean and covariance (divided by N) of ``data: [N, *shape]``.

        Its denoiser is the Wiener filter of the data, the optimum among affine denoisers at every
        noise level. The factor comes from the singular values of the centred data, never from a
        covariance.

        Args:
            data: ``[N, *shape]``; each example is flattened to n numbers.
            rank: keep only the leading directions; ``min(N, n)`` if None.
            noise_std: isotropic standard deviation added on top.

        References:
            Li, Dai, Qu 2024, arXiv 2410.24060, theorem 1.
        """
        data = real_array(data)
        if data.ndim < 2 or 0 in data.shape:
            raise fail("Gaussian.fit", "wrong shape of data", "(num, *shape)", data.shape)
        data = data.reshape(data.shape[0], -1)
        num, dim = data.shape
        largest = min(num, dim)
        if rank is not None:
            check_int("Gaussian.fit", "rank", rank)
            if rank > largest:
                raise fail("Gaussian.fit", "rank too large", f"at most {largest}", rank)
        check_range("Gaussian.fit", "noise_std", noise_std, 0, high_open=True)
        mean = jnp.mean(data, axis=0)
        mean = mean + jnp.mean(data - mean[None], axis=0)  # the second pass removes rounding
        rows = data - mean[None]
        if num > dim:  # R has the singular values and right vectors of the tall matrix
            rows = jnp.linalg.qr(rows, mode="r")
        _, s, vt = jnp.linalg.svd(rows, full_matrices=False)
        s = _without_rounding(s, max(num, dim)) / num**0.5
        factor = (vt.T * s[None, :])[:, :rank]
        noise_std = jnp.asarray(noise_std, data.dtype)
        p = object.__new__(cls)
        return set_fields(p, mean=mean, cov_factor=factor, noise_std=noise_std)

    @property
    def scales(self) -> Float[Array, " rank"]:
        """``[d]``, standard deviations along :attr:`basis` without the floor, descending."""
        return safe_sqrt(jnp.sum(self.cov_factor**2, axis=0))

    @property
    def basis(self) -> Float[Array, "dim rank"]:
        """``[n, d]``, orthonormal eigenvectors of the covariance; zero where the scale is zero."""
        scales = self.scales
        return self.cov_factor / jnp.where(scales > 0, scales, 1)[None, :]

    def sample(
        self, key: PRNGKey, num_samples: int
    ) -> tuple[Float[Array, "num_samples dim"], Int[Array, " num_samples"]]:
        """Return ``(x0 [num_samples, n], labels)``; the labels are all 0."""
        return self._mixture().sample(key, num_samples)

    def log_prob(
        self, x: ArrayLike, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0
    ) -> Float[Array, " b"]:
        """Return the log-density ``[b]`` at ``x: [b, *data]``.

        Where the covariance is singular there is no density: plus infinity on the support (within
        rounding) and minus infinity off it, the limits of ``sigma -> 0``.
        """
        return self._mixture().log_prob(x, alpha, sigma)

    def score(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> Float[Array, "b *data"]:
        """Return ``-(a^2 C + s^2 I)^{-1} (x - a m)``, shaped like ``x``; see :class:`MoLRG`."""
        return self._mixture().score(x, alpha, sigma)

    def posterior_mean(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b *data"]:
        """Return the Wiener filter of ``x: [b, *data]``, shaped alike; its limit at sigma = 0."""
        return self._mixture().posterior_mean(x, alpha, sigma)

    def posterior_weights(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b components"]:
        """Return ones ``[b, 1]``: there is one component."""
        return self._mixture().posterior_weights(x, alpha, sigma)

    def posterior_jacobian(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b dim dim"]:
        """Return ``a C (a^2 C + s^2 I)^{-1}``, the same matrix for every ``x``: ``[b, n, n]``."""
        return self._mixture().posterior_jacobian(x, alpha, sigma)

    def moments(self) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
        """Return the mean ``[n]`` and covariance ``[n, n]`` of ``x_0``."""
        return self._mixture().moments()

    def mmse(self, alpha: ArrayLike, sigma: ArrayLike) -> Float[Array, "*levels"]:
        r"""Return ``E ||D(x) - x_0||^2``, the least error of any denoiser, for each noise level.

        .. math:: \sum_i \frac{l_i s^2}{a^2 l_i + s^2}, \qquad l_i \text{ the n eigenvalues of } C .

        Args:
            alpha: any shape.
            sigma: a shape that broadcasts with ``alpha``, not both 0.
        """
        dtype, dim = self.mean.dtype, self.mean.shape[0]
        alpha, sigma = jnp.broadcast_arrays(jnp.asarray(alpha, dtype), jnp.asarray(sigma, dtype))
        floor = self.noise_std**2
        alpha, sigma = alpha[..., None], sigma[..., None]

        def error(eigenvalue: Array) -> Array:
            total = alpha**2 * eigenvalue + sigma**2
            return eigenvalue * sigma**2 / jnp.where(total > 0, total, 1)

        var = jnp.expand_dims(self.scales**2, tuple(range(alpha.ndim - 1)))
        along = jnp.sum(error(var + floor), axis=-1)
        return along + (dim - self.scales.shape[0]) * error(floor)[..., 0]

    def flow(
        self,
        x: ArrayLike,
        alpha_from: ArrayLike,
        sigma_from: ArrayLike,
        alpha_to: ArrayLike,
        sigma_to: ArrayLike,
    ) -> Float[Array, "b *data"]:
        """Return where the probability-flow ODE takes ``x`` from one noise level to another.

        Exact in one step, in both directions; the map depends on the two levels only, not on the
        schedule between them. A direction without variance at the starting level stays at the mean.

        Args:
            x: ``[b, *data]``, points at level ``(alpha_from, sigma_from)``.
            alpha_from: scalar or ``[b]``.
            sigma_from: scalar or ``[b]``.
            alpha_to: scalar or ``[b]``.
            sigma_to: scalar or ``[b]``; 0 lands on the data.

        Examples:
            >>> import jax.numpy as jnp
            >>> p = Gaussian(jnp.zeros(1), jnp.ones((1, 1)))
            >>> print(p.flow(jnp.array([[5.0]]), 1.0, 3.0, 1.0, 0.0).round(4))
            [[1.5811]]

        References:
            Li, Dai, Qu 2024, arXiv 2410.24060, section 5.
        """
        dim = self.mean.shape[0]
        shape = jnp.shape(x)
        x, a0, s0 = noisy_arguments("Gaussian.flow", x, alpha_from, sigma_from, self.mean, dim)
        _, a1, s1 = noisy_arguments("Gaussian.flow", x, alpha_to, sigma_to, self.mean, dim)
        basis, var, floor = self.basis, self.scales**2, self.noise_std**2
        base0, base1 = a0**2 * floor + s0**2, a1**2 * floor + s1**2
        base0 = jnp.where(base0 > 0, base0, resolvable_noise(x) ** 2)
        across = safe_sqrt(base1 / base0)
        top0 = a0[:, None] ** 2 * var[None] + base0[:, None]
        along = safe_sqrt((a1[:, None] ** 2 * var[None] + base1[:, None]) / top0)
        centred = x - a0[:, None] * self.mean[None]
        c = jnp.matmul(centred, basis, precision=_HIGHEST)
        residual = centred - jnp.matmul(c, basis.T, precision=_HIGHEST)
        moved = jnp.matmul(along * c, basis.T, precision=_HIGHEST) + across[:, None] * residual
        return (a1[:, None] * self.mean[None] + moved).reshape(shape)

    def _mixture(self) -> MoLRG:
        """The same law as a mixture of one component, built without checks."""
        one = jnp.ones(1, self.mean.dtype)
        return set_fields(
            object.__new__(MoLRG),
            bases=self.basis[None],
            weights=one,
            means=self.mean[None],
            scales=self.scales[None],
            noise_std=self.noise_std,
        )


def _without_rounding(s: Array, size: int) -> Array:
    """``s`` with those values set to zero that are rounding, for a matrix with this longer side."""
    return jnp.where(s > jnp.finfo(s.dtype).eps * size**0.5 * jnp.max(s), s, 0)
