"""Scores of single samples, from features of the network or from its predictions on the way."""

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float


def representation_spread(features: ArrayLike) -> Float[Array, " b"]:
    r"""Return the standard deviation over an example's features: high suggests a memorized one.

    .. math:: s = \Bigl(\tfrac1p \sum_j (h_j - \bar h)^2\Bigr)^{1/2}, \qquad
        \bar h = \tfrac1p \sum_j h_j .

    A network that has stored an example answers it by few, strong units; one that has learned the
    law of the data spreads the answer over many (see :func:`relu_autoencoder`). The layer and the
    noise level matter, and so does what is depicted: compare examples of one kind, and choose the
    threshold on examples known to be new. The published detector reads a layer inside the network
    at step 50 of 1000, ``sigma / alpha`` about 0.17. In small networks that predict ``x0`` the sign
    holds at every layer; with EDM's parametrization late layers answer with the noise that is left,
    and a copy spreads less there.

    Args:
        features: ``[b, *features]`` from ``denoisers.features`` or ``net.features``; all entries of
            an example, over channels and places alike, are its ``h``.

    Returns:
        ``[b]``; NaN where a feature is not finite (traced).

    Raises:
        ValueError: without an axis of features, with fewer than two of them, or (outside ``jit``)
            with NaN or infinity among them.

    Examples:
        >>> spike, flat = [0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]  # of the same length
        >>> representation_spread([spike, flat]).round(3).tolist()
        [0.866..., 0.0]

    References:
        Zhang et al. 2025, arXiv 2512.20963, section on memorization detection.
    """
    where = "representation_spread"
    features = _floating(where, "features", features)
    if features.ndim < 2:
        fix = "add a batch axis"
        raise fail(where, "wrong shape of features", "[b, *features]", features.shape, fix)
    flat = features.reshape(features.shape[0], -1)
    if flat.shape[1] < 2:
        raise fail(where, "too few features", "at least 2 per example", flat.shape[1])
    return jnp.std(flat, axis=1)


def trajectory_variance(x0_hats: ArrayLike, where: ArrayLike | None = None) -> Float[Array, " b"]:
    r"""Return how much the predicted clean sample still moved: high suggests a hallucination.

    .. math:: \mathrm{Hal} = \frac1n \sum_{j=1}^n \frac1{|W|} \sum_{i \in W}
        (\hat x_{0,j}^{(i)} - \bar x_j)^2, \qquad
        \bar x_j = \frac1{|W|} \sum_{i \in W} \hat x_{0,j}^{(i)},

    over a window W of sampling steps. Between two modes the exact denoiser is steep, a network is
    not, and a sample that ends there wavers to the last. The window must lie at low noise, up to
    about three standard deviations of a mode; over all steps every sample moves, and nothing
    is seen.

    Args:
        x0_hats: ``[k, b, *data]`` predictions along the way, the ``trajectory`` of
            ``sampling.sample(..., save="denoised")``.
        where: ``[k]`` boolean, the window, e.g. ``result.ts <= 0.15``; None takes all of
            ``x0_hats`` (``result.trajectory[-6:]`` are the last six).

    Returns:
        ``[b]``; NaN where a prediction in the window is not finite, or it is empty (traced).

    Raises:
        ValueError: for another shape, fewer than two predictions in the window, or (outside
            ``jit``) predictions that are not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> x0_hats = jnp.array([[[5.0], [1.0]], [[1.0], [1.0]], [[3.0], [1.0]]])  # 3 steps
        >>> trajectory_variance(x0_hats, jnp.array([False, True, True])).tolist()
        [1.0, 0.0]

    References:
        Aithal, Maini, Lipton, Kolter 2024, "Understanding hallucinations in diffusion models
        through mode interpolation", arXiv 2406.09358, and its published code.
    """
    name = "trajectory_variance"
    if x0_hats is None:
        fix = 'sample with save="denoised"'
        raise fail(name, "no trajectory", "predictions [k, b, *data]", None, fix)
    x0_hats = _floating(name, "x0_hats", x0_hats)
    if x0_hats.ndim < 3:
        fix = 'pass the trajectory of a run with save="denoised"'
        raise fail(name, "wrong shape of x0_hats", "[k, b, *data]", x0_hats.shape, fix)
    num = x0_hats.shape[0]
    kept = jnp.ones(num, bool) if where is None else jnp.asarray(where)
    check_shape(name, "where", kept, (num,), "one entry per prediction")
    if kept.dtype != bool:
        raise TypeError(f"{name}: where must be boolean, got {kept.dtype}.")
    if is_concrete(kept) and (count := int(np.sum(np.asarray(kept)))) < 2:
        raise fail(name, "too few predictions in the window", "at least 2", count, "widen it")
    mask = kept.reshape(-1, *(1,) * (x0_hats.ndim - 1))
    return jnp.mean(jnp.var(x0_hats, axis=0, where=mask), axis=tuple(range(1, x0_hats.ndim - 1)))


def _floating(where: str, name: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if is_concrete(x) and not np.all(np.isfinite(np.asarray(x))):
        raise fail(where, f"{name} are not finite", "finite numbers", "NaN or infinity")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
