r"""How much of what a denoiser or a layer says is about the class: class-signal-to-noise ratio.

For an output h of an example of class k, whose class has the basis U_k,

.. math:: \mathrm{SNR} = \frac{E \lVert U_k U_k^T h \rVert^2}
    {E \lVert h - U_k U_k^T h \rVert^2},

a ratio of expectations, over examples of all classes. Along the noise level it rises while
denoising removes what classes share, and falls when the class becomes uncertain: the quality of
features peaks at a level in between. Of a mixture with noise in the other classes' subspaces
(:meth:`lowdim_diffusion.distributions.MoLRG.noisy`) bases are known; of real features they are the
leading directions of each class.

References:
    Li et al. 2025, "Understanding representation dynamics of diffusion models via low-dimensional
    modeling", arXiv 2502.05743.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.generalization._inputs import check_labels, flat_features, level_times
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.sharding import example_keys
from lowdim_diffusion.subspaces.spectra import pca


class ClassSnr(NamedTuple):
    """Class-signal-to-noise ratio; infinite where nothing lies outside the class's subspace."""

    overall: Float[Array, "*T"]
    """Over the examples of all classes."""
    per_class: Float[Array, "*T classes"]
    """Over those of each class; NaN for a class without examples."""


def class_snr(h: ArrayLike, labels: ArrayLike, bases: ArrayLike) -> ClassSnr:
    """Return the class-signal-to-noise ratio of outputs whose classes have known bases.

    Args:
        h: ``[b, *data]`` with n entries each: denoised examples, or features.
        labels: ``[b]``, in ``0 .. K - 1``.
        bases: ``[K, n, d]``, orthonormal columns; zero ones stand for missing directions.

    Returns:
        A scalar over all examples, and ``[K]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> h = jnp.array([[2.0, 1.0], [0.0, 1.0]])
        >>> found = class_snr(h, jnp.array([0, 1]), jnp.eye(2)[:, :, None])
        >>> print(found.overall, found.per_class)
        5.0 [ 4. inf]
    """
    where = "class_snr"
    h = flat_features(where, "h", h)
    check_shape(where, "bases", bases, (None, h.shape[1], None), "give [classes, n, rank]")
    num_classes = jnp.shape(bases)[0]
    check_labels(where, labels, len(h), num_classes)
    bases = jnp.asarray(bases, h.dtype)
    own = jax.nn.one_hot(labels, num_classes, dtype=h.dtype)
    inside = jnp.einsum("knd,bn->bkd", bases, h, precision="highest") * own[:, :, None]
    signal = jnp.einsum("knd,bkd->bn", bases, inside, precision="highest")
    energy = lambda v: jnp.matmul(jnp.sum(v**2, axis=1), own, precision="highest")
    top, bottom = energy(signal), energy(h - signal)
    return ClassSnr(jnp.sum(top) / jnp.sum(bottom), top / bottom)


def denoiser_snr(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x: ArrayLike,
    labels: ArrayLike,
    bases: ArrayLike,
) -> ClassSnr:
    """Return the class-signal-to-noise ratio of a denoiser's output at each noise level.

    Args:
        key: draws one noise per example, the same at all levels.
        denoise_fn: any denoiser; a tap of a network as well, bound as ``(x_t, t) -> features``.
        schedule: the noise schedule that ``ts`` refer to.
        ts: ``[T]`` times, > 0.
        x: clean examples ``[b, *data]``.
        labels: ``[b]``, in ``0 .. K - 1``.
        bases: ``[K, n, d]``, as for :func:`class_snr`.

    Returns:
        ``[T]`` and ``[T, K]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> bases = jnp.eye(10).reshape(10, 2, 5).swapaxes(0, 1)  # two classes of dimension 5
        >>> p, ve, key = distributions.MoLRG.noisy(bases, 0.2), schedules.VE(), jax.random.key(0)
        >>> x, labels = p.sample(jax.random.key(1), 4000)
        >>> found = denoiser_snr(key, p.denoiser(ve), ve, [0.01, 0.3, 2.0], x, labels, bases)
        >>> [f"{snr:.0f}" for snr in found.overall]  # from 1 / 0.2^2 up, and down
        ['25', '60', '1']
    """
    x = jnp.asarray(x)
    ts = jnp.atleast_1d(level_times("denoiser_snr", schedule, ts, x.dtype))
    keys = example_keys(key, jnp.arange(len(x)))
    eps = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)

    def level(t: Array) -> ClassSnr:
        return class_snr(
            denoise_fn(schedule.alpha(t) * x + schedule.sigma(t) * eps, t), labels, bases
        )

    return jax.lax.map(level, ts)


def approximate_class_snr(
    sigma: ArrayLike, num_classes: int, rank: int, cross_std: ArrayLike
) -> Float[Array, "*s"]:
    r"""Return the theory's closed form for the exact denoiser of the noisy mixture.

    .. math:: \mathrm{SNR} \approx \frac{C}{K-1} \biggl[
        \frac{1 + (\sigma/\delta)^2 g(w_+)}{1 + (\sigma/\delta)^2 g(w_-)}\biggr]^2, \qquad
        C = \frac{1+\sigma^2}{\delta^2+\sigma^2},\quad g(w) = (1-\delta^2) w + \delta^2,

    with the weights of the true class and of another one for an example of average energies,

    .. math:: w_+ = \frac{1}{1 + (K-1) e^{-\Delta}},\quad w_- = \frac{1}{e^\Delta + K - 1},\quad
        \Delta = \frac{d (1-\delta^2)^2}{2 (1+\sigma^2)(\delta^2+\sigma^2)} .

    The denoising rate ``(sigma/delta)^2`` rises and the certainty of the class falls, so that there
    is one peak. Below it the formula is within a few percent of :func:`denoiser_snr`; at the peak
    and beyond it is too large, up to sevenfold. For ``sigma -> 0`` it is ``1 / ((K-1) delta^2)``.

    Args:
        sigma: noise levels of any shape, >= 0, with ``alpha = 1``.
        num_classes: K >= 2.
        rank: d of each class.
        cross_std: delta in (0, 1).

    Examples:
        >>> print(approximate_class_snr([0.002, 0.14, 1.923], 2, 5, 0.2).round(1))
        [25.  36.5  1.6]
    """
    where = "approximate_class_snr"
    check_int(where, "num_classes", num_classes, 2)
    check_int(where, "rank", rank)
    check_range(where, "sigma", sigma, 0)
    check_range(where, "cross_std", cross_std, 0, 1, low_open=True, high_open=True)
    var, floor, others = jnp.asarray(sigma) ** 2, jnp.asarray(cross_std) ** 2, num_classes - 1
    delta = rank * (1 - floor) ** 2 / (2 * (1 + var) * (floor + var))
    # Weights by exp(-Delta): exp(Delta) overflows at low noise.
    own = 1 / (1 + others * jnp.exp(-delta))
    kept = lambda w: 1 + var / floor * ((1 - floor) * w + floor)
    share = kept(own) / kept(own * jnp.exp(-delta))
    return (1 + var) / (floor + var) / others * share**2


def class_bases(
    h: ArrayLike, labels: ArrayLike, num_classes: int, *, rank: int = 5
) -> Float[Array, "classes p rank"]:
    """Return the leading directions of each class's features, prepared as in :func:`feature_snr`.

    Args:
        h: ``[b, *features]`` with p entries each.
        labels: ``[b]``, in ``0 .. num_classes - 1``.
        num_classes: K.
        rank: directions of each class, at most p.

    Examples:
        >>> import jax.numpy as jnp
        >>> h = jnp.array([[2.0, 0.1], [-3.0, 0.1], [0.1, 1.0], [-0.1, -1.0]])
        >>> bases = class_bases(h, jnp.array([0, 0, 1, 1]), 2, rank=1)
        >>> print(abs(bases[..., 0]).round(1))
        [[1.  0. ]
         [0.1 1. ]]
    """
    where = "class_bases"
    h = _prepared(where, h)
    check_int(where, "rank", rank)
    if rank > h.shape[1]:
        raise fail(where, "rank too large", f"at most the {h.shape[1]} features", rank)
    check_labels(where, labels, len(h), num_classes)
    labels = jnp.asarray(labels)
    of_class = lambda k: pca(jnp.where((labels == k)[:, None], h, 0), rank)
    return jax.lax.map(of_class, jnp.arange(num_classes))


def feature_snr(h: ArrayLike, labels: ArrayLike, num_classes: int, *, rank: int = 5) -> ClassSnr:
    """Return the class-signal-to-noise ratio of real features, whose class bases are their own.

    As published: features are brought to unit length, the mean of all is removed, and a class's
    basis are its ``rank`` leading right singular vectors. Labels that mean nothing do not give 0:
    compare with shuffled ones.

    Args:
        h: ``[b, *features]`` with p entries each, from ``denoisers.features``;
            :func:`pool_features` first if they have places.
        labels: ``[b]``, in ``0 .. num_classes - 1``.
        num_classes: K.
        rank: directions of each class, at most p.

    Returns:
        A scalar over all examples, and ``[K]``.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import distributions, linalg
        >>> bases = linalg.random_frames(jax.random.key(0), 3, 20, 5, orthogonal=True)
        >>> h, labels = distributions.MoLRG.noisy(bases, 0.2).sample(jax.random.key(1), 2000)
        >>> print(f"{feature_snr(h, labels, 3).overall:.1f}")
        8.9
        >>> print(f"{class_snr(h, labels, bases).overall:.1f}")  # with their lengths
        12.5
    """
    prepared = _prepared("feature_snr", h)
    return class_snr(prepared, labels, class_bases(h, labels, num_classes, rank=rank))


def _prepared(where: str, h: Any) -> Array:
    """Rows of unit length, less the mean of all; rows of zeros stay zero."""
    h = flat_features(where, "h", h)
    length = safe_sqrt(jnp.sum(h**2, axis=1, keepdims=True))
    h = h / jnp.where(length > 0, length, 1)
    return h - jnp.mean(h, axis=0, keepdims=True)
