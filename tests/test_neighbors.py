"""Nearest neighbours stay exact where the difference of squares loses all its digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import neighbors, sharding
from lowdim_diffusion.neighbors import nearest


def brute(x, reference, k):
    d = np.sqrt(((x[:, None].astype(np.float64) - reference[None]) ** 2).sum(-1))
    index = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, index, 1), index


def clusters(dim):
    """Two clouds of spread 1, 2e4 apart: one rounding of ||x||^2 is larger than any distance."""
    x = np.random.default_rng(0).standard_normal((120, dim)).astype(np.float32)
    x[:60] += 1e4 / np.float32(np.sqrt(dim))
    x[60:] -= 1e4 / np.float32(np.sqrt(dim))
    return x


def crowds(dim):
    """Forty near copies of each of three points, far more than the spare candidates."""
    g = np.random.default_rng(1)
    x = np.repeat(g.standard_normal((3, dim)), 40, axis=0)
    return (x + 1e-5 * g.standard_normal(x.shape)).astype(np.float32)


def ordinary(dim):
    return np.random.default_rng(2).standard_normal((120, dim)).astype(np.float32)


@pytest.mark.parametrize("make", [clusters, crowds, ordinary])
@pytest.mark.parametrize("dim", [2, 16, 17, 40])
def test_exact_at_every_scale(make, dim):
    x = make(dim)
    found = jax.jit(lambda x: nearest(x, x, 6, block=50, query_block=32))(x)
    distance, index = brute(x, x, 6)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-5)
    same = np.asarray(found.index) == index
    assert same.mean() > 0.99  # the rest: distances equal but for rounding


def test_doubtful_and_certain_queries_of_one_batch_under_vmap_and_grad(x64):
    x = jnp.asarray(np.stack([clusters(20), ordinary(20), crowds(20)]))
    search = lambda x: nearest(x[::3], x, 3)
    found = jax.jit(jax.vmap(search))(x)
    for i in range(3):
        distance, index = brute(np.asarray(x[i, ::3]), np.asarray(x[i]), 3)
        np.testing.assert_array_equal(found.index[i], index)
        np.testing.assert_allclose(found.distance[i], distance, rtol=1e-5)
    fixed = jnp.asarray(clusters(20))
    total = lambda q: nearest(q, fixed, 2).distance[:, 1].sum()
    queries = fixed[:5] + 0.1
    near = nearest(queries, fixed, 2)
    grad = jax.jit(jax.grad(total))(queries)
    expected = (queries - fixed[near.index[:, 1]]) / near.distance[:, 1:]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_crowds_of_exact_copies_and_values_that_are_not_finite():
    x = np.repeat(ordinary(20)[:4], 30, axis=0)
    found = nearest(x, x, 5)
    np.testing.assert_array_equal(found.distance, 0)
    assert np.all(np.asarray(found.index) // 30 == np.arange(120)[:, None] // 30)
    broken = ordinary(20)
    broken[7, 3] = np.nan
    search = jax.jit(lambda x, y: nearest(x, y, 2))
    distance = np.asarray(search(broken, ordinary(20)).distance)  # ends
    assert np.isnan(distance[7]).all() and np.isfinite(np.delete(distance, 7, axis=0)).all()
    found = search(np.delete(ordinary(20), 7, axis=0), broken)
    assert np.isfinite(found.distance).all() and not np.any(np.asarray(found.index) == 7)


def near_ties(num, dim):
    """Pixels and a black query; sixes of points, the same pixels in other orders but for one.

    Within a six the squared distances, about 22,000 dim, differ by 1, 3, 5, 7 and 9.
    """
    g = np.random.default_rng(3)
    x = np.repeat(g.integers(0, 256, (num, dim), np.uint8), 6, axis=0)
    x[:, 1:] = g.permuted(x[:, 1:], axis=1)
    x[:, 0] = g.permuted(np.tile(np.arange(6, dtype=np.uint8), (num, 1)), axis=1).reshape(-1)
    return x, np.zeros((1, dim), np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_order_is_that_of_whole_numbers_where_single_precision_cannot_tell(dtype):
    reference, x = near_ties(40, 3072)
    squared = ((x[:, None].astype(np.int64) - reference[None]) ** 2).sum(-1)
    index = np.argsort(squared, axis=1, kind="stable")[:, :13]
    found = nearest(x.astype(dtype), jnp.asarray(reference.astype(dtype)), 13)
    np.testing.assert_array_equal(found.index, index)
    exact = np.sqrt(np.take_along_axis(squared, index, 1))
    np.testing.assert_allclose(found.distance, exact, rtol=1.2e-7)


def test_reference_on_the_host_is_visited_in_chunks(tmp_path, monkeypatch):
    reference, x = near_ties(40, 600)
    np.save(tmp_path / "r.npy", reference.reshape(-1, 10, 60))
    stored = np.load(tmp_path / "r.npy", mmap_mode="r")
    visited = []
    monkeypatch.setattr(neighbors, "_CHUNK_BYTES", 600 * 100)  # 3 chunks of 80 points
    check = neighbors._check_finite
    monkeypatch.setattr(
        neighbors, "_check_finite", lambda n, x: (visited.append(len(x)), check(n, x))
    )
    found = nearest(x.reshape(-1, 10, 60), stored, 90, block=64)
    assert visited == [1, 80, 80, 80]
    distance, index = brute(x, reference, 90)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6)


def test_devices_share_the_queries_and_change_nothing():
    x = clusters(20)
    one = nearest(x[:13], x, 3)
    np.testing.assert_array_equal(one.index, brute(x[:13], x, 3)[1])
    for count in (2, 8):
        found = nearest(x[:13], x, 3, mesh=sharding.data_mesh(count))
        np.testing.assert_array_equal(found.index, one.index)
        np.testing.assert_array_equal(found.distance, one.distance)


def test_many_points_by_groups_and_an_outlier(x64):
    """Enough points that groups stand for scores; one far away costs nobody's digits."""
    g = np.random.default_rng(4)
    reference = g.standard_normal((1500, 17)).astype(np.float32)
    reference[700] = 1e8
    x = g.standard_normal((30, 17)).astype(np.float32)
    found = jax.jit(lambda x, y: nearest(x, y, 2, block=700, query_block=7))(x, reference)
    distance, index = brute(x, reference, 2)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6)


def test_bad_input_is_refused():
    x = ordinary(20)
    broken = x.copy()
    broken[[3, 5], 0] = np.nan, np.inf
    message = "finite numbers, got NaN or infinity in 2 of 120 examples; remove those"
    for reference in (broken, jnp.asarray(broken)):
        with pytest.raises(ValueError, match=f"values of reference: expected {message}"):
            nearest(x, reference)
    with pytest.raises(ValueError, match=f"values of x: expected {message}"):
        nearest(broken, x)
    with pytest.raises(ValueError, match="empty reference: expected at least one point"):
        nearest(x, x[:0])
    with pytest.raises(ValueError, match="k too large: expected at most the 120 reference points"):
        nearest(x, x, 121)
    with pytest.raises(ValueError, match=r"shape of an example: expected the reference's \(20,\)"):
        nearest(x.reshape(120, 4, 5), x)
    with pytest.raises(ValueError, match="k too small: expected at least 1, got 0"):
        nearest(x, x, 0)
