import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from scipy.special import logsumexp, softmax

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.distributions import Empirical


def points(num=23, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(num, dim))


def reference(data, x, alpha, sigma):
    """The definitions, all at once and in float64."""
    squared = np.sum((x[:, None] - alpha * data[None]) ** 2, axis=-1)
    logits = -squared / (2 * sigma**2)
    w = softmax(logits, axis=-1)
    mean = w @ data
    spread = data[None] - mean[:, None]
    constant = np.log(len(data)) + data.shape[1] * np.log(np.sqrt(2 * np.pi) * sigma)
    return {
        "log_prob": logsumexp(logits, axis=-1) - constant,
        "posterior_weights": w,
        "posterior_mean": mean,
        "score": (alpha * mean - x) / sigma**2,
        "posterior_jacobian": alpha / sigma**2 * np.einsum("bi,bin,bim->bnm", w, spread, spread),
    }


@pytest.mark.parametrize("block_size", [1, 7, 23, 1024])
def test_agrees_with_the_definitions(x64, evaluate, block_size):
    data, x = points(), points(4, seed=1)
    p = Empirical(data, block_size=block_size)
    for alpha, sigma in [(1.0, 0.2), (0.6, 0.8), (1.0, 50.0)]:
        expected = reference(data, x, alpha, sigma)
        for name, value in evaluate(p, x, alpha, sigma).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_jacobian_is_the_derivative(x64, evaluate, finite_differences, sigma):
    p, x = Empirical(points(), block_size=7), points(4, seed=1)
    jacobian = np.asarray(evaluate(p, x, 0.9, sigma)["posterior_jacobian"])
    mean = lambda x: evaluate(p, x, 0.9, sigma)["posterior_mean"]
    np.testing.assert_allclose(jacobian, finite_differences(mean, x), atol=1e-6)
    for mode in (jax.jacfwd, jax.jacrev):
        one = mode(lambda x: p.posterior_mean(x[None], 0.9, sigma)[0])
        np.testing.assert_allclose(jacobian, jax.jit(jax.vmap(one))(x), atol=1e-11)
    np.testing.assert_array_equal(jacobian, jacobian.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(jacobian).min() > -1e-12


def test_two_points_give_the_hyperbolic_tangent(x64, evaluate):
    p, x = Empirical(np.array([[-1.0], [1.0]])), np.linspace(-3, 3, 13)[:, None]
    for sigma in (0.1, 1.0, 10.0):
        got = evaluate(p, x, 1.0, sigma)
        np.testing.assert_allclose(got["posterior_mean"], np.tanh(x / sigma**2), atol=1e-14)
        slope = 1 / (sigma * np.cosh(np.minimum(np.abs(x) / sigma**2, 300))) ** 2
        np.testing.assert_allclose(got["posterior_jacobian"][:, 0], slope, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 1e-4])
def test_small_noise_returns_the_nearest_point(evaluate, sigma):
    data = points(500, 8).astype(np.float32)
    x = points(20, 8, seed=1).astype(np.float32)
    p = Empirical(data, block_size=64)
    got = evaluate(p, x, 1.0, sigma)
    nearest = np.argmin(np.sum((x[:, None] - data[None]) ** 2, axis=-1), axis=-1)
    np.testing.assert_array_equal(got["posterior_mean"], data[nearest])
    np.testing.assert_array_equal(np.argmax(got["posterior_weights"], axis=-1), nearest)
    np.testing.assert_array_equal(got["posterior_jacobian"], 0)
    assert all(np.isfinite(got[name]).all() for name in got if name != "log_prob")


def test_exact_ties_average_and_duplicates_count(evaluate):
    data = np.array([[-1.0, 0], [1, 0], [1, 0], [0, 9]], np.float32)
    p, x = Empirical(data, block_size=3), np.zeros((1, 2), np.float32)
    for sigma in (0.0, 1e-4, 0.05):
        got = evaluate(p, x, 1.0, sigma)
        weights = np.asarray(got["posterior_weights"][0])
        np.testing.assert_allclose(weights, np.array([1, 1, 1, 0]) / 3, rtol=1e-6)
        np.testing.assert_allclose(got["posterior_mean"], [[1 / 3, 0]], rtol=1e-6)
    far = evaluate(p, x + 0.5, 1.0, 0.0)
    np.testing.assert_array_equal(far["posterior_mean"], [[1, 0]])


def test_log_prob_at_zero_noise(evaluate):
    data = points(40, 6).astype(np.float32)
    p = Empirical(data)
    log_prob = lambda *args: evaluate(p, *args, names=("log_prob",))["log_prob"]
    np.testing.assert_array_equal(log_prob(data), np.inf)
    np.testing.assert_array_equal(log_prob(0.3 * data, 0.3, 0.0), np.inf)
    np.testing.assert_array_equal(log_prob(data + np.float32(1e-4)), -np.inf)
    assert np.isfinite(log_prob(data + np.float32(0.1), 1.0, 1e-4)).all()


def test_much_noise_or_no_signal_returns_the_mean(x64, evaluate):
    data, x = points(), points(4, seed=1)
    p = Empirical(data, block_size=7)
    mean = np.tile(data.mean(0), (4, 1))
    np.testing.assert_allclose(evaluate(p, x, 0.0, 1.0)["posterior_mean"], mean, atol=1e-14)
    np.testing.assert_allclose(evaluate(p, x, 1.0, 1e6)["posterior_mean"], mean, atol=1e-10)


def test_float32_follows_float64(x64, evaluate):
    """Points that sit close together on a large offset: the expanded square would lose them all."""
    data = (points(60, 16) + 30).astype(np.float32)
    exact, single = Empirical(data.astype(np.float64)), Empirical(data, block_size=16)
    eps = points(32, 16, seed=1)
    for sigma in np.geomspace(1e-4, 1e3, 15):
        sigma = float(np.float32(sigma))
        x = (data[:32] + sigma * eps).astype(np.float32)
        expected = evaluate(exact, x.astype(np.float64), 1.0, sigma)
        for name, low in evaluate(single, x, 1.0, sigma).items():
            assert low.dtype == jnp.float32 and np.isfinite(low).all()
            high = np.asarray(expected[name])
            # Tails of the weights vanish exponentially: absolute error in units of the data.
            scale = max(np.abs(high).max(), 1e-6)
            assert np.abs(low - high).max() < 2e-4 * scale, (name, sigma)


def test_images_keep_their_shape(key):
    data = points(12, 32).reshape(12, 4, 4, 2).astype(np.float32)
    p = Empirical(data, block_size=5)
    x0, labels = p.sample(key, 7)
    np.testing.assert_array_equal(x0, data[np.asarray(labels)])
    assert x0.shape == (7, 4, 4, 2)
    denoise = jax.jit(p.denoiser(schedules.VPLinear()))
    image = denoise(x0, 0.3)
    flat = denoise(x0.reshape(7, 32), 0.3)
    np.testing.assert_allclose(image, flat.reshape(image.shape), rtol=1e-6)


def test_samples_are_uniform_over_the_rows(key):
    p = Empirical(points(10, 2))
    _, labels = p.sample(key, 10_000)
    counts = np.bincount(np.asarray(labels), minlength=10)
    assert np.all(np.abs(counts - 1000) < 5 * 30)


def test_many_points_at_every_noise_follow_float64():
    """Products, the few nearest, differences (a crowd of 40 near copies): errors stay small."""
    g = np.random.default_rng(0)
    data = (g.normal(size=(600, 10)) @ g.normal(size=(10, 64)) + 5).astype(np.float32)
    data[:40] = data[:1] + 1e-2 * g.normal(size=(40, 64))
    p, eps = Empirical(data, block_size=128), g.normal(size=(12, 64))
    mean = jax.jit(lambda x, sigma: p.posterior_mean(x, 1.0, sigma))
    slope = jax.jit(lambda x, s: jax.jvp(lambda x: p.posterior_mean(x, 1.0, s), (x,), (eps32,))[1])
    eps32 = jnp.asarray(eps, jnp.float32)
    for sigma in np.geomspace(1e-3, 80, 14).astype(np.float32):
        x = (data[34:46] + sigma * eps).astype(np.float32)
        exact = reference(data.astype(np.float64), x.astype(np.float64), 1.0, float(sigma))
        error = np.linalg.norm(mean(x, sigma) - exact["posterior_mean"], axis=1)
        assert error.max() < 1e-3, sigma  # points are 25 apart
        expected = np.einsum("bij,bj->bi", exact["posterior_jacobian"], eps)
        scale = 1 + np.abs(expected).max()
        assert np.abs(slope(x, sigma) - expected).max() < 5e-3 * scale, sigma
    together = np.concatenate([data[:2], data[50:52]])
    levels = np.array([1e-3, 0.5, 1e-3, 50], np.float32)
    apart = np.concatenate([mean(together[i : i + 1], levels[i]) for i in range(4)])
    np.testing.assert_allclose(mean(together, levels), apart, atol=1e-3)


@pytest.mark.parametrize("num", [50, 500])
def test_samples_are_training_points(key, num):
    """All end within 1e-2 (relative) of a point, as published; 72 steps, no warning."""
    data = sklearn.datasets.load_digits().data[:num].astype(np.float32) / 8 - 1
    p, ts = Empirical(data), schedules.karras_grid(72)

    def draw(p, ts):
        denoise = p.denoiser(schedules.VE())
        return sampling.sample(key, denoise, schedules.VE(), ts, (64, 64), solver=solvers.heun()).x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = np.asarray(jax.jit(draw)(p, ts))
    distance = np.linalg.norm(x[:, None] - data[None], axis=-1)
    relative = distance.min(1) / np.linalg.norm(data[distance.argmin(1)], axis=1)
    assert relative.max() < 1e-2
    assert len(set(distance.argmin(1))) > 0.5 * min(num, 64)  # and not all on the same
    with pytest.warns(UserWarning, match="18 steps are few for this denoiser.*at least 72"):
        jax.eval_shape(draw, p, schedules.karras_grid(18))


def test_moments(x64):
    data = points() + 50
    mean, covariance = Empirical(data).moments()
    np.testing.assert_allclose(mean, data.mean(0))
    np.testing.assert_allclose(covariance, np.cov(data.T, ddof=0), rtol=1e-10)


@pytest.mark.parametrize("name", ["posterior_mean", "score", "log_prob"])
def test_memory_does_not_grow_with_the_data(name):
    """Neither [b, N, n] (840 MB here) nor [b, N] (13 MB) nor a copy of the data (13 MB)."""
    batch, num, dim = 64, 51_200, 64
    p = jax.eval_shape(lambda d: Empirical(d), jax.ShapeDtypeStruct((num, dim), jnp.float32))
    x = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
    compiled = jax.jit(lambda p, x: getattr(p, name)(x, 1.0, 0.5)).lower(p, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e6


def test_gradient_memory_stays_below_the_batch_times_data(x64):
    batch, num, dim = 16, 8192, 256
    p = jax.eval_shape(lambda d: Empirical(d), jax.ShapeDtypeStruct((num, dim), jnp.float32))
    x = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
    loss = lambda x, p: jnp.sum(p.posterior_mean(x, 1.0, 0.5) ** 2)
    compiled = jax.jit(jax.grad(loss)).lower(x, p).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * 4 * batch * num * dim


@pytest.mark.parametrize(
    "data, message",
    [
        (np.zeros(3), r"wrong shape of data.*data\[:, None\]"),
        (np.zeros((0, 3)), "wrong shape of data"),
    ],
)
def test_refused_data(data, message):
    with pytest.raises(ValueError, match=message):
        Empirical(data)


def test_refused_block_size():
    with pytest.raises(ValueError, match="block_size too small: expected at least 1, got 0"):
        Empirical(points(), block_size=0)
