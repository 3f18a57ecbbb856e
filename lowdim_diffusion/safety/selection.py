"""The best of several scores, chosen on some of the examples and judged on the others."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail
from lowdim_diffusion._types import ArrayLike, Float
from lowdim_diffusion.safety.rates import auroc, true_positive_rate


class Chosen(NamedTuple):
    """A score, and how well it separates examples that it was not chosen on."""

    name: str
    auroc: float
    true_positive_rate: float


def choose_score(
    scores: Mapping[str, ArrayLike], is_positive: ArrayLike, *, max_fpr: float = 0.01
) -> Chosen:
    """Return the score with the largest AUROC on every other example, judged on the rest.

    Which layer and noise level separate copies from new samples differs between networks; the best
    of many on the same examples would look better than it is.

    Args:
        scores: name to ``[n]``, high for positives.
        is_positive: ``[n]`` boolean, two or more of either kind.
        max_fpr: of the true positive rate.

    Raises:
        ValueError: for no scores, other lengths, or fewer than two of either kind.

    Examples:
        >>> scores = {"good": [0, 1, 4, 5], "bad": [0, 5, 4, 1]}
        >>> choose_score(scores, [False, False, True, True])
        Chosen(name='good', auroc=1.0, true_positive_rate=1.0)
    """
    where = "choose_score"
    check_range(where, "max_fpr", max_fpr, 0, 1)
    is_positive = np.asarray(is_positive)
    if not scores:
        raise fail(where, "no scores", "at least one", 0)
    kinds = [np.flatnonzero(is_positive), np.flatnonzero(~is_positive)]
    if min(map(len, kinds)) < 2:
        got = f"{len(kinds[0])} positives of {len(is_positive)}"
        raise fail(where, "too few examples", "two or more of either kind", got)
    first = np.concatenate([rows[::2] for rows in kinds])
    rest = np.concatenate([rows[1::2] for rows in kinds])
    arrays = {name: np.asarray(values) for name, values in scores.items()}
    for name, values in arrays.items():
        check_shape(where, name, values, is_positive.shape, "one per example")
    name = max(arrays, key=lambda name: float(auroc(arrays[name][first], is_positive[first])))
    values, kind = arrays[name][rest], is_positive[rest]
    return Chosen(
        name, float(auroc(values, kind)), float(true_positive_rate(values, kind, max_fpr))
    )


def keep_lowest(scores: Float[np.ndarray, " n"] | ArrayLike, fraction: float) -> np.ndarray:
    """Return the rows of the lowest scores, ``ceil(fraction n)`` of them, in their own order.

    The filter of hallucinations: scores from ``trajectory_variance``.

    Args:
        scores: ``[n]``; NaN counts as the highest.
        fraction: in (0, 1].

    Examples:
        >>> keep_lowest([0.1, 9.0, 0.2, 0.3], 0.75).tolist()
        [0, 2, 3]
    """
    check_range("keep_lowest", "fraction", fraction, 0, 1, low_open=True)
    scores = np.asarray(scores)
    check_shape("keep_lowest", "scores", scores, (None,))
    num = int(np.ceil(round(fraction * len(scores), 9)))
    return np.sort(np.argsort(scores, kind="stable")[:num])
