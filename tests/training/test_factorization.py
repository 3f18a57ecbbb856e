"""Adapters of every kind of kernel; compressed factors that follow the large ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import losses, networks, schedules, training

NETWORKS = {
    "mlp": {"data_shape": (8,), "width": 16, "depth": 1},
    "unet": {"data_shape": (8, 8, 1), "channels": 8, "attention": (4,)},
    "dit": {"data_shape": (8, 8, 1), "width": 32, "depth": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_adapts_every_kernel_of_a_network(name, key):
    net = networks.make(name, **NETWORKS[name])
    shapes = jax.eval_shape(net.init, key)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes)
    factors = jax.jit(lambda k: training.init_adapter(k, params, 4))(key)
    kernels = [p for p in jax.tree.leaves(params) if p.ndim > 1]
    assert len(factors) == len(kernels)
    for fs in factors.values():
        assert len(fs) == 3
        for f in fs:  # orthonormal rows or columns, times the scale
            s = np.linalg.svd(np.asarray(f), compute_uv=False)
            np.testing.assert_allclose(s, 1e-3, rtol=1e-3)
    merged = jax.jit(training.merge_adapter)(params, factors)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)  # the network as it was trained


def test_change_is_the_product_of_the_factors(key):
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(5)}}
    factors = training.init_adapter(key, params, 3, depth=2, scale=1.0)
    (f1, f2), half = factors["conv/kernel"], 0.5
    merged = training.merge_adapter(params, factors, strength=half)
    change = (np.asarray(f1) @ np.asarray(f2)).reshape(3, 3, 2, 5)
    np.testing.assert_allclose(merged["conv"]["kernel"], 1 + half * change, rtol=1e-6)
    np.testing.assert_array_equal(merged["conv"]["bias"], 1)


@pytest.mark.slow
def test_fine_tunes_a_denoiser_and_leaves_the_rest(key):
    """The loss falls by training factors of two kernels; every other leaf stays bit for bit."""
    net, schedule = networks.make("mlp", data_shape=(4,), width=16, depth=1), schedules.VE()
    params = net.init(key)
    data = {"x": jnp.array([[1.0, -1.0, 0.5, 0.0]]).repeat(64, 0)}
    loss_fn = losses.make_loss(net, schedule)

    @jax.jit
    def run(key):
        factors = training.init_adapter(key, params, 2, paths=("in/kernel", "out/*"))
        loss = training.adapter_loss(loss_fn, params)
        trained, metrics = training.fit(key, factors, loss, optax.adam(2e-2), lambda *_: data, 300)
        return training.merge_adapter(params, trained), metrics["loss"]

    tuned, curve = run(key)
    assert curve[-50:].mean() < 0.5 * curve[:20].mean()
    for name in ("first_0", "second_0", "film_0", "embedding"):
        for a, b in zip(jax.tree.leaves(tuned[name]), jax.tree.leaves(params[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    change = np.asarray(tuned["in"]["kernel"] - params["in"]["kernel"])
    assert np.linalg.matrix_rank(change, tol=1e-4) <= 2 and abs(change).max() > 0.01


@pytest.mark.slow
def test_compressed_factors_follow_the_large_ones(x64):
    """Three factors of side 100, target of rank 3: moves of rank 6, equal losses to 1e-3."""
    n, rank, scale, rate, num_steps = 100, 3, 0.03, 0.1, 400
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for _ in range(2))
    target = jnp.asarray(left * [3.0, 2.0, 1.5] @ right.T)
    loss = lambda w: 0.5 * jnp.sum((w - target) ** 2)
    factors = training.orthogonal_factors(jax.random.key(0), n, 3, scale, dtype=jnp.float64)
    small = training.compress(factors, jax.grad(loss)(jnp.zeros((n, n))), rank)

    def descend(whole, factors):
        def step(factors, _):
            value, slope = jax.value_and_grad(lambda f: loss(whole(f)))(factors)
            return jax.tree.map(lambda f, s: f - rate * s, factors, slope), value

        return jax.lax.scan(step, factors, None, length=num_steps)

    trained, full = jax.jit(lambda f: descend(training.factor_product, f))(factors)
    _, compressed = jax.jit(lambda f: descend(small.whole, f))(small.factors)
    assert full[-1] < 1e-3 * full[0]
    seen = full > 1e-5 * full[0]
    np.testing.assert_allclose(compressed[seen], full[seen], rtol=1e-3)
    still = 0.5 * (n - 2 * rank) * scale**6  # the directions that do not move
    np.testing.assert_allclose(compressed + still, full, rtol=1e-3)
    for after, before in zip(trained, factors, strict=True):
        s = np.linalg.svd(np.asarray(after - before), compute_uv=False)
        assert rank <= np.sum(s > 1e-3 * s[0]) <= 2 * rank


def test_bad_input_is_named(unchecked, key):
    params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match="no kernel matches: expected some of a/kernel, got 'b/"):
        training.init_adapter(key, params, 2, paths=("b/*",))
    factors = training.init_adapter(key, params, 2)
    with pytest.raises(ValueError, match="no such kernel: expected some of c"):
        training.merge_adapter({"c": jnp.ones(2)}, factors)
    with pytest.raises(ValueError, match=r"wrong shape of the change of a/kernel: expected \(4, 3"):
        training.merge_adapter({"a": {"kernel": jnp.ones((4, 3))}}, factors)
    with pytest.raises(ValueError, match="rank too large"):
        training.compress(training.orthogonal_factors(key, 4, 2, 0.1), jnp.eye(4), 3)
