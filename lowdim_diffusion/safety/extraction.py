r"""Which training examples does a model hold, and how many more might it?

A sample is a *copy* if it is much nearer to one training example than to any other, ``d_1 < ratio
d_2``. Examples that occur more than once in the training data would hide their copies from this
rule (``d_1 = d_2``); they count as one. A new example passes by chance with probability about
``ratio^d`` where the data have dimension d: nothing for images, a ninth in the plane.

Samples find some of the examples that a model reproduces; how often each was found tells how many
were missed (:func:`extractable`).

References:
    Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize" (the
    rule); Carlini et al. 2023, arXiv 2301.13188 (extraction); Chao 1987, Biometrics 43, and Good
    1953, Biometrika 40 (what was not seen).
"""

import hashlib
import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail
from lowdim_diffusion._types import ArrayLike, Float, Int, Scalar
from lowdim_diffusion.generalization import is_memorized
from lowdim_diffusion.neighbors import Nearest, nearest


class Extractable(NamedTuple):
    """How many training examples a model reproduces, found or not."""

    num_images: float
    """Estimated number: found ones and those that samples have missed."""
    low: float
    """Lower end of its confidence interval."""
    high: float
    """Upper end."""
    unseen: float
    """Probability that a further copy is of an example not found yet."""


class Extraction(NamedTuple):
    """The training examples that samples reproduce, as numpy arrays."""

    is_copy: Int[np.ndarray, " n"]
    """Boolean, one per sample."""
    index: Int[np.ndarray, " n"]
    """Row of the training example nearest to each sample, the first of its duplicates."""
    distance: Float[np.ndarray, " n"]
    """Distance to it."""
    ratio: Float[np.ndarray, " n"]
    """Of this distance to that of the next training example which is no duplicate."""
    found: Int[np.ndarray, " m"]
    """Rows of the training examples reproduced, the most frequent first."""
    count: Int[np.ndarray, " m"]
    """Copies of each."""
    closest: Int[np.ndarray, " m"]
    """Row of the sample that is its best copy, of the smallest ratio."""
    group: Int[np.ndarray, " N"]
    """For each training example the row of the first of its duplicates, its own if it is unique."""
    extractable: Extractable
    """Estimated from the counts."""

    @property
    def num_distinct(self) -> int:
        """Training examples that differ."""
        return len(np.unique(self.group))

    def duplicates(self, row: Any) -> np.ndarray:
        """Return the rows of the training examples that are the same as the one at ``row``."""
        return np.flatnonzero(self.group == self.group[row])


def extraction(
    samples: ArrayLike,
    train: ArrayLike,
    *,
    ratio: Scalar = 1 / 3,
    tolerance: float = 0.0,
) -> Extraction:
    """Return which training examples the samples reproduce, and how many more the model may hold.

    Neighbours are searched blockwise (:func:`lowdim_diffusion.neighbors.nearest`): a memory-mapped
    training set stays where it is unless it holds duplicates. Not for use inside ``jit``: sizes
    depend on what is found.

    Args:
        samples: ``[n, *data]``.
        train: ``[N, *data]``, in the same range of values; at least two that differ.
        ratio: in (0, 1], how much nearer a copy is to one example than to the next.
        tolerance: distance up to which training examples count as duplicates; 0 means equal ones,
            more costs a search for each example.

    Raises:
        ValueError: if shapes differ, values are not finite, or there is one training example only.

    Examples:
        >>> import numpy as np
        >>> train = np.array([[0.0, 0], [4, 0], [0, 4], [4, 0]])
        >>> found = extraction(np.array([[4, 0.1], [3.9, 0], [1, 1]]), train)
        >>> found.found.tolist(), found.count.tolist(), found.duplicates(1).tolist()
        ([1], [2], [1, 3])
    """
    where = "extraction"
    check_range(where, "ratio", ratio, 0, 1, low_open=True)
    check_range(where, "tolerance", tolerance, 0)
    samples = np.asarray(samples)
    train = train if hasattr(train, "shape") else np.asarray(train)
    if len(samples) == 0:
        raise fail(where, "no samples", "at least 1", samples.shape)
    group = duplicates(train, tolerance=tolerance)
    kept = np.unique(group)
    if len(kept) < 2:
        raise fail(where, "too few training examples", "at least 2 that differ", len(kept))
    near = nearest(samples, train if len(kept) == len(train) else train[kept], k=2)
    is_copy = np.asarray(is_memorized(near, ratio))
    distance = np.asarray(near.distance)
    index = kept[np.asarray(near.index)[:, 0]]
    second = np.where(distance[:, 1] > 0, distance[:, 1], 1)
    ratios = distance[:, 0] / second
    found, inverse, count = np.unique(index[is_copy], return_inverse=True, return_counts=True)
    copies = np.flatnonzero(is_copy)
    by_ratio = np.argsort(ratios[copies], kind="stable")
    _, first = np.unique(inverse[by_ratio], return_index=True)
    closest = copies[by_ratio[first]]
    order = np.argsort(-count, kind="stable")
    return Extraction(
        is_copy,
        index,
        distance[:, 0],
        ratios,
        found[order],
        count[order],
        closest[order],
        group,
        extractable(count, len(kept)),
    )


def duplicates(train: ArrayLike, *, tolerance: float = 0.0) -> Int[np.ndarray, " N"]:
    """Return for each training example the row that stands for it, its own unless a duplicate.

    Args:
        train: ``[N, *data]``.
        tolerance: Euclidean distance up to which examples are merged, until no two that are left
            are so near; 0 merges equal ones, by their digests.

    Examples:
        >>> import numpy as np
        >>> duplicates(np.array([[0.0], [1.0], [0.0], [1.1]]), tolerance=0.2).tolist()
        [0, 1, 0, 1]
    """
    check_range("duplicates", "tolerance", tolerance, 0)
    train = train if hasattr(train, "shape") else np.asarray(train)
    first: dict[bytes, int] = {}
    group = np.empty(len(train), np.int64)
    for i, row in enumerate(train):
        row = np.ascontiguousarray(row) + 0  # -0.0 is 0.0
        group[i] = first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), i)
    while tolerance > 0 and len(kept := np.unique(group)) > 1:
        near: Nearest = nearest(train[kept], train[kept], k=2)
        itself = np.asarray(near.index)[:, 0] == np.arange(len(kept))
        other = np.where(itself, *np.asarray(near.index).T[::-1])
        close = np.asarray(near.distance)[:, 1] <= tolerance
        parent = np.where(close, np.minimum(other, np.arange(len(kept))), np.arange(len(kept)))
        if not close.any():
            break
        for _ in range(len(kept)):  # to the head of each chain
            if (parent == parent[parent]).all():
                break
            parent = parent[parent]
        group = kept[parent[np.searchsorted(kept, group)]]
    return group


def extractable(
    counts: ArrayLike, num_train: int | None = None, *, confidence: float = 0.95
) -> Extractable:
    r"""Return how many training examples a model reproduces, from how often each was found.

    Among c copies let ``f_1`` examples be found once and ``f_2`` twice. Then (Chao 1987)

    .. math:: \hat S = m + \tfrac{c - 1}{c} \frac{f_1 (f_1 - 1)}{2 (f_2 + 1)} ,

    whatever the probabilities a lower bound on average, and nearly without bias if all are alike;
    its interval is log-normal in the number missed. The next copy is of an example not found yet
    with probability about ``f_1 / c`` (Good 1953).

    Args:
        counts: ``[m]``, copies of each example found, at least 1 each; may be empty.
        num_train: number of training examples that differ, which nothing may exceed.
        confidence: in (0, 1), of the interval.

    Examples:
        >>> extractable([1, 1, 1, 2, 5], 100)
        Extractable(num_images=6.35, low=5.0..., high=49.6..., unseen=0.3)
    """
    check_range("extractable", "confidence", confidence, 0, 1, low_open=True, high_open=True)
    counts = np.asarray(counts)
    check_shape("extractable", "counts", counts, (None,))
    if len(counts) == 0:
        return Extractable(0.0, 0.0, 0.0, 0.0)
    check_range("extractable", "counts", counts, 1)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    m, c = len(counts), int(counts.sum())
    once, twice = int(np.sum(counts == 1)), int(np.sum(counts == 2))
    k = (c - 1) / c
    missed = k * once * (once - 1) / (2 * (twice + 1))
    total = m + missed
    if missed > 0:
        if twice:
            r = once / twice
            variance = twice * (k / 2 * r**2 + k**2 * r**3 + k**2 / 4 * r**4)
        else:
            variance = k * once * (once - 1) / 2 + k**2 * once * (2 * once - 1) ** 2 / 4
            variance -= k**2 * once**4 / (4 * total)
        spread = math.exp(z * math.sqrt(math.log1p(variance / missed**2)))
        low, high = m + missed / spread, m + missed * spread
    else:  # hardly any found once: a Poisson count of the missed
        unseen = float(np.mean(np.exp(-counts)))
        middle, width = m / (1 - unseen), z * math.sqrt(m * unseen) / (1 - unseen)
        low, high = max(m, middle - width), middle + width
    limit = math.inf if num_train is None else float(num_train)
    total, low, high = (min(float(value), limit) for value in (total, low, high))
    return Extractable(total, low, high, once / c)
