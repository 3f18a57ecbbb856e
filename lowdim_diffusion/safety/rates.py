"""How well a score tells two kinds of samples apart."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, Scalar


class _Counts(NamedTuple):
    """For each example's score, how many negatives and positives have one as high or higher."""

    is_positive: Array
    at_or_above: Int[Array, "2 n"]
    above: Int[Array, "2 n"]
    totals: Int[Array, " 2"]


def auroc(scores: ArrayLike, is_positive: ArrayLike) -> Float[Array, ""]:
    r"""Return the area under the ROC curve: how often a positive scores above a negative.

    .. math:: P(s_+ > s_-) + \tfrac12 P(s_+ = s_-)

    over all pairs; 1 separates, 1/2 guesses.

    Args:
        scores: ``[n]``, high for positives.
        is_positive: ``[n]`` boolean.

    Returns:
        Scalar; NaN (traced) if either kind is missing.

    Raises:
        ValueError: for unequal lengths and, outside ``jit``, for NaN scores or a missing kind.

    Examples:
        >>> float(auroc([0.1, 0.4, 0.4, 0.9], [False, False, True, True]))
        0.875
    """
    c = _count("auroc", scores, is_positive)
    beaten = c.totals[0] - 0.5 * (c.at_or_above[0] + c.above[0])
    total = jnp.sum(jnp.where(c.is_positive, beaten / c.totals[0], 0))
    return total / c.totals[1]


def true_positive_rate(
    scores: ArrayLike, is_positive: ArrayLike, max_fpr: Scalar = 0.01
) -> Float[Array, ""]:
    """Return the largest share of positives found while few negatives are flagged.

    A threshold flags every score at or above it. Among all thresholds whose share of flagged
    negatives is at most ``max_fpr`` the best one counts. The share of hallucinations removed when
    96 % of the other samples are kept is the rate at ``max_fpr=0.04``.

    Args:
        scores: ``[n]``, high for positives.
        is_positive: ``[n]`` boolean.
        max_fpr: in [0, 1]. With fewer than ``1 / max_fpr`` negatives none may be flagged.

    Returns:
        Scalar; NaN (traced) if there are no positives or no negatives.

    Raises:
        ValueError: for unequal lengths and, outside ``jit``, for NaN scores or a missing kind.

    Examples:
        >>> scores, is_positive = [0.1, 0.2, 0.3, 0.4, 0.9], [False, False, True, False, True]
        >>> float(true_positive_rate(scores, is_positive, 0.1))
        0.5
        >>> float(true_positive_rate(scores, is_positive, 0.4))
        1.0
    """
    check_range("true_positive_rate", "max_fpr", max_fpr, 0, 1)
    c = _count("true_positive_rate", scores, is_positive)
    rates = c.at_or_above / c.totals[:, None]
    slack = 4 * jnp.finfo(rates.dtype).eps  # 0.01 and 1 / 100 are not to differ
    found = jnp.where(rates[0] <= max_fpr + slack, rates[1], 0)
    return jnp.where(jnp.all(c.totals > 0), jnp.max(found), jnp.nan)


def _count(where: str, scores: ArrayLike, is_positive: ArrayLike) -> _Counts:
    scores, is_positive = jnp.asarray(scores), jnp.asarray(is_positive)
    check_shape(where, "scores", scores, (None,))
    check_shape(where, "is_positive", is_positive, scores.shape, "one label per score")
    if is_positive.dtype != bool:
        raise TypeError(f"{where}: is_positive must be boolean, got {is_positive.dtype}.")
    if is_concrete(scores) and np.any(np.isnan(np.asarray(scores))):
        raise fail(where, "scores are not numbers", "no NaN", "NaN")
    if is_concrete(is_positive):
        positives = int(np.sum(np.asarray(is_positive)))
        if not 0 < positives < scores.size:
            got = f"{positives} positives among {scores.size}"
            raise fail(where, "too few examples", "one or more of either kind", got)
    order = jnp.argsort(-scores)
    sorted_down, kinds = -scores[order], jnp.stack([~is_positive, is_positive])
    counts = jnp.cumsum(kinds[:, order], axis=1, dtype=jnp.int32)
    counts = jnp.pad(counts, ((0, 0), (1, 0)))
    at = lambda side: counts[:, jnp.searchsorted(sorted_down, -scores, side=side)]
    return _Counts(is_positive, at("right"), at("left"), counts[:, -1])
