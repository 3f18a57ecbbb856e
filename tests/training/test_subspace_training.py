"""Training in random subspaces: the toy whose intrinsic dimension is known, and the projections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from lowdim_diffusion import training

KINDS = ("dense", "sparse", pytest.param("fastfood", marks=pytest.mark.slow))


def toy(params, batch=None, key=None):
    """1000 parameters in ten groups that should add up to 1 .. 10: intrinsic dimension 10."""
    sums = jnp.concatenate([params["a"].ravel(), params["b"]]).reshape(10, 100).sum(1)
    return jnp.sum((sums - jnp.arange(1.0, 11.0)) ** 2)


START = {"a": np.zeros((30, 20)), "b": np.zeros(400)}


def subspace(key, dim, kind):
    """``expand``, and the columns of P ``[1000, dim]``."""
    expand = training.random_subspace(key, jax.tree.map(jnp.asarray, START), dim, kind=kind)
    columns = jax.jit(jax.vmap(lambda theta: ravel_pytree(expand(theta))[0]))(jnp.eye(dim))
    return expand, np.asarray(columns).T


@pytest.mark.parametrize("kind", KINDS)
def test_toy_needs_ten_dimensions(kind, x64):
    """Li et al. 2018: solved exactly at d = 10 and not at 9, by the best theta there is."""
    least = {}
    for dim in (9, 10):
        expand, columns = subspace(jax.random.key(0), dim, kind)
        sums = columns.reshape(10, 100, dim).sum(1)
        theta = np.linalg.lstsq(sums, np.arange(1.0, 11.0))[0]
        least[dim] = toy(expand(jnp.asarray(theta)))
    assert least[10] < 1e-20 and least[9] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_unit_norm_and_are_nearly_orthogonal(kind, x64):
    expand, columns = subspace(jax.random.key(1), 40, kind)
    np.testing.assert_array_equal(ravel_pytree(expand(jnp.zeros(40)))[0], 0)
    gram = columns.T @ columns
    exact = 0.15 if kind == "fastfood" else 1e-12
    np.testing.assert_allclose(np.diag(gram), 1, atol=exact)
    assert abs(gram - np.diag(np.diag(gram))).max() < 0.2
    if kind != "fastfood":
        nested = subspace(jax.random.key(1), 3, kind)[1]
        np.testing.assert_allclose(nested, columns[:, :3], atol=1e-12)


@pytest.mark.parametrize("kind", ["sparse", "fastfood"])
def test_large_networks_need_no_matrix(kind):
    """2^20 parameters and d = 500: dense columns would take 2 GB."""
    params = {"w": jnp.zeros((1000, 1048)), "b": jnp.zeros(576, jnp.bfloat16)}

    def expand(key, theta):
        return training.random_subspace(key, params, 500, kind=kind)(theta)

    compiled = jax.jit(expand).lower(jax.random.key(0), jnp.zeros(500)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**26
    out = jax.eval_shape(expand, jax.random.key(0), jnp.zeros(500))
    assert out["b"].dtype == jnp.bfloat16 and out["w"].shape == (1000, 1048)


def test_fits_like_any_parameters(key):
    expand = training.random_subspace(key, {"w": jnp.zeros(50)}, 5)
    goal = expand(jnp.arange(5.0))["w"]
    loss_fn = lambda theta, batch, key: jnp.sum((expand(theta)["w"] - batch) ** 2)
    theta, _ = jax.jit(
        lambda key: training.fit(
            key, jnp.zeros(5), loss_fn, optax.sgd(0.3), lambda key, step: goal, 200
        )
    )(key)
    np.testing.assert_allclose(theta, np.arange(5.0), atol=1e-3)


def test_bad_input_is_named(unchecked, key):
    with pytest.raises(ValueError, match="dim too large: expected at most 4, all parameters"):
        training.random_subspace(key, {"w": jnp.zeros(4)}, 5)
    with pytest.raises(ValueError, match="unknown kind"):
        training.random_subspace(key, {"w": jnp.zeros(4)}, 2, kind="other")
