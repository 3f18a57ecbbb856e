"""Nearest neighbours stay exact where the difference of squares loses all its digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    distance = np.asarray(nearest(broken, ordinary(20), 2).distance)  # ends
    assert np.isnan(distance[7]).all() and np.isfinite(np.delete(distance, 7, axis=0)).all()
