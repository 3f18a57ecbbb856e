r"""How well do two labellings of the same points agree? Accuracy, mutual information, Rand index.

All three are read off the contingency table ``n_ij``, the number of points with true label i and
predicted label j, with row sums ``a_i``, column sums ``b_j`` and total N. None of them depends on
what the labels are called.

==========================  ======================================================  ===========
score                       formula                                                 range
==========================  ======================================================  ===========
``clustering_accuracy``     ``max over one-to-one maps of sum_i n_{i, map(i)} / N``  (0, 1]
``normalized_mutual_info``  ``2 I(true; pred) / (H(true) + H(pred))``                [0, 1]
``adjusted_rand_index``     ``(R - E[R]) / (max R - E[R])``, R agreement of pairs    [-1/2, 1]
==========================  ======================================================  ===========

Labels are integers of any kind: negative, with gaps, numpy's 64 bits. Leading axes are labellings
of their own and broadcast, so that many restarts ``[r, N]`` are scored against one truth ``[N]``.
Outside ``jit`` nothing else is needed. Inside ``jit`` and ``vmap`` the number of different labels
is unknown, and shapes must not depend on it: pass ``num_labels``, an upper bound for either side.
Without it the table is ``[N, N]``.

References:
    Kuhn 1955, doi:10.1002/nav.3800020109 (assignment); Vinh, Epps & Bailey 2010, JMLR 11 (mutual
    information, with the arithmetic mean); Hubert & Arabie 1985, doi:10.1007/BF01908075.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int
from lowdim_diffusion.subspaces._assignment import assign


def _numbered(
    where: str, name: str, labels: ArrayLike, num_labels: int | None
) -> tuple[Int[Array, "*k N"], int]:
    """The labels of each labelling renamed to 0, 1, ... in their order, and a bound on how many."""
    if not hasattr(labels, "dtype"):
        labels = np.asarray(labels)
    if labels.ndim == 0 or labels.size == 0:
        raise fail(where, f"wrong shape of {name}", "[..., N] with N >= 1", labels.shape)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        fix = "round and convert them if they stand for classes"
        raise TypeError(f"{where}: {name} must be integers, got {labels.dtype}; {fix}.")
    rows = labels.reshape(-1, labels.shape[-1])
    if is_concrete(labels):  # by numpy: jax would cut 64-bit labels to 32 bits
        found = [np.unique(row, return_inverse=True) for row in np.asarray(rows)]
        most = max(len(values) for values, _ in found)
        if num_labels is not None and most > num_labels:
            raise fail(where, f"too many different {name}", f"at most {num_labels}", most)
        numbers = np.stack([inverse for _, inverse in found]).reshape(labels.shape)
        return jnp.asarray(numbers, jnp.int32), num_labels or most
    size = labels.shape[-1]
    number = lambda row: jnp.unique(row, return_inverse=True, size=size)[1]
    numbers = jax.vmap(number)(rows).reshape(labels.shape)
    return numbers.astype(jnp.int32), num_labels or size


def _contingency(
    where: str, labels_true: ArrayLike, labels_pred: ArrayLike, num_labels: int | None
) -> tuple[Int[Array, "*k num_true num_pred"], Float[Array, "*k"]]:
    """The tables of counts, and the points' number or NaN where labels exceed ``num_labels``."""
    if num_labels is not None:
        check_int(where, "num_labels", num_labels)
    i, rows = _numbered(where, "labels_true", labels_true, num_labels)
    j, cols = _numbered(where, "labels_pred", labels_pred, num_labels)
    if i.shape[-1] != j.shape[-1]:
        expected = f"{i.shape[-1]} predicted labels"
        raise fail(where, "labellings differ in length", expected, j.shape[-1])

    def count(i: Array, j: Array) -> tuple[Array, Array]:
        table = jnp.zeros((rows, cols), jnp.int32).at[i, j].add(1, mode="drop")
        fits = (jnp.max(i) < rows) & (jnp.max(j) < cols)
        return table, jnp.where(fits, jnp.asarray(i.size, jnp.result_type(float)), jnp.nan)

    shape = jnp.broadcast_shapes(i.shape, j.shape)
    i, j = jnp.broadcast_to(i, shape), jnp.broadcast_to(j, shape)
    return jnp.vectorize(count, signature="(n),(n)->(r,c),()")(i, j)


def clustering_accuracy(
    labels_true: ArrayLike, labels_pred: ArrayLike, *, num_labels: int | None = None
) -> Float[Array, "*k"]:
    """Return the share of points labelled right under the best one-to-one renaming of labels.

    Exact (the Hungarian method). With more predicted clusters than true ones, or fewer, the
    surplus stays unmatched and its points count as wrong; purity, which maps several clusters to
    one, is never smaller.

    Args:
        labels_true: ``[..., N]`` integers.
        labels_pred: ``[..., N]`` integers; swapping the two changes nothing.
        num_labels: bound on the number of different labels on either side; for ``jit``, see the
            module. Time grows with its cube.

    Returns:
        ``[...]`` in (0, 1]; NaN inside ``jit`` if there are more labels than ``num_labels``.

    Raises:
        ValueError: if the labellings are empty, differ in length or (outside ``jit``) have more
            than ``num_labels`` labels.
        TypeError: if the labels are not integers.

    Examples:
        >>> float(clustering_accuracy([0, 0, 1, 1], [7, 7, -3, 7]))
        0.75
    """
    table, total = _contingency("clustering_accuracy", labels_true, labels_pred, num_labels)
    if table.shape[-2] > table.shape[-1]:
        table = jnp.swapaxes(table, -1, -2)
    count = table.astype(jnp.result_type(float))
    best = jnp.vectorize(assign, signature="(i,j)->(i)")(-count)
    right = jnp.take_along_axis(count, best[..., None], axis=-1)
    return jnp.sum(right, axis=(-2, -1)) / total


def normalized_mutual_info(
    labels_true: ArrayLike, labels_pred: ArrayLike, *, num_labels: int | None = None
) -> Float[Array, "*k"]:
    r"""Return the mutual information of two labellings over the mean of their entropies.

    .. math:: \frac{2 I}{H_t + H_p} = 1 - \frac{H(t | p) + H(p | t)}{H_t + H_p}

    computed in the second form, in which nothing cancels: equal partitions give exactly 1. Two
    labellings with a single cluster each score 1; if only one has a single cluster, 0.

    Arguments, NaN and errors as in :func:`clustering_accuracy`.

    Examples:
        >>> float(normalized_mutual_info([0, 0, 1, 1], [1, 1, 0, 0]))
        1.0
        >>> float(normalized_mutual_info([0, 0, 1, 1], [5, 5, 5, 5]))
        0.0
    """
    table, total = _contingency("normalized_mutual_info", labels_true, labels_pred, num_labels)
    a, b = jnp.sum(table, axis=-1, keepdims=True), jnp.sum(table, axis=-2, keepdims=True)
    every = jnp.sum(a, axis=-2, keepdims=True)

    def entropy(part: Array, whole: Array) -> Array:
        """``-sum part / N log(part / whole)``, exact where a part is nearly the whole."""
        rest = (whole - part) / jnp.where(part > 0, part, 1)
        terms = jnp.where(part > 0, part * jnp.log1p(rest), 0)
        return jnp.sum(terms, axis=(-2, -1)) / total

    both = entropy(a, every) + entropy(b, every)
    unshared = entropy(table, a) + entropy(table, b)
    return jnp.clip(1 - unshared / jnp.where(both > 0, both, 1), 0, 1)


def adjusted_rand_index(
    labels_true: ArrayLike, labels_pred: ArrayLike, *, num_labels: int | None = None
) -> Float[Array, "*k"]:
    r"""Return the agreement of two labellings on pairs of points, 0 for chance and 1 for equality.

    With the shares of pairs that are together in both labellings (s), apart in both (d), together
    only in the true one (t) and only in the predicted one (p),

    .. math:: \frac{2 (s d - t p)}{(s + t)(t + d) + (s + p)(p + d)}.

    Chance means random labellings with the same cluster sizes; worse than chance is negative. Two
    labellings with a single cluster each score 1; if only one has a single cluster, 0.

    Arguments, NaN and errors as in :func:`clustering_accuracy`.

    Examples:
        >>> float(adjusted_rand_index([0, 0, 1, 1], [3, 3, 9, 9]))
        1.0
        >>> float(adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]))
        -0.5
    """
    table, total = _contingency("adjusted_rand_index", labels_true, labels_pred, num_labels)
    a, b = jnp.sum(table, axis=-1, keepdims=True), jnp.sum(table, axis=-2, keepdims=True)
    every, each = jnp.sum(a, axis=-2, keepdims=True), total[..., None, None]
    others = jnp.maximum(each - 1, 1)

    def share(partners: Array) -> Array:
        """Mean over all points of ``partners / (N - 1)``; as integers, N^2 would overflow."""
        terms = table / each * jnp.where(table > 0, partners / others, 0)
        return jnp.sum(terms, axis=(-2, -1))

    s, d = share(table - 1), share(every - a - b + table)
    t, p = share(a - table), share(b - table)
    bound = (s + t) * (t + d) + (s + p) * (p + d)
    score = 2 * (s * d - t * p) / jnp.where(bound > 0, bound, 1)
    return jnp.where(t + p == 0, 1, score)
