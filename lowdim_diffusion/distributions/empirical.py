r"""The empirical distribution of a data set, whose denoiser is the memorising optimum.

.. math::

   x_0 \sim \tfrac1N\sum_i \delta_{y_i},\qquad
   w_i(x) = \operatorname{softmax}_i\big(-\|x - a y_i\|^2 / 2 s^2\big),\qquad
   D(x) = \sum_i w_i y_i,\qquad \frac{dD}{dx} = \frac{a}{s^2}\sum_i w_i (y_i - D)(y_i - D)^T .

Every sum runs over the data in blocks with a running maximum (streaming log-sum-exp), so neither
``[b, N, n]`` nor, for the mean and the score, ``[b, N]`` is ever stored. Distances are sums of
squared differences: expanding the square is faster but loses ``eps ||x||^2 / s^2`` in the exponent,
everything at small noise.

The mean of many points is that of matrix products instead. About a center c the exponent is

.. math:: \big(2a\langle y_i - c, x - ac\rangle - a^2\|y_i - c\|^2\big) / 2s^2 + \text{const}

and rounds by about ``eps a ||x - a c|| ||y_i - c|| / s^2``. Where that is too much, the exponents
of the largest few are computed again about the nearest point, ``c = y_0``, which keeps their
digits at any noise; where these few do not hold all the weight, differences decide as above.

References:
    Zhang, Zhou, Lu, Guo, Wang, Shen, Qu 2023, arXiv 2310.05264 (section on the theoretical
    optimum); Karras et al. 2022, arXiv 2206.00364, eq. (57).
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, PRNGKey
from lowdim_diffusion.distributions._base import (
    Distribution,
    noisy_arguments,
    real_array,
    register_pytree,
    resolvable_noise,
    set_fields,
)
from lowdim_diffusion.linalg import log_2pi

_HIGHEST = jax.lax.Precision.HIGHEST
_MANY = 512  # points from which, and numbers per point beyond which, the mean is of products
_FEW = 16
_CANDIDATES = 32
_LOGIT_ERROR = 4e-4  # of a weight, relative; that of squared differences is about as much


@register_pytree
@dataclass(frozen=True, eq=False, init=False)
class Empirical(Distribution):
    """Uniform distribution on the rows of ``data``; a duplicate counts as often as it occurs.

    Many data (CIFAR) are better handed to a jitted function as an argument, the distribution or its
    denoiser, than closed over: then XLA makes no copy of them.

    Args:
        data: ``[N, *shape]``, N >= 1. Points ``x`` may be ``[b, *shape]`` or flattened.
        block_size: rows of the data that are visited at once. A keyword; not a leaf of the pytree.

    Raises:
        ValueError: if ``data`` is empty or has no data axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> p = Empirical(jnp.array([[-1.0], [1.0]]))
        >>> print(p.posterior_mean(jnp.array([[0.5]]), 1.0, 1.0).round(6))  # tanh(x / sigma^2)
        [[0.462117]]
    """

    min_steps = 72
    """Its flow is stiff: with 18 Heun steps 4 % of the noises end on another point than with 288,
    with 72 at most 0.4 % (digits)."""

    data: Float[Array, "num *shape"]
    block_size: int = field(metadata={"static": True})

    def __init__(self, data: ArrayLike, *, block_size: int = 1024) -> None:
        if np.ndim(data) < 2 or 0 in np.shape(data):
            fix = "give one row per example, data[:, None] for scalars"
            raise fail("Empirical", "wrong shape of data", "(num, *shape)", np.shape(data), fix)
        check_int("Empirical", "block_size", block_size)
        set_fields(self, data=real_array(data), block_size=block_size)

    def sample(
        self, key: PRNGKey, num_samples: int
    ) -> tuple[Float[Array, "num_samples *shape"], Int[Array, " num_samples"]]:
        """Return ``(x0 [num_samples, *shape], labels)``; the labels are rows of the data."""
        check_int("Empirical.sample", "num_samples", num_samples)
        labels = jax.random.randint(key, (num_samples,), 0, self.data.shape[0])
        return self.data[labels], labels

    def log_prob(
        self, x: ArrayLike, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0
    ) -> Float[Array, " b"]:
        """Return the log-density ``[b]`` of ``alpha x_0 + sigma eps`` at ``x: [b, *data]``.

        At ``sigma = 0`` there is no density: minus infinity off the points, plus infinity on them
        (within rounding).
        """
        flat, a, s = self._arguments("Empirical.log_prob", x, alpha, sigma)
        num, dim = self._rows.shape
        floored = self._floored(flat, s)
        largest, total, _ = self._sealed(flat)._reduce(flat, a, floored, with_mean=False)
        regular = (
            largest + jnp.log(total) - math.log(num) - dim * (0.5 * log_2pi() + jnp.log(floored))
        )
        eps = jnp.finfo(flat.dtype).eps
        nearest = floored * jnp.sqrt(-2 * jax.lax.stop_gradient(largest))
        on_point = nearest <= 4 * eps * jnp.linalg.norm(jax.lax.stop_gradient(flat), axis=-1)
        return jnp.where(s > 0, regular, jnp.where(on_point, jnp.inf, -jnp.inf))

    def score(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> Float[Array, "b *data"]:
        """Return ``(alpha D(x) - x) / sigma^2``, shaped like ``x: [b, *data]``; for ``sigma > 0``.

        At ``sigma = 0`` the value is the one at the smallest noise that the rounding of ``x``
        resolves.
        """
        flat, a, s = self._arguments("Empirical.score", x, alpha, sigma)
        s = self._floored(flat, s)
        mean = self._sealed(flat)._mean(flat, a, s)
        return ((a[:, None] * mean - flat) / s[:, None] / s[:, None]).reshape(jnp.shape(x))

    def posterior_mean(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b *data"]:
        """Return the weighted mean of the data, shaped like ``x: [b, *data]``.

        As ``sigma -> 0`` (and at 0) it is the nearest point, exact ties averaged; without signal it
        is the mean of the data.
        """
        flat, a, s = self._arguments("Empirical.posterior_mean", x, alpha, sigma)
        return self._sealed(flat)._mean(flat, a, self._floored(flat, s)).reshape(jnp.shape(x))

    def posterior_weights(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b num"]:
        """Return ``w: [b, N]``, the probability of each data point given ``x``; rows sum to 1."""
        flat, a, s = self._arguments("Empirical.posterior_weights", x, alpha, sigma)
        s = self._floored(flat, s)
        num = self.data.shape[0]

        def body(logits: Array, i: Array) -> tuple[Array, None]:
            rows, _, start = self._block(i, flat.dtype)
            return jax.lax.dynamic_update_slice_in_dim(
                logits, _logits(flat, rows, a, s), start, axis=1
            ), None

        logits = jnp.zeros((flat.shape[0], num), flat.dtype)
        logits, _ = jax.lax.scan(body, logits, jnp.arange(self._num_blocks))
        return jax.nn.softmax(logits, axis=-1)

    def posterior_jacobian(
        self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> Float[Array, "b dim dim"]:
        """Return ``(alpha / sigma^2) Cov_w(y)``: ``[b, n, n]``, symmetric, PSD."""
        flat, a, s = self._arguments("Empirical.posterior_jacobian", x, alpha, sigma)
        s = self._floored(flat, s)
        # Moments about the mean of a first pass; what its weights and these differ by in rounding
        # cancels in `second - first first^T`, which uses one set of weights only.
        reference = self._mean(flat, a, s)
        dim = flat.shape[-1]

        def one(args: tuple[Array, ...]) -> Array:
            x, a, s, reference = args

            def body(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
                largest, total, first, second = carry
                rows, fresh, _ = self._block(i, x.dtype)
                logits = _logits(x[None], rows, a[None], s[None])[0]
                larger, rescale, w = _running_softmax(largest, logits, fresh)
                spread = (rows - reference[None]) / s
                weighted = w[:, None] * spread
                total = total * rescale + jnp.sum(w)
                first = first * rescale + jnp.sum(weighted, axis=0)
                update = jnp.matmul(weighted.T, spread, precision=_HIGHEST)
                return (larger, total, first, second * rescale + update), None

            zero = jnp.zeros((), x.dtype)
            carry = (zero - jnp.inf, zero, jnp.zeros_like(x), jnp.zeros((dim, dim), x.dtype))
            carry, _ = jax.lax.scan(jax.checkpoint(body), carry, jnp.arange(self._num_blocks))
            _, total, first, second = carry
            first, second = first / total, second / total
            return a * (0.5 * (second + second.T) - first[:, None] * first[None, :])

        return jax.lax.map(one, (flat, a, s, reference))

    def moments(self) -> tuple[Float[Array, " dim"], Float[Array, "dim dim"]]:
        """Return the mean ``[n]`` and covariance ``[n, n]`` (divided by N) of the data."""
        mean = jnp.mean(self._rows, axis=0)
        centred = self._rows - mean[None]
        covariance = jnp.matmul(centred.T, centred, precision=_HIGHEST) / centred.shape[0]
        return mean, covariance

    def _sealed(self, x: Array) -> "Empirical":
        """Itself; where ``x`` is traced and the data are not, with data that XLA does not fold.

        Data that a jitted function closes over are constants of its program, of which the compiler
        makes several copies: 7 GB for 50,000 CIFAR images, 2.6 with this.
        """
        if is_concrete(x) or not is_concrete(self.data):
            return self
        return jax.lax.optimization_barrier(self)

    @property
    def _rows(self) -> Array:
        return self.data.reshape(self.data.shape[0], -1)

    @property
    def _num_blocks(self) -> int:
        return -(-self.data.shape[0] // self.block_size)

    def _arguments(
        self, where: str, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike
    ) -> tuple[Array, Array, Array]:
        return noisy_arguments(where, x, alpha, sigma, self.data, math.prod(self.data.shape[1:]))

    @staticmethod
    def _floored(x: Array, sigma: Array) -> Array:
        return jnp.where(sigma > 0, sigma, resolvable_noise(x))

    def _block(self, i: Array, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
        """Rows of block ``i``, which of them no earlier block had, and the number of the first.

        The last block reaches back over rows already seen instead of beyond the end.
        """
        rows = self._rows
        size = min(self.block_size, rows.shape[0])
        start = jnp.minimum(i * size, rows.shape[0] - size)
        fresh = start + jnp.arange(size) >= i * size
        return jax.lax.dynamic_slice_in_dim(rows, start, size).astype(dtype), fresh, start

    def _mean(self, x: Array, a: Array, s: Array) -> Array:
        num, dim = self._rows.shape
        if num < _MANY or dim <= _FEW:
            return self._direct_mean(x, a, s)
        some = jax.lax.stop_gradient(self._rows[:: max(num // 256, 1)]).astype(x.dtype)
        center = jnp.mean(some, axis=0)
        size = jnp.sqrt(jnp.max(jnp.sum((some - center[None]) ** 2, axis=-1)))
        frozen = jax.lax.stop_gradient((x, a, s))
        away = jnp.linalg.norm(frozen[0] - frozen[1][:, None] * center[None], axis=-1)
        rounding = 2 * jnp.finfo(x.dtype).eps * frozen[1] * away * size
        least = jnp.sqrt(rounding / _LOGIT_ERROR)
        coarse = frozen[2] >= least
        nothing = lambda x, a, s: jnp.zeros_like(x)
        # Both sides see noise that they can bear: what is not taken must not give NaN derivatives.
        products = lambda x, a, s: self._product_mean(x, a, jnp.maximum(s, least), center)
        differences = lambda x, a, s: self._near_mean(x, a, s, center, coarse)
        # Checkpoints: a derivative would keep what either branch may need.
        products, differences = jax.checkpoint(products), jax.checkpoint(differences)
        by_products = jax.lax.cond(jnp.any(coarse), products, nothing, x, a, s)
        by_differences = jax.lax.cond(jnp.all(coarse), nothing, differences, x, a, s)
        return jnp.where(coarse[:, None], by_products, by_differences)

    def _direct_mean(self, x: Array, a: Array, s: Array) -> Array:
        _, total, sums = self._reduce(x, a, s, with_mean=True)
        return sums / total[:, None]

    def _product_mean(self, x: Array, a: Array, s: Array, center: Array) -> Array:
        """The mean with exponents about ``center``."""

        def body(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
            largest, total, sums = carry
            rows, fresh, _ = self._block(i, x.dtype)
            rows = rows - center[None]
            larger, rescale, w = _running_softmax(
                largest, _centred_logits(x, rows, a, s, center), fresh
            )
            sums = sums * rescale[:, None] + jnp.matmul(w, rows, precision=_HIGHEST)
            return (larger, total * rescale + jnp.sum(w, axis=-1), sums), None

        lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros_like(x))
        carry, _ = jax.lax.scan(jax.checkpoint(body), carry, jnp.arange(self._num_blocks))
        return center[None] + carry[2] / carry[1][:, None]

    def _near_mean(self, x: Array, a: Array, s: Array, center: Array, skip: Array) -> Array:
        """The mean over the few nearest points where they hold all weight, else over all."""
        num, dim = self._rows.shape
        keep = _CANDIDATES
        y, b = jax.lax.stop_gradient((x, a))
        one = jnp.ones_like(b)

        def body(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            rows, fresh, start = self._block(i, x.dtype)
            half = _centred_logits(y, jax.lax.stop_gradient(rows) - center[None], b, one, center)
            half = jnp.where(fresh[None], half, -jnp.inf)
            places = jnp.broadcast_to(start + jnp.arange(rows.shape[0]), half.shape)
            best, at = jax.lax.top_k(jnp.concatenate([carry[0], half], axis=1), keep)
            places = jnp.concatenate([carry[1], places], axis=1)
            return (best, jnp.take_along_axis(places, at, axis=1)), None

        shape = (x.shape[0], keep)
        carry = (jnp.full(shape, -jnp.inf, x.dtype), jnp.zeros(shape, jnp.arange(1).dtype))
        (best, index), _ = jax.lax.scan(body, carry, jnp.arange(self._num_blocks))

        def refined(args: tuple[Array, ...]) -> tuple[Array, Array]:
            x, a, s, best, index, skip = args
            near = self._rows[index].astype(x.dtype)
            squared = jnp.sum((x[None] - a * near) ** 2, axis=-1)
            first = near[jnp.argmin(jax.lax.stop_gradient(squared))]
            step = first[None] - near
            inner = jnp.matmul(step, x - a * first, precision=_HIGHEST)
            logits = -(a * inner + 0.5 * a**2 * jnp.sum(step**2, axis=-1)) / s / s
            w = jax.nn.softmax(logits)
            # Of the points left out, each has a distance of at least that of the last one kept.
            away = jnp.sum((x - a * center) ** 2)
            slack = 4 * dim**0.5 * jnp.finfo(x.dtype).eps * (away + jnp.min(squared))
            left_out = 0.5 * away - best[-1] - slack - 0.5 * jnp.min(squared)
            negligible = left_out / s / s > math.log(num) + 12
            return first - jnp.matmul(w, step, precision=_HIGHEST), negligible | skip

        # Few at a time: [b, candidates, n] is never stored.
        few = max(min(2**21 // (keep * dim), x.shape[0]), 1)
        args = (x, a, s, best, index, skip)
        mean, enough = jax.lax.map(jax.checkpoint(refined), args, batch_size=few)
        direct = lambda x, a, s, mean: jnp.where(enough[:, None], mean, self._direct_mean(x, a, s))
        return jax.lax.cond(jnp.all(enough), lambda x, a, s, mean: mean, direct, x, a, s, mean)

    def _reduce(
        self, x: Array, a: Array, s: Array, *, with_mean: bool
    ) -> tuple[Array, Array, Array]:
        """Return the largest logit, ``sum_i e_i``, ``sum_i e_i y_i``; e = exp(logit - largest)."""

        def body(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
            largest, total, sums = carry
            rows, fresh, _ = self._block(i, x.dtype)
            larger, rescale, w = _running_softmax(largest, _logits(x, rows, a, s), fresh)
            total = total * rescale + jnp.sum(w, axis=-1)
            if with_mean:
                sums = sums * rescale[:, None] + jnp.matmul(w, rows, precision=_HIGHEST)
            return (larger, total, sums), None

        lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros_like(x))
        carry, _ = jax.lax.scan(jax.checkpoint(body), carry, jnp.arange(self._num_blocks))
        return carry


def _logits(x: Array, rows: Array, a: Array, s: Array) -> Array:
    """``-||x - a y||^2 / 2 s^2`` for points ``x [b, n]`` and ``rows [m, n]``: ``[b, m]``."""
    difference = x[:, None, :] - a[:, None, None] * rows[None]
    squared = jnp.sum(difference**2, axis=-1)
    return -0.5 * (squared / s[:, None] / s[:, None])


def _centred_logits(x: Array, rows: Array, a: Array, s: Array, center: Array) -> Array:
    """``_logits`` up to a constant per point; ``rows`` are centred already."""
    inner = jnp.matmul(x - a[:, None] * center[None], rows.T, precision=_HIGHEST)
    size = 0.5 * jnp.sum(rows**2, axis=-1)
    return a[:, None] * (inner - a[:, None] * size[None]) / s[:, None] / s[:, None]


def _running_softmax(largest: Array, logits: Array, fresh: Array) -> tuple[Array, Array, Array]:
    """Return the new maximum, the factor for sums kept so far, and ``exp(logits - maximum)``."""
    logits = jnp.where(fresh.reshape((1,) * (logits.ndim - 1) + fresh.shape), logits, -jnp.inf)
    larger = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    return larger, jnp.exp(largest - larger), jnp.exp(logits - larger[..., None])
