"""The noncentral chi-square distribution, which jax does not have."""

import jax
import jax.numpy as jnp

from lowdim_diffusion._types import Array, ArrayLike

_TERMS = 512


def noncentral_chi2_cdf(x: ArrayLike, df: ArrayLike, noncentrality: ArrayLike) -> Array:
    r"""Return ``P(X <= x)`` for the sum of ``df`` squares of unit normal numbers of given means.

    .. math:: \sum_j \operatorname{Poisson}(j; \lambda/2)\, P(\chi^2_{k + 2 j} \le x),
        \qquad \lambda = \sum \text{means}^2 .

    The sum runs around its saddle point, ``j`` near ``lambda u / 2`` with
    ``k u + lambda u^2 = x``, and where it is wide over every few j: it is as smooth as a normal
    density, whose sums over a regular grid are exact.

    Args:
        x: >= 0; broadcasts with the others.
        df: k > 0.
        noncentrality: lambda >= 0.
    """
    x, df, noncentrality = jnp.broadcast_arrays(*map(jnp.asarray, (x, df, noncentrality)))
    dtype = jnp.result_type(x, df, noncentrality, jnp.float32)
    x, df, rate = x.astype(dtype), df.astype(dtype), noncentrality.astype(dtype) / 2
    tilt = 2 * x / (df + jnp.sqrt(df**2 + 8 * rate * x))
    middle = rate * jnp.minimum(tilt, 1)
    stride = jnp.maximum(jnp.ceil(20 * jnp.sqrt(middle) / _TERMS), 1)
    first = jnp.maximum(jnp.floor(middle - stride * _TERMS / 2), 0)
    terms = jnp.arange(_TERMS, dtype=dtype).reshape(*(1,) * x.ndim, _TERMS)
    j = first[..., None] + stride[..., None] * terms
    log_weight = jax.scipy.special.xlogy(j, rate[..., None]) - rate[..., None]
    weight = jnp.exp(log_weight - jax.lax.lgamma(j + 1))
    below = jax.scipy.special.gammainc(df[..., None] / 2 + j, x[..., None] / 2)
    return jnp.minimum(stride * jnp.sum(weight * below, axis=-1), 1)
