"""Clustering scores against scikit-learn, scipy's assignment and counts made by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics

from lowdim_diffusion import subspaces
from lowdim_diffusion.subspaces import scores

SCORES = [
    subspaces.clustering_accuracy,
    subspaces.normalized_mutual_info,
    subspaces.adjusted_rand_index,
]


def all_scores(labels_true, labels_pred, num_labels=None):
    return jnp.stack([score(labels_true, labels_pred, num_labels=num_labels) for score in SCORES])


def reference(labels_true, labels_pred):
    """By other libraries: accuracy of scipy's assignment, then scikit-learn's scores."""
    labels_true, labels_pred = np.asarray(labels_true), np.asarray(labels_pred)
    table = sklearn.metrics.cluster.contingency_matrix(labels_true, labels_pred)
    rows, cols = scipy.optimize.linear_sum_assignment(table, maximize=True)
    return [
        table[rows, cols].sum() / len(labels_true),
        sklearn.metrics.normalized_mutual_info_score(labels_true, labels_pred),
        sklearn.metrics.adjusted_rand_score(labels_true, labels_pred),
    ]


def random_labellings(num_cases, num_points, seed=0):
    """Pairs from unrelated to nearly equal, with 1 to 6 labels of any sign and gap."""
    rng = np.random.default_rng(seed)
    names = np.array([-7, -1, 0, 3, 4, 1000])
    pairs = []
    for _ in range(num_cases):
        sizes = rng.integers(1, 7, size=2)
        true = rng.permutation(names)[rng.integers(0, sizes[0], num_points)]
        pred = rng.permutation(names)[rng.integers(0, sizes[1], num_points)]
        copied = rng.random(num_points) < rng.choice([0.0, 0.5, 0.9, 1.0])
        pairs.append((true, np.where(copied, true[::1] * 2 + 5, pred)))
    return np.array(pairs)


def test_many_random_labellings_in_one_program(x64):
    pairs = random_labellings(300, 25)
    got = jax.jit(jax.vmap(partial(all_scores, num_labels=12)))(pairs[:, 0], pairs[:, 1])
    np.testing.assert_allclose(got, [reference(*pair) for pair in pairs], atol=1e-12)
    swapped = jax.jit(jax.vmap(partial(all_scores, num_labels=12)))(pairs[:, 1], pairs[:, 0])
    np.testing.assert_allclose(swapped, got, atol=1e-12)


@pytest.mark.slow
def test_leading_axes_are_labellings_of_their_own():
    """Restarts and settings against one truth; each alone has another number of labels."""
    rng = np.random.default_rng(4)
    true = rng.integers(0, 3, 12)
    pred = rng.integers(0, np.array([[[2]], [[5]]]), (2, 3, 12)) * 7 - 3
    wanted = np.array([[reference(true, row) for row in rows] for rows in pred])
    np.testing.assert_allclose(np.moveaxis(all_scores(true, pred), 0, -1), wanted, atol=1e-6)
    jitted = jax.jit(partial(all_scores, num_labels=6))(pred, true[None])
    np.testing.assert_allclose(np.moveaxis(jitted, 0, -1), wanted, atol=1e-6)


@pytest.mark.slow
def test_plain_calls_need_no_bound():
    for pair in random_labellings(3, 40, seed=1):
        np.testing.assert_allclose(all_scores(*pair), reference(*pair), atol=1e-6)


def test_jit_without_a_bound_takes_the_number_of_points():
    true, pred = random_labellings(1, 9, seed=2)[0]
    np.testing.assert_allclose(jax.jit(all_scores)(true, pred), reference(true, pred), atol=1e-6)


def test_greedy_matching_would_be_wrong():
    true = [0] * 11 + [1] * 6
    pred = [0] * 6 + [1] * 5 + [0] * 5 + [1]
    assert float(subspaces.clustering_accuracy(true, pred)) == pytest.approx(10 / 17)


@pytest.mark.parametrize(
    ("true", "pred", "expected"),
    [
        ([0, 0, 0], [4, 4, 4], [1, 1, 1]),
        ([0, 0, 1, 1], [4, 4, 4, 4], [1 / 2, 0, 0]),
        ([4, 4, 4, 4], [0, 0, 1, 1], [1 / 2, 0, 0]),
        ([0, 1, 2], [0, 0, 0], [1 / 3, 0, 0]),
        ([0, 1, 2], [9, -9, 5], [1, 1, 1]),
        ([3], [8], [1, 1, 1]),
        ([0, 0, 1, 1], [0, 1, 2, 3], [1 / 2, 2 / 3, 0]),
        ([0, 0, 1, 1], [0, 1, 0, 1], [1 / 2, 0, -1 / 2]),
    ],
)
def test_small_and_degenerate_cases(true, pred, expected):
    # The counts: four singletons share log 2 of a mean entropy of (log 2 + log 4) / 2.
    np.testing.assert_allclose(all_scores(true, pred), expected, atol=1e-6)
    np.testing.assert_allclose(reference(true, pred), expected, atol=1e-12)
    jitted = jax.jit(partial(all_scores, num_labels=4))(jnp.array(true), jnp.array(pred))
    np.testing.assert_allclose(jitted, expected, atol=1e-6)


def test_equal_partitions_score_exactly_one_in_float32():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 37, 70_001)
    assert all_scores(true, -3 * true).tolist() == [1, 1, 1]


def test_large_unbalanced_labellings_keep_their_digits_in_float32():
    """N^2 exceeds int32, and nearly all points share one cluster: 1 - share would cancel."""
    rng = np.random.default_rng(0)
    true = np.zeros(70_000, int)
    true[rng.permutation(70_000)[:40]] = 1
    pred = np.where(np.arange(70_000) % 1000 == 0, 2, true)
    np.testing.assert_allclose(all_scores(true, pred), reference(true, pred), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_integer_types(dtype):
    true = np.array([0, 0, 1, 1, 100], dtype)
    assert float(subspaces.adjusted_rand_index(true, true[::-1].astype(np.int32))) == pytest.approx(
        sklearn.metrics.adjusted_rand_score(true, true[::-1])
    )


def test_64_bit_labels_are_not_cut_and_booleans_are_labels():
    true = np.array([2**40, 0, 2**33, 0])
    assert all_scores(true, [3, 1, 2, 1]).tolist() == [1, 1, 1]
    assert all_scores(np.array([True, False, True]), [5, 2, 5]).tolist() == [1, 1, 1]


def test_more_labels_than_the_bound():
    true, pred = jnp.arange(5), jnp.zeros(5, int)
    for score in SCORES:
        assert bool(jnp.isnan(jax.jit(partial(score, num_labels=4))(true, pred)))
        with pytest.raises(
            ValueError, match=r"too many different labels_true: .* at most 4, got 5"
        ):
            score(true, pred, num_labels=4)


@pytest.mark.parametrize("score", SCORES)
def test_bad_labels(score):
    with pytest.raises(ValueError, match=r"differ in length: expected 3 predicted .* got 2"):
        score([0, 1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"wrong shape of labels_true: .* got \(0,\)"):
        score([], [])
    with pytest.raises(ValueError, match=r"differ in length: expected 2 predicted .* got 1"):
        score([0, 1], [[0], [1]])  # a column, as .mat files have
    with pytest.raises(ValueError, match=r"wrong shape of labels_pred: .* got \(\)"):
        score([0, 1], 1)
    with pytest.raises(TypeError, match="labels_pred must be integers, got float64"):
        score([0, 1], [0.0, 1.0])
    with pytest.raises(TypeError, match="labels_true must be integers, got float32"):
        jax.jit(score)(jnp.array([0.0, jnp.nan]), jnp.array([0, 1]))
    with pytest.raises(ValueError, match="num_labels too small"):
        score([0, 1], [0, 1], num_labels=0)


def test_traced_once():
    traces = []

    @jax.jit
    def counted(true, pred):
        traces.append(1)
        return all_scores(true, pred, num_labels=3)

    for shift in range(3):
        counted(jnp.array([0, 1, 2, 2]) + shift, jnp.array([1, 1, 0, 2]))
    assert len(traces) == 1
    assert scores.clustering_accuracy is subspaces.clustering_accuracy
