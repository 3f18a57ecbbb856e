r"""Does the model generate or copy, and do two models agree? First scores.

With an embedding e, compared by the cosine ``M(x, y) = <e(x), e(y)> / (||e(x)|| ||e(y)||)``:

.. math::
    \mathrm{GL} = 1 - P( \max_i M(x, y_i) > \tau ), \qquad
    \mathrm{RP} = P_\varepsilon( M(x_1(\varepsilon), x_2(\varepsilon)) > \tau ),

x generated, ``y_i`` the training data, ``x_1, x_2`` made by two models from the same noise with a
deterministic solver. In the papers e is the copy-detection network SSCD and ``tau = 0.6``, a number
that belongs to SSCD. Here the default embedding is the pixels (mean removed, unit length), so
``threshold`` has no default: choose it from pairs known to be copies and pairs known not to be.
Three different "GL scores" circulate; this is the one of the reference below.

References:
    Zhang et al. 2023, arXiv 2310.05264, sections 2-3 (RP and GL);
    Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize" (the
    distance-ratio rule).
"""

from collections.abc import Callable

import jax.numpy as jnp

from lowdim_diffusion._checks import check_range, fail
from lowdim_diffusion._types import Array, ArrayLike, Bool, Float, Scalar
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.neighbors import Nearest, _flat, nearest


def _unit(e: Array) -> Array:
    e = _flat(e)
    norm = safe_sqrt(jnp.sum(e**2, axis=-1, keepdims=True))
    return e / jnp.where(norm > 0, norm, 1)


def pixel_embedding(x: ArrayLike) -> Float[Array, "b n"]:
    """Return each example's pixels as a vector with its own mean removed and unit length.

    The cosine of two of these is the correlation of the pixels: blind to brightness and contrast,
    but not to shifts. A constant example gives zeros, which resemble nothing.

    Args:
        x: ``[b, *data]``.

    Examples:
        >>> pixel_embedding([[1.0, 3.0], [5.0, 5.0]]).round(3).tolist()
        [[-0.707..., 0.707...], [0.0, 0.0]]
    """
    x = _flat(x)
    return _unit(x - x.mean(-1, keepdims=True))


def generalization_score(
    samples: ArrayLike,
    train: ArrayLike,
    threshold: Scalar,
    *,
    embed: Callable[[Array], Array] = pixel_embedding,
) -> Float[Array, ""]:
    """Return the share of samples that resemble no training example: 0 copies, 1 all novel.

    Args:
        samples: ``[b, *data]``, generated.
        train: ``[N, *data]``.
        threshold: cosine above which two examples count as copies, in [-1, 1]; see the module.
        embed: ``[b, *data] -> [b, *features]``; lengths do not matter, only directions.

    Examples:
        >>> import jax.numpy as jnp
        >>> train = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> float(generalization_score(jnp.array([[0.1, 1.0, 0.1], [0.0, 0.0, 1.0]]), train, 0.9))
        0.5
    """
    check_range("generalization_score", "threshold", threshold, -1, 1)
    a, b = _unit(embed(jnp.asarray(samples))), _unit(embed(jnp.asarray(train)))
    # Among unit vectors the nearest has the largest cosine; a zero vector gets a length of its own.
    a = jnp.pad(a, ((0, 0), (0, 1)))
    b = jnp.concatenate([b, jnp.all(b == 0, axis=-1, keepdims=True).astype(b.dtype)], axis=-1)
    cosine = jnp.sum(a * b[nearest(a, b).index[:, 0]], axis=-1)
    return 1 - jnp.mean((cosine > threshold).astype(a.dtype))


def reproducibility_score(
    a: ArrayLike,
    b: ArrayLike,
    threshold: Scalar,
    *,
    embed: Callable[[Array], Array] = pixel_embedding,
) -> Float[Array, ""]:
    """Return the share of pairs ``(a[i], b[i])`` that resemble each other: 1 same, 0 unrelated.

    Args:
        a: ``[b, *data]``, samples of one model.
        b: ``[b, *data]``, of the other, from the same noises in the same order with the same
            deterministic solver (rescale the noise between VE and VP schedules).
        threshold: cosine above which two examples count as the same, in [-1, 1].
        embed: ``[b, *data] -> [b, *features]``.

    Raises:
        ValueError: if the two sets differ in shape.
    """
    check_range("reproducibility_score", "threshold", threshold, -1, 1)
    if jnp.shape(a) != jnp.shape(b):
        raise fail(
            "reproducibility_score", "shape of b", f"that of a, {jnp.shape(a)}", jnp.shape(b)
        )
    cosine = jnp.sum(_unit(embed(jnp.asarray(a))) * _unit(embed(jnp.asarray(b))), axis=-1)
    return jnp.mean((cosine > threshold).astype(cosine.dtype))


def is_memorized(near: Nearest, ratio: Scalar = 1 / 3) -> Bool[Array, " b"]:
    """Return which samples are much nearer to one training example than to any other.

    Args:
        near: their two or more nearest training examples, from :func:`nearest`.
        ratio: as in :func:`memorized_fraction`.
    """
    check_range("is_memorized", "ratio", ratio, 0, 1, low_open=True)
    d = near.distance
    if d.shape[-1] < 2:
        fix = "call nearest with k=2"
        raise fail("is_memorized", "too few neighbours", "at least 2", d.shape[-1], fix)
    return (d[:, 0] < ratio * d[:, 1]) | (d[:, 0] == 0)


def memorized_fraction(
    samples: ArrayLike, train: ArrayLike, ratio: Scalar = 1 / 3
) -> Float[Array, ""]:
    """Return the share of samples much nearer to one training example than to any other.

    A sample counts if ``d_1 < ratio d_2``, the distances to its nearest and second nearest
    training example, or if it equals one. Near duplicates in the training data hide copies of
    themselves from this rule.

    Args:
        samples: ``[b, *data]``, generated.
        train: ``[N, *data]``, N >= 2.
        ratio: in (0, 1]; 1/3 flagged 0 of 10,000 held-out MNIST images and 3 of Fashion-MNIST.

    Examples:
        >>> import jax.numpy as jnp
        >>> train = jnp.array([[0.0], [1.0]])
        >>> float(memorized_fraction(jnp.array([[0.1], [0.4], [1.0], [3.0]]), train))
        0.5
    """
    if jnp.shape(train)[0] < 2:
        raise fail("memorized_fraction", "too few training examples", "at least 2", 1)
    near = nearest(samples, train, k=2)
    return jnp.mean(is_memorized(near, ratio).astype(near.distance.dtype))
