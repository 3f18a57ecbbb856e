r"""Does the model generate or copy, and do two models agree? Scores of a set of samples.

Three different scores circulate under the name "GL". They are kept apart here by their names; x are
generated, ``y_i`` the training examples, M the cosine of embeddings
(:mod:`~lowdim_diffusion.generalization.embeddings`):

==================================  =====================================  ==================
function                            formula                                used by
==================================  =====================================  ==================
:func:`generalization_score`        ``1 - P(max_i M(x, y_i) > threshold)``  P2, and P1 on images
:func:`distance_ratio_score`        ``E min_i |x - y_i|`` of generated      P1 on mixtures of
                                    over that of fresh examples            Gaussians
:func:`pixel_novelty`               ``E min_i |x - y_i| / |x|``             P4; > 0.6 is read as
                                                                           generalizing
==================================  =====================================  ==================

P1 is Wang et al. 2024, P2 Zhang et al. 2023, P4 Li et al. 2024. The first is a share in [0, 1] and
needs a threshold, the second is 1 for samples as far from the training data as fresh ones and more
for samples off the distribution, the third depends on the range of the pixels.

Agreement of two models on the same noises, ``a_i = x_1(eps_i)`` and ``b_i = x_2(eps_i)``:
:func:`reproducibility_score` is ``P(M(a, b) > threshold)``, :func:`mae_score` is
``P(mean |a - b| < 15 of 255)``.

References:
    Wang et al. 2024, arXiv 2409.02426 (P1); Zhang et al. 2023, arXiv 2310.05264, sections 2-3
    (P2: RP, GL and MAE score); Li, Dai & Qu 2024, arXiv 2410.24060 (P4);
    Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize" (the
    rule of :func:`memorized_fraction`); Alaa et al. 2022, arXiv 2102.08921 (authenticity).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from lowdim_diffusion._checks import check_range, fail
from lowdim_diffusion._types import Array, ArrayLike, Bool, Float, Int, Scalar
from lowdim_diffusion.generalization._inputs import check_examples, check_pairs
from lowdim_diffusion.generalization.embeddings import Embedding, default_embedding, unit
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.neighbors import Nearest, _flat, nearest


class Similar(NamedTuple):
    """The training example that resembles each sample most."""

    cosine: Float[Array, " b"]
    """Cosine of their embeddings, in [-1, 1]."""
    index: Int[Array, " b"]
    """Row of the training set."""


def most_similar(
    samples: ArrayLike, train: ArrayLike, *, embed: Embedding = default_embedding
) -> Similar:
    """Return the training example that resembles each sample most, and how much it does.

    One search serves scores at many thresholds: ``1 - (cosine > threshold).mean()``.

    Args:
        samples: ``[b, *data]``.
        train: ``[N, *data]``.
        embed: ``[b, *data] -> [b, *features]``; lengths do not matter, only directions. Zeros
            resemble nothing.
    """
    check_examples("most_similar", samples=samples, train=train)
    a, b = _units(embed, samples), _units(embed, train)
    if a.shape[-1] != b.shape[-1]:
        expected = f"{b.shape[-1]} as of the training set"
        raise fail("most_similar", "width of the embedding", expected, a.shape[-1])
    # Among unit vectors the nearest has the largest cosine; a zero vector gets a length of its own.
    a = jnp.pad(a, ((0, 0), (0, 1)))
    b = jnp.concatenate([b, jnp.all(b == 0, axis=-1, keepdims=True).astype(b.dtype)], axis=-1)
    index = nearest(a, b).index[:, 0]
    return Similar(jnp.sum(a * b[index], axis=-1), index)


def _units(embed: Embedding, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    e = embed(x)
    if jnp.ndim(e) < 2 or jnp.shape(e)[0] != x.shape[0]:
        raise fail("embed", "wrong shape of the embedding", f"({x.shape[0]}, ...)", jnp.shape(e))
    return unit(e)


def _share_above(cosine: Array, threshold: Scalar) -> Array:
    """Share above the threshold; NaN if there is one among them, which no comparison shows."""
    above = jnp.where(jnp.isnan(cosine), cosine, (cosine > threshold).astype(cosine.dtype))
    return jnp.mean(above)


def generalization_score(
    samples: ArrayLike,
    train: ArrayLike,
    threshold: Scalar,
    *,
    embed: Embedding = default_embedding,
) -> Float[Array, ""]:
    """Return the share of samples that resemble no training example: 0 copies, 1 all novel.

    Args:
        samples: ``[b, *data]``, generated.
        train: ``[N, *data]``.
        threshold: cosine above which two examples count as copies, in [-1, 1]; it belongs to the
            embedding and the data, see :func:`calibrate_threshold`. For SSCD features 0.6.
        embed: ``[b, *data] -> [b, *features]``; lengths do not matter, only directions.

    Examples:
        >>> import jax.numpy as jnp
        >>> train = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> float(generalization_score(jnp.array([[0.1, 1.0, 0.1], [0.0, 0.0, 1.0]]), train, 0.9))
        0.5
    """
    check_range("generalization_score", "threshold", threshold, -1, 1)
    return 1 - _share_above(most_similar(samples, train, embed=embed).cosine, threshold)


def calibrate_threshold(
    held_out: ArrayLike,
    train: ArrayLike,
    *,
    false_positive_rate: float = 0.01,
    embed: Embedding = default_embedding,
) -> Float[Array, ""]:
    """Return the threshold that calls a fresh example a copy with at most the given probability.

    Held-out examples are no copies, so their cosines to the training set show how alike two
    different examples are. The threshold is their k-th smallest, ``k = ceil((m + 1)(1 - rate))`` of
    m: whatever the distribution, a further example exceeds it with probability at most ``rate``, so
    that a perfect model scores at least ``1 - rate`` in :func:`generalization_score`.

    The more training examples, the higher the threshold. For a sweep over N either calibrate at
    each N, or once at the largest: that one is safe for all.

    Args:
        held_out: ``[m, *data]``, from the distribution of the training data but none of them;
            ``m >= 1 / rate - 1``. Near duplicates across the two sets push the threshold up.
        train: ``[N, *data]``.
        false_positive_rate: in (0, 1), a Python number.
        embed: as in :func:`generalization_score`.

    Raises:
        ValueError: if there are too few held-out examples for the rate.

    Examples:
        >>> import jax.numpy as jnp
        >>> train, held_out = jnp.eye(3), jnp.array([[3.0, 4, 0], [4, 3, 0], [0, 1, 1]])
        >>> threshold = calibrate_threshold(
        ...     held_out, train, false_positive_rate=0.25, embed=lambda x: x
        ... )
        >>> float(threshold).__round__(4)  # the largest of three
        0.8

    References:
        Vovk, Gammerman & Shafer 2005, *Algorithmic Learning in a Random World* (the rank that makes
        the bound exact).
    """
    where, rate = "calibrate_threshold", false_positive_rate
    check_range(where, "false_positive_rate", rate, 0, 1, low_open=True, high_open=True)
    num = jnp.shape(held_out)[0]
    rank = math.ceil(round((num + 1) * (1 - rate), 9))
    if rank > num:
        need = math.ceil(round(1 / rate, 9)) - 1
        fix = "give more, or allow a larger false_positive_rate"
        raise fail(where, "too few held-out examples", f"at least {need}", num, fix)
    return jnp.sort(most_similar(held_out, train, embed=embed).cosine)[rank - 1]


def pair_threshold(
    examples: ArrayLike,
    others: ArrayLike,
    *,
    false_positive_rate: float = 0.01,
    embed: Embedding = default_embedding,
) -> Float[Array, ""]:
    """Return the cosine that a pair of unrelated examples exceeds with the given probability.

    For :func:`reproducibility_score`, which compares each sample with one other: what two different
    images have in common by chance is the level to pass. :func:`calibrate_threshold`, for the
    comparison with a whole training set, is much stricter: there each example has N chances.

    Args:
        examples: ``[m, *data]``.
        others: ``[N, *data]``, none of them among ``examples``; all ``m N`` pairs are compared.
        false_positive_rate: in (0, 1), a Python number.
        embed: as in :func:`generalization_score`.

    Raises:
        ValueError: if there are too few pairs for the rate.

    Examples:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.eye(2), jnp.array([[1.0, 0], [3, 4]])  # cosines 1, 0, .6, .8
        >>> float(pair_threshold(a, b, false_positive_rate=0.4, embed=lambda x: x))
        0.800000011920929
    """
    where, rate = "pair_threshold", false_positive_rate
    check_range(where, "false_positive_rate", rate, 0, 1, low_open=True, high_open=True)
    check_examples(where, examples=examples, others=others)
    one, two = (_units(embed, x) for x in (examples, others))
    num = one.shape[0] * two.shape[0]
    rank = math.ceil(round((num + 1) * (1 - rate), 9))
    if rank > num:
        fix = "give more, or allow a larger false_positive_rate"
        raise fail(where, "too few pairs", f"at least {math.ceil(1 / rate) - 1}", num, fix)
    cosine = jnp.matmul(one, two.T, precision="highest")
    return jnp.sort(cosine.reshape(-1))[rank - 1]


def reproducibility_score(
    a: ArrayLike,
    b: ArrayLike,
    threshold: Scalar,
    *,
    embed: Embedding = default_embedding,
) -> Float[Array, ""]:
    """Return the share of pairs ``(a[i], b[i])`` that resemble each other: 1 same, 0 unrelated.

    Args:
        a: ``[b, *data]``, samples of one model.
        b: ``[b, *data]``, of the other, from the same noises in the same order with the same
            deterministic solver (rescale the noise between VE and VP schedules).
        threshold: cosine above which two examples count as the same, in [-1, 1]. The papers take
            that of :func:`generalization_score`.
        embed: ``[b, *data] -> [b, *features]``.

    Raises:
        ValueError: if the two sets differ in shape.
    """
    check_range("reproducibility_score", "threshold", threshold, -1, 1)
    check_pairs("reproducibility_score", a, b)
    return _share_above(jnp.sum(_units(embed, a) * _units(embed, b), axis=-1), threshold)


def mae_score(
    a: ArrayLike,
    b: ArrayLike,
    threshold: Scalar = 15.0,
    *,
    pixel_range: tuple[float, float],
) -> Float[Array, ""]:
    """Return the share of pairs whose mean absolute difference is under 15 of 255 grey levels.

    Args:
        a: ``[b, *data]``, samples of one model.
        b: ``[b, *data]``, of the other, from the same noises, as in :func:`reproducibility_score`.
        threshold: grey levels on the scale 0..255, in [0, 255].
        pixel_range: values of black and white, e.g. ``(-1, 1)``. Values outside count as these, as
            they do in a picture file.

    Examples:
        >>> import jax.numpy as jnp
        >>> a = jnp.zeros((2, 4))
        >>> float(mae_score(a, a + jnp.array([[0.1], [0.2]]), pixel_range=(-1, 1)))
        0.5
    """
    check_range("mae_score", "threshold", threshold, 0, 255)
    check_pairs("mae_score", a, b)
    low, high = pixel_range
    if not low < high:
        raise fail("mae_score", "pixel_range", "black below white", pixel_range)
    grey = lambda x: jnp.clip((_flat(x) - low) * (255 / (high - low)), 0, 255)
    error = jnp.abs(grey(a) - grey(b)).mean(-1)
    return jnp.mean(jnp.where(jnp.isnan(error), error, (error < threshold).astype(error.dtype)))


# ---- distances ----------------------------------------------------------------------------------


def distance_ratio_score(
    samples: ArrayLike, train: ArrayLike, fresh: ArrayLike
) -> Float[Array, ""]:
    """Return how far samples are from the training set, against fresh examples: 0 copies.

    ``E min_i |x - y_i|`` over samples x, divided by the same over ``fresh``. 1 is as far as new
    examples of the distribution are; more than that means samples off the distribution.

    Args:
        samples: ``[b, *data]``, generated.
        train: ``[N, *data]``.
        fresh: ``[m, *data]``, from the true distribution, not trained on. The mean distance grows
            as N falls, for both alike.

    Examples:
        >>> import jax.numpy as jnp
        >>> train = jnp.array([[0.0], [1.0]])
        >>> float(distance_ratio_score(jnp.array([[0.25]]), train, jnp.array([[0.5], [1.5]])))
        0.5
    """
    check_examples("distance_ratio_score", samples=samples, fresh=fresh, train=train)
    far = lambda x: nearest(x, train).distance.mean()
    return far(samples) / far(fresh)


def pixel_novelty(samples: ArrayLike, train: ArrayLike) -> Float[Array, ""]:
    """Return the mean distance to the nearest training example over the sample's own norm.

    ``E min_i |x - y_i| / |x|``. The paper reads more than 0.6 as generalizing. Another range of the
    pixels moves all values: state it with them.

    Args:
        samples: ``[b, *data]``, generated; none of them all zeros.
        train: ``[N, *data]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(pixel_novelty(jnp.array([[3.0, 4.0]]), jnp.array([[3.0, 1.5], [9.0, 9.0]])))
        0.5
    """
    check_examples("pixel_novelty", samples=samples, train=train)
    distance = nearest(samples, train).distance[:, 0]
    return jnp.mean(distance / safe_sqrt(jnp.sum(_flat(samples) ** 2, axis=-1)))


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
    _check_two("memorized_fraction", samples, train)
    near = nearest(samples, train, k=2)
    return jnp.mean(is_memorized(near, ratio).astype(near.distance.dtype))


def authentic_fraction(samples: ArrayLike, train: ArrayLike) -> Float[Array, ""]:
    """Return the share of samples farther from their training example than that is from another.

    AuthPct / 100: with y the training example nearest to a sample x, x is authentic if the training
    example nearest to y is nearer than x. Fresh examples do not score 1: of held-out images 0.66
    are authentic on MNIST and 0.71 on Fashion-MNIST, against 10,000 training images. A copy scores
    0, but so does a sample in a sparse region.

    Args:
        samples: ``[b, *data]``, generated.
        train: ``[N, *data]``, N >= 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> train = jnp.array([[0.0], [1.0], [3.0]])
        >>> float(authentic_fraction(jnp.array([[0.1], [-1.5]]), train))
        0.5
    """
    _check_two("authentic_fraction", samples, train)
    near = nearest(samples, train)
    others = nearest(jnp.asarray(train)[near.index[:, 0]], train, k=2).distance[:, 1]
    authentic = near.distance[:, 0] > others
    return jnp.mean(authentic.astype(others.dtype))


def _check_two(where: str, samples: ArrayLike, train: ArrayLike) -> None:
    check_examples(where, samples=samples, train=train)
    if jnp.shape(train)[0] < 2:
        raise fail(where, "too few training examples", "at least 2", 1)
