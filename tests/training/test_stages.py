"""Where to divide the noise levels: against a formula, and the reference values on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import data, distributions, schedules, training

SCHEDULE = schedules.VPLinear()


@pytest.fixture(scope="module")
def digits():
    return distributions.Empirical(data.digits().images.reshape(-1, 64) / 127.5 - 1)


def drawn(distribution, num_draws=512, **options):
    run = lambda key, p: training.stage_similarity(key, p, SCHEDULE, num_draws=num_draws, **options)
    return jax.jit(run)(jax.random.key(0), distribution)


@pytest.mark.parametrize("predict", ["eps", "x0"])
def test_similarity_of_two_points_in_closed_form(predict):
    """The posterior mean of -1 and 1 at x is tanh(alpha x / sigma^2)."""
    p = distributions.Empirical(jnp.array([[-1.0], [1.0]]))
    draw = np.random.default_rng(0)
    x0, eps = draw.choice([-1.0, 1.0], (200, 3, 1)), draw.normal(size=(200, 3, 1))
    a, b = draw.uniform(0.05, 1, (2, 200))

    def prediction(t):
        log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        alpha = np.exp(log_alpha)[:, None, None]
        sigma = np.sqrt(1 - alpha**2)
        x = alpha * x0 + sigma * eps
        clean = np.tanh(alpha * x / sigma**2)
        return clean if predict == "x0" else (x - alpha * clean) / sigma

    expected = (np.abs(prediction(a) - prediction(b)) <= 0.1).mean((1, 2))
    one_by_one = p.denoiser(SCHEDULE)
    denoise_fn = lambda x, t: one_by_one(x.reshape(-1, 1), jnp.repeat(t, 3)).reshape(x.shape)
    found = training.denoiser_similarity(
        *(denoise_fn, SCHEDULE, *(jnp.asarray(v, jnp.float32) for v in (x0, eps, a, b))),
        eta=0.1,
        predict=predict,
    )
    assert 0.2 < expected.mean() < 0.95
    assert np.mean(np.abs(found - expected) > 0.01) < 0.02  # but for ties in float32


def test_intervals_of_digits(digits):
    """Reference: t1 = .17, t2 = .88 at alpha = .9 with two grey levels of 256."""
    t1, t2 = training.find_stages(drawn(digits))
    assert t1 == pytest.approx(0.17, abs=0.03) and t2 == pytest.approx(0.88, abs=0.03)


def test_draws_depend_on_the_key_and_not_on_the_blocks():
    p = distributions.Empirical(jnp.array([[-1.0], [0.0], [1.0]]))
    found, other = drawn(p), drawn(p, batch_size=200)  # no divisor
    for mine, same in zip(found, other, strict=True):
        np.testing.assert_allclose(mine, same, atol=1e-6)
    assert np.all(np.diff(found.t) >= 0) and found.t.shape == found.to_noise.shape == (512,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predict", "levels", "alpha", "t1", "t2"),
    [
        ("eps", 2, 0.9, 0.17, 0.88),
        ("eps", 2, 0.7, 0.31, 0.75),
        ("eps", 4, 0.9, 0.19, 0.80),
        ("eps", 4, 0.7, 0.32, 0.63),
        ("x0", 2, 0.9, 0.19, 0.88),
    ],
)
def test_reference_values(digits, predict, levels, alpha, t1, t2):
    found = drawn(digits, 2048, eta=levels / 256, predict=predict)
    assert training.find_stages(found, alpha) == pytest.approx((t1, t2), abs=0.03)


def test_stages_are_the_longest_of_that_similarity():
    t = jnp.linspace(0, 1, 11)
    falling = jnp.array([1, 1, 1, 0.6, 0.4, 0, 0, 0, 0, 0, 0])
    stages = lambda alpha: training.find_stages(
        training.StageSimilarity(t, falling, falling[::-1]), alpha
    )
    assert stages(1.0) == pytest.approx((0.2, 0.8))
    assert stages(0.9) == pytest.approx((0.3, 0.7))
    assert stages(0.8) == pytest.approx((0.4, 0.6))
    with pytest.raises(ValueError, match="find_stages: stages overlap: expected t1 < t2"):
        stages(0.5)


def test_bad_calls():
    t = jnp.linspace(0, 1, 11)
    with pytest.raises(ValueError, match=r"no time is similar to an end: expected mean 0.9"):
        training.find_stages(training.StageSimilarity(t, 0 * t, 0 * t + 1))
    with pytest.raises(ValueError, match="alpha out of range"):
        training.find_stages(training.StageSimilarity(t, 0 * t, 0 * t + 1), 1.5)
    p = distributions.Empirical(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="num_draws too small"):
        training.stage_similarity(jax.random.key(0), p, SCHEDULE, num_draws=0)
    like = (p.denoiser(SCHEDULE), SCHEDULE, jnp.zeros((1, 3)), jnp.zeros((1, 3)), 0.1, 0.2)
    with pytest.raises(ValueError, match="eta out of range"):
        training.denoiser_similarity(*like, eta=-1.0)
