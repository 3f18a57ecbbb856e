"""PCA and numerical rank against dense linear algebra and their definitions."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lowdim_diffusion import subspaces

# --- PCA ---------------------------------------------------------------------------------------


def test_pca_spans_the_leading_right_singular_vectors(key):
    x = jax.random.normal(key, (40, 9)) * jnp.arange(9, 0, -1.0)[None] + 1
    basis = subspaces.pca(x, 3)
    reference = np.linalg.svd(np.asarray(x, np.float64))[2][:3].T
    np.testing.assert_allclose(np.abs(basis.T @ reference), np.eye(3), atol=1e-4)


@pytest.mark.parametrize("num", [1, 3, 4])
def test_pca_recovers_a_subspace_as_soon_as_samples_span_it(x64, key, num):
    true = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 4)))[0]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((num, 4)) @ true.T)
    basis = subspaces.pca(x, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    error = np.linalg.norm(basis @ basis.T - true @ true.T)
    assert error < 1e-10 if num >= 4 else 0.5 < error <= np.sqrt(2 * (4 - num)) + 1e-12


def test_pca_errors():
    with pytest.raises(ValueError, match="rank too large: expected at most the data's dimension 3"):
        subspaces.pca(jnp.ones((5, 3)), 4)
    with pytest.raises(ValueError, match="no samples"):
        subspaces.pca(jnp.ones((0, 3)), 1)
    with pytest.raises(ValueError, match="rank too small"):
        subspaces.pca(jnp.ones((5, 3)), 0)


# --- numerical rank ----------------------------------------------------------------------------


def test_numerical_rank_is_the_rooted_rule():
    s = jnp.array([3.0, 1.0, 0.1])
    # squared shares .8991, .9990; roots .9482, .9995: the rooted rule stops earlier at 0.94.
    assert int(subspaces.numerical_rank(s, 0.94)) == 1
    assert int(subspaces.numerical_rank(s, 0.99)) == 2
    assert int(subspaces.numerical_rank(s, 0.9999)) == 3


def test_numerical_rank_edges():
    assert int(subspaces.numerical_rank(jnp.zeros(5))) == 0
    assert int(subspaces.numerical_rank(jnp.array([1e-30, 0.0]))) == 1
    assert int(subspaces.numerical_rank(jnp.array([1e25, 1e25]))) == 2
    assert int(subspaces.numerical_rank(jnp.array([0.1, 3.0, 1.0]))) == 2  # any order
    assert int(subspaces.numerical_rank(jnp.ones(7), 0.9999999999)) == 7
    assert int(subspaces.numerical_rank(jnp.array([jnp.nan, 1.0, 1.0]))) == 3
    assert subspaces.numerical_rank(jnp.eye(4)[None]).tolist() == [[1, 1, 1, 1]]
    with pytest.raises(ValueError, match="energy out of range"):
        subspaces.numerical_rank(jnp.ones(3), 1.0)


@hypothesis.given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 0.999))
@hypothesis.settings(deadline=None, max_examples=40)
def test_numerical_rank_satisfies_its_definition(values, energy):
    with jax.enable_x64(True):
        rank = int(subspaces.numerical_rank(jnp.asarray(values, jnp.float64), energy))
    s = np.sort(np.asarray(values))[::-1]
    total = np.sqrt((s**2).sum())
    kept = lambda r: np.sqrt((s[:r] ** 2).sum())
    slack = 1e-9 * total
    if total < 1e-150:
        return  # squares underflow in this oracle
    assert kept(rank) > energy * total - slack
    assert kept(rank - 1) <= energy * total + slack


def test_numerical_rank_with_the_energy_of_an_unseen_tail():
    """Leading values and the whole energy give the rank of the full spectrum, or say "more"."""
    s = jnp.asarray([[4.0, 3.0, 1.0, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0]])
    total = (s**2).sum(-1)
    full = subspaces.numerical_rank(s, 0.97)
    assert full.tolist() == [2, 5]
    for m in (2, 3, 4):
        got = subspaces.numerical_rank(s[:, :m], 0.97, total=total)
        assert got.tolist() == [2, m + 1]
    tiny = subspaces.numerical_rank(1e-25 * s[:, :3], 0.97, total=1e-50 * total.astype(jnp.float32))
    assert tiny.shape == (2,)  # the square of such values underflows; no NaN, no exception
