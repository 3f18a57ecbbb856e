r"""Intrinsic dimension: how many coordinates the data really have, from neighbours or a denoiser.

Near a point of a smooth d-dimensional set the number of neighbours within radius r grows as
``r^d``. With ``T_j`` the distance to the j-th neighbour (the point itself not counted), the k - 1
numbers ``log(T_k / T_j)``, j < k, are then independent and exponential with rate d. Distances
alone carry the estimate. A denoiser knows the same local geometry: near the data it removes noise
across the set and keeps it along it.

====================  ====================================================  ====================
estimator             reads                                                 needs
====================  ====================================================  ====================
:func:`mle`           mean of ``log(T_k / T_j)``                            samples
:func:`two_nn`        distribution of ``T_2 / T_1``                         samples
:func:`local_pca`     spectrum of the covariance of k neighbours            samples, many
:func:`global_pca`    spectrum of the covariance of all                     samples, a flat set
:func:`flipd`         how the density falls when noise is added             a denoiser
:func:`normal_bundle` singular values of scores around a point              a denoiser
:func:`jacobian_rank` singular values of the denoiser's Jacobian            a denoiser
====================  ====================================================  ====================

What to know before comparing numbers. Estimates from neighbours grow with the number of samples
and, for d above about 10, lie below the truth (edges, curvature): compare equal sample sizes only.
The same name covers several normalisers, up to a factor of two apart at k = 3, so state the one
used. PCA counts the dimensions of the *span*, which for curved sets or unions of subspaces is more
than d. The denoiser's estimates hold for noise levels below the scale of the set's structure and
above those the network was trained on: report a curve over t, not one number.

Exact copies among the samples make ``T_1 = 0``: neighbours at distance zero are left out. Without
``jit``, data that give no estimate are an error; under ``jit``, where values cannot raise, NaN.

The search for neighbours is nearly all the work. For several estimates of large data search once:
``near = neighbors(x, 20)``, then ``mle(near, (5, 10, 20))`` and ``two_nn(near)``.

References:
    Levina & Bickel 2004, "Maximum likelihood estimation of intrinsic dimension", NIPS 17;
    MacKay & Ghahramani 2005, comments on it; Facco et al. 2017, doi:10.1038/s41598-017-11873-y;
    Fukunaga & Olsen 1971, doi:10.1109/T-C.1971.223208; Kamkari et al. 2024, arXiv 2406.03537
    (FLIPD); Stanczuk et al. 2024, arXiv 2212.12611 (normal bundle).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import (
    check_choice,
    check_int,
    check_range,
    check_time,
    fail,
    is_concrete,
)
from lowdim_diffusion._types import (
    Array,
    ArrayLike,
    DenoiseFn,
    Float,
    Int,
    PRNGKey,
    Schedule,
)
from lowdim_diffusion.likelihood import jacobian_trace
from lowdim_diffusion.linalg import expand_right
from lowdim_diffusion.neighbors import Nearest, nearest
from lowdim_diffusion.solvers._base import denoise_once
from lowdim_diffusion.subspaces.jacobian import jacobian_spectrum
from lowdim_diffusion.subspaces.spectra import numerical_rank

__all__ = [
    "flipd",
    "global_pca",
    "jacobian_rank",
    "local_pca",
    "mle",
    "neighbors",
    "normal_bundle",
    "two_nn",
]

Average = Literal["inverse", "mean"]
Normalizer = Literal["k-1", "k-2"]
PCARule = Literal["fo", "ratio", "participation"]


# --- Samples -------------------------------------------------------------------------------------


def _prepare(where: str, x: ArrayLike) -> tuple[Float[Array, "num_samples n"], Int[Array, ""]]:
    """Flat examples over a power of two, so that squares neither over- nor underflow; its log."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    if x.ndim < 2 or 0 in x.shape:
        fix = "one example per row; a list of numbers is x[:, None]"
        raise fail(where, "wrong shape of x", "[N, *data], not empty", x.shape, fix)
    concrete = is_concrete(x)
    if concrete:
        bad = int(np.sum(~np.isfinite(np.asarray(x).reshape(len(x), -1)).all(1)))
        if bad:
            got = f"NaN or infinity in {bad} of {len(x)} examples"
            raise fail(where, "values of x", "finite numbers", got, "remove those examples")
    x = x.reshape(len(x), math.prod(x.shape[1:]))
    if x.dtype.kind in "iu":  # exact, and without overflow: differences are taken modulo 2^bits
        x = (x - x.min(0)[None]).astype(f"uint{8 * x.dtype.itemsize}")
        if isinstance(x, np.ndarray) and x.dtype.itemsize == 8:
            x = x.astype(np.float64)  # jax would cut it to 32 bits
    if isinstance(x, np.ndarray) and x.dtype == np.float64:
        x = x - x.mean(0)[None]  # before an offset costs digits in float32
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if not concrete:
        x = jnp.where(jnp.all(jnp.isfinite(x)), x, jnp.nan)  # one bad example is not passed over
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.max(jnp.abs(x))))
    return jnp.ldexp(x, -exponent), exponent


def _search(where: str, x: Array, k: int) -> Nearest:
    """The k nearest other points of each point, itself excluded by index."""
    num = x.shape[0]
    if k >= num:
        fix = "lower k or give more points"
        raise fail(where, "too few points", f"more than the {k} neighbours", num, fix)
    near = nearest(x, x, k + 1)
    own = near.index == jnp.arange(num)[:, None]
    # A point with more than k exact copies may not be on its own list: then the last one goes.
    place = jnp.where(jnp.any(own, axis=1), jnp.argmax(own, axis=1), k)
    kept = jnp.arange(k)[None, :]
    kept = kept + (kept >= place[:, None])
    take = lambda a: jnp.take_along_axis(a, kept, axis=1)
    return Nearest(take(near.distance), take(near.index))


def _distances(where: str, x: ArrayLike | Nearest, k: int) -> Float[Array, "num_samples k"]:
    """Distances to the k nearest other points, up to a common factor."""
    if not isinstance(x, Nearest):
        return _search(where, _prepare(where, x)[0], k).distance
    num, found = x.distance.shape
    if found < k:
        raise fail(where, "too few neighbours", f"at least {k}", found, "search with a larger k")
    if is_concrete(x.index) and bool(jnp.any(x.index == jnp.arange(num)[:, None])):
        fix = "search with dimension.neighbors"
        raise fail(where, "neighbours", "other points", "points that are their own", fix)
    return x.distance[:, :k]


def neighbors(x: ArrayLike, k: int) -> Nearest:
    """Return the k nearest *other* examples of each example, for :func:`mle` and :func:`two_nn`.

    :func:`lowdim_diffusion.neighbors.nearest` of x among itself, each example left out of its own
    list by its index, so that exact copies of it stay, at distance zero.

    Args:
        x: ``[N, *data]``, floats or integers (pixels).
        k: 1 <= k < N.

    Returns:
        ``(distance [N, k], index [N, k])``, nearest first.

    Raises:
        ValueError: if ``k >= N``, or on NaN in x.

    Examples:
        >>> neighbors([[0.0], [1.0], [1.0], [5.0]], 2).index.tolist()
        [[1, 2], [2, 0], [1, 0], [1, 2]]
    """
    check_int("neighbors", "k", k)
    x, exponent = _prepare("neighbors", x)
    distance, index = _search("neighbors", x, k)
    return Nearest(jnp.ldexp(distance, exponent), index)


def _log_ratio(far: Array, near: Array, valid: Array) -> Array:
    return jnp.log(jnp.where(valid, far / jnp.where(valid, near, 1), 1))


def _require(where: str, result: Array, what: str, expected: str, fix: str) -> Array:
    """Raise where a concrete result holds no estimate."""
    if is_concrete(result) and not bool(jnp.all(jnp.isfinite(result))):
        missing = f"none for {int(jnp.sum(~jnp.isfinite(result)))} of {result.size} values"
        raise fail(where, what, expected, missing, fix)
    return result


def mle(
    x: ArrayLike | Nearest,
    k: int | Sequence[int] = 20,
    *,
    average: Average | None = "inverse",
    normalizer: Normalizer | None = None,
) -> Float[Array, "*k"]:
    r"""Return the maximum-likelihood dimension from the k nearest neighbours of each point.

    With ``S_i = sum_{j<k} log(T_k(x_i) / T_j(x_i))``, a sum of k - 1 exponentials of mean 1/d:

    ===========  ==========  ========================  =========================================
    average      normalizer  estimate                  name
    ===========  ==========  ========================  =========================================
    "inverse"    "k-1"       ``(k - 1) / mean_i S_i``  MacKay-Ghahramani; the default, unbiased;
                                                       scikit-dimension's ``MLE()``
    "mean"       "k-2"       ``mean_i (k - 2) / S_i``  unbiased; the default with "mean"
    "mean"       "k-1"       ``mean_i (k - 1) / S_i``  Levina-Bickel; high by (k-1)/(k-2)
    "inverse"    "k-2"       ``(k - 2) / mean_i S_i``  Pope et al. 2021; low by (k-2)/(k-1), at
                                                       k = 3 by half
    None         either      ``(k - 2) / S_i`` each i  unbiased with "k-2", the default
    ===========  ==========  ========================  =========================================

    A point with c neighbours at distance zero counts as one with ``k - c`` neighbours.

    Args:
        x: ``[N, *data]``, floats or integers (pixels), N > k; or what :func:`neighbors` found.
        k: neighbours, the point itself not counted; at least 2 with "k-1" and 3 with "k-2".
            Several at once cost one search.
        average: how the points are combined; None returns every point's estimate.
        normalizer: None for the unbiased one, "k-1" with "inverse", else "k-2".

    Returns:
        ``[]``; ``[len(k)]`` for several k; with ``average=None`` ``[N]`` or ``[len(k), N]``.

    Raises:
        ValueError: if ``k >= N``, on NaN in x, or if nothing can be estimated because all points
            are equal, or (except for "inverse") all k neighbours of a point are equally far.

    Examples:
        >>> import jax
        >>> x = jax.random.uniform(jax.random.key(0), (2000, 2)) @ jax.random.normal(
        ...     jax.random.key(1), (2, 30))
        >>> print(f"{mle(x):.2f}")
        1.9...

    References:
        Levina & Bickel 2004; MacKay & Ghahramani 2005; Pope et al. 2021, arXiv 2104.08894.
    """
    where = "mle"
    check_choice(where, "average", average, ("inverse", "mean", None))
    check_choice(where, "normalizer", normalizer, ("k-1", "k-2", None))
    if normalizer is None:
        normalizer = "k-1" if average == "inverse" else "k-2"
    lost = 1 if normalizer == "k-1" else 2
    ks = [k] if isinstance(k, int | np.integer) else list(k)
    if not ks:
        raise fail(where, "no k", "a number or several", "none")
    for each in ks:
        check_int(where, "k", each, lost + 1, f'normalizer "{normalizer}" must be positive')
    distance = _distances(where, x, max(ks))

    def estimate(k: int) -> Array:
        far, near = distance[:, k - 1 : k], distance[:, : k - 1]
        total = jnp.sum(_log_ratio(far, near, near > 0), axis=1)
        terms = jnp.sum(near > 0, axis=1) + 1 - lost
        usable = (terms > 0) & (far[:, 0] > 0)
        if average == "inverse":
            terms, total = jnp.sum(jnp.where(usable, terms, 0)), jnp.sum(total * usable)
            return _divide(terms, total, total > 0)
        pointwise = _divide(terms, total, usable & (total > 0))
        if average is None:
            return pointwise
        # A point whose neighbours are all equally far has no finite estimate: it may not be hidden.
        return _divide(jnp.sum(jnp.where(usable, pointwise, 0)), jnp.sum(usable), jnp.any(usable))

    result = jnp.stack([estimate(int(each)) for each in ks])
    fix = "remove copies (numpy.unique(x, axis=0)), raise k"
    fix = fix if average == "inverse" else fix + ' or use average="inverse"'
    _require(where, result, "no estimate", "neighbours at different distances", fix)
    return result[0] if isinstance(k, int | np.integer) else result


def _divide(a: Array, b: Array, valid: Array) -> Array:
    """``a / b`` where valid, NaN elsewhere, with finite derivatives."""
    return jnp.where(valid, a / jnp.where(valid, b, 1), jnp.nan)


def two_nn(
    x: ArrayLike | Nearest,
    *,
    method: Literal["fit", "ml", "unbiased"] = "fit",
    discard: float | None = None,
) -> Float[Array, ""]:
    r"""Return the dimension from the ratio ``mu = T_2 / T_1`` of the two nearest distances.

    ``log mu`` is exponential with rate d where the density is constant out to ``T_2``, the least
    that any estimator asks for; noise in the data counts in full at this smallest of scales. With
    the ratios in ascending order and the largest ``discard`` share set aside, m of N remain:

    ==========  ======================================================================  =======
    method      estimate                                                                discard
    ==========  ======================================================================  =======
    "fit"       slope through 0 of ``-log(1 - i/N)`` on ``log mu_(i)``, i <= m          0.1
    "ml"        ``m / (sum_{i<=m} log mu_(i) + (N - m) log mu_(m))``                    0
    "unbiased"  the same with m - 1 on top                                              0
    ==========  ======================================================================  =======

    "fit" is the published method and scikit-dimension's default, "unbiased" its ``method="mle"``.
    Points with an exact copy have no ratio and are left out; N counts the others.

    Args:
        x: ``[N, *data]``, floats or integers (pixels), N >= 3; or what :func:`neighbors` found.
        method: see above.
        discard: share of the largest ratios set aside, in [0, 1); None for the table's value. "fit"
            never uses the very last, where ``1 - i/N`` is 0.

    Raises:
        ValueError: with fewer than two usable points, on NaN in x, or if every ``T_2 = T_1``.

    Examples:
        >>> import jax
        >>> print(f"{two_nn(jax.random.normal(jax.random.key(0), (2000, 3))):.1f}")
        3...

    References:
        Facco, d'Errico, Rodriguez & Laio 2017, doi:10.1038/s41598-017-11873-y;
        Denti et al. 2022, arXiv 2104.13832 (the unbiased estimate).
    """
    where = "two_nn"
    check_choice(where, "method", method, ("fit", "ml", "unbiased"))
    discard = (0.1 if method == "fit" else 0.0) if discard is None else discard
    check_range(where, "discard", discard, 0, 1, high_open=True)
    distance = _distances(where, x, 2)
    num, dtype = distance.shape[0], distance.dtype
    nearer, farther = distance.T
    valid = nearer > 0
    count = jnp.sum(valid)
    kept = jnp.asarray(np.floor(np.arange(num + 1) * (1 - discard)).astype(np.int32))[count]
    if method == "fit":
        kept = jnp.minimum(kept, count - 1)
    log_mu = _log_ratio(farther, nearer, valid)
    log_mu = log_mu[jnp.argsort(jnp.where(valid, log_mu, jnp.inf))]
    rank = jnp.arange(1, num + 1)
    used = rank <= kept
    log_mu = jnp.where(used, log_mu, 0)
    if method == "fit":
        share = (jnp.where(used, rank, 0) / jnp.maximum(count, 1)).astype(dtype)
        top, below = -jnp.sum(log_mu * jnp.log1p(-share)), jnp.sum(log_mu**2)
    else:
        last = log_mu[jnp.maximum(kept - 1, 0)]
        below = jnp.sum(log_mu) + (count - kept).astype(dtype) * last
        top = (kept - (method == "unbiased")).astype(dtype)
    result = _divide(top, below, (kept >= 2) & (below > 0))
    fix = "remove copies (numpy.unique(x, axis=0)), discard less or give more points"
    what = "at least two points whose two neighbours are at different, positive distances"
    return _require(where, result, "no estimate", what, fix)


def _variances(x: Float[Array, "num_samples n"]) -> Float[Array, " m"]:
    """Variances along the principal directions, descending, the largest scaled to 1 (or all 0)."""
    x = x - x.mean(0)[None]
    x = x - x.mean(0)[None]  # the rounding of a large mean
    a = x if x.shape[0] <= x.shape[1] else x.T
    var = jnp.linalg.eigvalsh(jnp.matmul(a, a.T, precision="highest"))[::-1]
    var = jnp.maximum(var, 0)
    return var / jnp.where(var[0] > 0, var[0], 1)


def _count(var: Float[Array, " m"], rule: PCARule, threshold: float | None) -> Float[Array, ""]:
    total = jnp.sum(var)
    safe = jnp.where(total > 0, total, 1)
    if rule == "participation":
        number = total**2 / jnp.where(total > 0, jnp.sum(var**2), 1)
    elif rule == "fo":
        number = jnp.sum(var > _threshold(rule, threshold) * var[0])
    else:
        short = jnp.cumsum(var) / safe < _threshold(rule, threshold)
        number = jnp.minimum(1 + jnp.sum(short), var.shape[0])
    return jnp.where(total > 0, number.astype(var.dtype), total)  # 0, or NaN from the data


def _threshold(rule: str, threshold: float | None) -> float:
    return {"fo": 0.05, "ratio": 0.95}[rule] if threshold is None else threshold


def _check_rule(where: str, rule: Any, threshold: float | None) -> None:
    check_choice(where, "rule", rule, ("fo", "ratio", "participation"))
    if threshold is None:
        return
    if rule == "participation":
        raise fail(where, 'threshold with rule "participation"', "None, it has none", threshold)
    check_range(where, "threshold", threshold, 0, 1, low_open=True, high_open=True)


def local_pca(
    x: ArrayLike,
    k: int = 100,
    *,
    rule: PCARule = "fo",
    threshold: float | None = None,
    average: Literal["mean"] | None = "mean",
) -> Float[Array, "*N"]:
    r"""Return the number of large variances among the k nearest neighbours, averaged over points.

    With ``lambda_1 >= lambda_2 >= ...`` the eigenvalues of the covariance of the k neighbours (the
    point itself not among them) about their own mean:

    ===============  ====================================================================
    rule             dimension
    ===============  ====================================================================
    "fo"             how many ``lambda_i > 0.05 lambda_1`` (Fukunaga-Olsen)
    "ratio"          smallest r with ``sum_{i<=r} lambda_i >= 0.95 sum lambda_i``
    "participation"  ``(sum lambda)^2 / sum lambda^2``, a real number
    ===============  ====================================================================

    k must exceed the answer several times, yet neighbours must lie on one flat piece: 100 of 2000
    points on four 10-dimensional subspaces give 14.

    Args:
        x: ``[N, *data]``, floats or integers (pixels), N > k.
        k: neighbours, at least 2; the answer is at most k - 1.
        rule: see above.
        threshold: in (0, 1), instead of 0.05 or 0.95.
        average: None returns every point's count.

    Returns:
        ``[]``, or ``[N]`` with ``average=None``; 0 where all k neighbours are equal.

    Raises:
        ValueError: if ``k >= N``, or on NaN in x.

    Examples:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (300, 3)) @ jax.random.normal(
        ...     jax.random.key(1), (3, 20))
        >>> float(local_pca(x, 60, rule="ratio", threshold=0.999))
        3.0

    References:
        Fukunaga & Olsen 1971, doi:10.1109/T-C.1971.223208.
    """
    where = "local_pca"
    check_int(where, "k", k, 2)
    check_choice(where, "average", average, ("mean", None))
    _check_rule(where, rule, threshold)
    x, _ = _prepare(where, x)
    index = _search(where, x, k).index

    def at(args: tuple[Array, Array]) -> Array:
        point, index = args
        return _count(_variances(x[index] - point[None]), rule, threshold)

    counts = jax.lax.map(at, (x, index), batch_size=min(64, x.shape[0]))
    return counts if average is None else jnp.mean(counts)


def global_pca(
    x: ArrayLike, *, rule: PCARule = "fo", threshold: float | None = None
) -> Float[Array, ""]:
    """Return the number of large variances of the whole data set: the dimension of its span.

    Rules and thresholds as in :func:`local_pca`, on the covariance of all points about their mean.
    An upper bound of the intrinsic dimension when nothing is cut off: K orthogonal subspaces of
    dimension d count K d.

    Args:
        x: ``[N, *data]``, floats or integers (pixels), N >= 2.
        rule: see :func:`local_pca`; "participation" is the participation ratio.
        threshold: in (0, 1), instead of 0.05 or 0.95.

    Returns:
        ``[]``; 0 if all points are equal.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> float(global_pca(x)), float(global_pca(x, rule="ratio", threshold=0.9))
        (2.0, 1.0)
        >>> print(f"{global_pca(x, rule='participation'):.4f}")  # (9 + 1)^2 / (81 + 1)
        1.2195
    """
    where = "global_pca"
    _check_rule(where, rule, threshold)
    x, _ = _prepare(where, x)
    if x.shape[0] < 2:
        raise fail(where, "too few points", "at least 2", x.shape[0])
    return _count(_variances(x), rule, threshold)


# --- Denoisers -----------------------------------------------------------------------------------


def _at_data(
    where: str, schedule: Schedule, x: Array, t: Any
) -> tuple[Float[Array, "b *data"], Float[Array, " b"], Float[Array, " b"]]:
    """``(alpha x, alpha [b], sigma [b])`` in the dtype of x."""
    batch = x.shape[0]
    check_time(where, t, batch)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    check_range(where, "sigma(t)", sigma, 0, low_open=True, fix="a larger t")
    wide = lambda c: jnp.broadcast_to(jnp.asarray(c), (batch,)).astype(x.dtype)
    alpha, sigma = wide(alpha), wide(sigma)
    return expand_right(alpha, x.ndim) * x, alpha, sigma


def flipd(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x: Float[Array, "b *data"],
    t: Any,
    *,
    num_probes: int | None = None,
    key: PRNGKey | None = None,
    chunk: int = 64,
) -> Float[Array, " b"]:
    r"""Return the local dimension at each point, from how its density changes with the noise.

    The log-density of the noisy data on a d-dimensional set grows as ``(d - n) log sigma`` when
    ``sigma -> 0``. The Fokker-Planck equation gives that rate from the score s alone, without an
    integral along time. At ``y = alpha x``, with the posterior mean D and its Jacobian J:

    .. math:: n + \sigma^2 (\operatorname{div} s(y) + \|s(y)\|^2)
        = \alpha \operatorname{tr} J(y) + (\alpha/\sigma)^2 \|D(y) - x\|^2 .

    The right side is what is computed: nothing of size n cancels. For x on one low-rank Gaussian
    ``N(0, U U^T)`` under VE it is ``d / (1 + sigma^2) + sigma^2 ||x||^2 / (1 + sigma^2)^2``.

    With the exact denoiser of such a mixture the error at sigma = 1e-3 is below 1e-4 in float64 and
    in float32 alike; in float32 the rounding of x itself adds about ``n (eps |x_i| / sigma)^2``,
    which spoils sigma below 1e-5. For a trained network the value drifts to 0 or n where sigma
    is smaller than the noise it was trained on: plot it over t.

    Args:
        denoise_fn: ``(x_t [b, *data], t) -> x0_hat [b, *data]``, each example alone.
        schedule: gives alpha(t) and sigma(t).
        x: ``[b, *data]``, clean points; off the data set the estimate has no meaning.
        t: time, scalar or ``[b]``, with sigma(t) > 0: small, but not below what was trained.
        num_probes: None for the exact trace from n Jacobian products (n up to a few thousand), else
            Hutchinson's estimate from so many random sign vectors, unbiased, with the variance
            ``2 alpha^2 ||offdiag((J + J^T) / 2)||_F^2 / num_probes``.
        key: draws the probes, needed with ``num_probes``; example i of the batch uses
            ``fold_in(key, i)``.
        chunk: Jacobian products computed at once; bounds the memory of the network's pass.

    Returns:
        ``[b]``; real numbers, not restricted to [0, n].

    Raises:
        ValueError: if ``sigma(t) = 0``, or only one of ``num_probes`` and ``key`` is given.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> p = distributions.MoLRG(jnp.eye(8)[None, :, :3])  # three of eight coordinates
        >>> x = jnp.zeros((1, 8)).at[0, 1].set(2.0)
        >>> schedule = schedules.VE()
        >>> print(f"{flipd(p.denoiser(schedule), schedule, x, 0.01)[0]:.3f}")
        3.000

    References:
        Kamkari et al. 2024, arXiv 2406.03537.
    """
    where = "flipd"
    check_int(where, "chunk", chunk)
    if (num_probes is None) != (key is None):
        got = "only num_probes" if key is None else "only key"
        raise fail(where, "Hutchinson's trace", "num_probes and key together", got)
    y, alpha, sigma = _at_data(where, schedule, x, t)
    batch, dim = x.shape[0], math.prod(x.shape[1:])
    probes = None
    if num_probes is not None and key is not None:
        check_int(where, "num_probes", num_probes)
        draw = lambda i: jax.random.rademacher(
            jax.random.fold_in(key, i), (num_probes, *x.shape[1:]), y.dtype
        )
        probes = jnp.swapaxes(jax.vmap(draw)(jnp.arange(batch)), 0, 1)
    denoise = lambda y: denoise_once(where, denoise_fn, y, t)
    x0_hat, forms = jacobian_trace(denoise, y, probes, chunk=chunk)
    trace = jnp.mean(forms, axis=0)
    moved = expand_right(alpha / sigma, x.ndim) * (x0_hat - x)
    return alpha * trace + jnp.sum(moved.reshape(batch, dim) ** 2, axis=1)


def normal_bundle(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x: Float[Array, "b *data"],
    t: Any,
    *,
    num_scores: int | None = None,
    chunk: int = 256,
    return_spectrum: bool = False,
) -> Any:
    r"""Return the local dimension at each point as n minus the rank of the scores around it.

    Scores at points ``alpha x + sigma eps`` near the data set point across it, back to it: they
    span its normal space. With the singular values ``s_1 >= ... >= s_n`` of ``num_scores`` of them,

    .. math:: \hat d = n - \arg\max_{1 \le i < n} (s_i - s_{i+1}) .

    The rule always finds a gap: it never answers 0 or n, and where sigma is not small beside the
    structure of the set its answer is arbitrary. Look at the spectrum. The paper assumes VE; other
    schedules are covered by putting the points around ``alpha x``.

    Args:
        key: draws the noise; example i of the batch uses ``fold_in(key, i)``.
        denoise_fn: ``(x_t [m, *data], t) -> x0_hat [m, *data]``, each example alone.
        schedule: gives alpha(t) and sigma(t).
        x: ``[b, *data]``, clean points with n >= 2 numbers each.
        t: time, scalar or ``[b]``, with sigma(t) > 0.
        num_scores: rows of the matrix, at least n; None for 4 n.
        chunk: scores computed at once.
        return_spectrum: also return the singular values.

    Returns:
        ``[b]`` int32 in 1 .. n - 1; with ``return_spectrum`` a pair of these and of ``[b, n]``, the
        singular values of ``sigma(t) score / sqrt(num_scores)``, descending: about 1 across the
        set, about 0 along it (below 1e-3 in float32 they are rounding).

    Raises:
        ValueError: if ``sigma(t) = 0``, n < 2, or there are fewer scores than numbers in x.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> p = distributions.MoLRG(jnp.eye(8)[None, :, :3])
        >>> x = jnp.zeros((1, 8)).at[0, 1].set(2.0)
        >>> schedule = schedules.VE()
        >>> normal_bundle(jax.random.key(0), p.denoiser(schedule), schedule, x, 0.01).tolist()
        [3]

    References:
        Stanczuk, Batzolis, Deveney & Schonlieb 2024, arXiv 2212.12611, algorithm 1.
    """
    where = "normal_bundle"
    check_int(where, "chunk", chunk)
    batch, dim = x.shape[0], math.prod(x.shape[1:])
    if dim < 2:
        raise fail(where, "too few numbers per example", "at least 2", dim, "there is no gap")
    num_scores = 4 * dim if num_scores is None else num_scores
    check_int(where, "num_scores", num_scores, dim, "the scores must be able to span the space")
    center, alpha, sigma = _at_data(where, schedule, x, t)
    num_chunks = math.ceil(num_scores / chunk)
    chunk = math.ceil(num_scores / num_chunks)

    def spectrum(args: tuple[Array, ...]) -> Array:
        i, center, alpha, sigma, t = args
        eps = jax.random.normal(jax.random.fold_in(key, i), (num_scores, dim), x.dtype)
        eps = jnp.pad(eps, ((0, num_chunks * chunk - num_scores), (0, 0)))

        def scaled_scores(eps: Array) -> Array:
            x_t = center[None] + sigma * eps.reshape(chunk, *center.shape)
            score = (alpha * denoise_fn(x_t, t) - x_t) / sigma
            return score.reshape(chunk, dim)

        rows = jax.lax.map(scaled_scores, eps.reshape(num_chunks, chunk, dim))
        rows = rows.reshape(-1, dim)[:num_scores]
        var = jnp.linalg.eigvalsh(jnp.matmul(rows.T, rows, precision="highest"))[::-1]
        return jnp.sqrt(jnp.maximum(var, 0) / num_scores)

    ts = jnp.broadcast_to(jnp.asarray(t), (batch,))
    s = jax.lax.map(spectrum, (jnp.arange(batch), center, alpha, sigma, ts))
    dims = (dim - 1 - jnp.argmax(s[:, :-1] - s[:, 1:], axis=1)).astype(jnp.int32)
    return (dims, s) if return_spectrum else dims


def jacobian_rank(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x: Float[Array, "b *data"],
    t: Any,
    *,
    rule: Literal["energy", "above"] = "energy",
    threshold: float | None = None,
    chunk: int = 64,
    symmetric: bool = False,
) -> Int[Array, " b"]:
    r"""Return the local dimension at each point as the numerical rank of the denoiser's Jacobian.

    At ``y = alpha x`` the singular values of ``alpha J`` are ``a^2 l / (a^2 l + sigma^2)`` for a
    Gaussian with variances l: near 1 along the data set, near 0 across it. Rules:

    - "energy": :func:`lowdim_diffusion.subspaces.numerical_rank` with 0.99, that of the published
      curves. Of r equal values it counts ``0.98 r``, so it falls short from d = 51 on.
    - "above": how many exceed 0.5, the directions in which the data vary more than the noise.

    For noisy states along a trajectory take ``numerical_rank`` of ``spectral_atlas``.

    Args:
        denoise_fn: ``(x_t [b, *data], t) -> x0_hat [b, *data]``, each example alone.
        schedule: gives alpha(t) and sigma(t).
        x: ``[b, *data]``, clean points.
        t: time, scalar or ``[b]``, with sigma(t) > 0.
        rule: see above.
        threshold: in (0, 1), instead of 0.99 or 0.5.
        chunk: Jacobian products computed at once.
        symmetric: take ``(J + J^T) / 2``, for networks whose Jacobians are not symmetric.

    Returns:
        ``[b]`` int32 in 0 .. n.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> p = distributions.MoLRG(jnp.eye(8)[None, :, :3])
        >>> schedule = schedules.VE()
        >>> jacobian_rank(p.denoiser(schedule), schedule, jnp.ones((1, 8)), 0.01).tolist()
        [3]

    References:
        Wang et al. 2024, arXiv 2409.02426, eq. (52) and the Jacobian figure.
    """
    where = "jacobian_rank"
    check_choice(where, "rule", rule, ("energy", "above"))
    threshold = {"energy": 0.99, "above": 0.5}[rule] if threshold is None else threshold
    check_range(where, "threshold", threshold, 0, 1, low_open=True, high_open=True)
    y, alpha, _ = _at_data(where, schedule, x, t)
    s = jacobian_spectrum(lambda y: denoise_fn(y, t), y, chunk=chunk, symmetric=symmetric)
    if rule == "energy":
        return numerical_rank(s, threshold)
    return jnp.sum(s * alpha[:, None].astype(s.dtype) > threshold, axis=1, dtype=jnp.int32)
