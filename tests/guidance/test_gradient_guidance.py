"""Classifier and reward guidance against exact posteriors, tilted Gaussians and a singular law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import distributions, guidance, linalg, sampling, schedules, solvers

VP, VE, RF = schedules.VPLinear(), schedules.VE(), schedules.RectifiedFlow()


def test_classifier_gives_the_component(key, x64):
    """Of a mixture, with the exact log-probability of a component: that component's denoiser."""
    bases = linalg.random_frames(key, num_components=3, dim=6, rank=2, dtype=float)
    means = jax.random.normal(key, (3, 6), float)
    mixture = distributions.MoLRG(bases, means=means, noise_std=0.3)
    part = distributions.MoLRG(bases[1:2], means=means[1:2], noise_std=0.3)

    def log_prob_fn(x, t):
        weights = mixture.posterior_weights(x, RF.alpha(t), RF.sigma(t))
        return jnp.log(weights[:, 1])

    @jax.jit
    def both(x, ts):
        guided = guidance.classifier(mixture.denoiser(RF), log_prob_fn, RF)
        return guided(x, ts), part.denoiser(RF)(x, ts)

    x, ts = jax.random.normal(key, (5, 6), float), jnp.array([0.3, 0.5, 0.7, 0.9, 0.95])
    np.testing.assert_allclose(*both(x, ts), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("schedule", [VE, RF], ids=["VE", "RectifiedFlow"])
def test_tilt_is_exact_for_gaussians(schedule, key, x64):
    """Linear reward: the law is shifted by scale times the covariance times the gradient."""
    factor, slope = jax.random.normal(key, (5, 2), float), jnp.array([1.0, -1.0, 0.5, 2.0, 0.0])
    cov = factor @ factor.T + 0.04 * jnp.eye(5)

    def law(mean):
        def denoise_fn(x, t):
            a, s = schedule.alpha(t), schedule.sigma(t)
            gain = a * jnp.linalg.solve(a**2 * cov + s**2 * jnp.eye(5), cov)
            return mean + (x - a * mean) @ gain

        return denoise_fn

    mean, scale = jnp.arange(5.0)[None], jnp.array([2.0, -1.0])
    x = jax.random.normal(key, (2, 5), float)
    reward_fn = lambda x: x @ slope

    @jax.jit
    def both(x, t):
        guided = guidance.reward(law(mean), reward_fn, schedule, scale)
        return guided(x, t), law(mean + scale[:, None] * (cov @ slope)[None])(x, t)

    for t in (schedule.t_max, 0.6 * schedule.t_max, 0.02):
        # With no signal at all the term is that of sigma / alpha = 1100.
        tol = 2e-2 if schedule.alpha(t) == 0 else 1e-9
        np.testing.assert_allclose(*both(x, t), rtol=tol, atol=tol)


def test_reward_guidance_keeps_the_subspace(key, x64):
    """Off-subspace over on-subspace norm on a 16-dimensional subspace of R^64, ancestral sampling.

    Guo et al. 2024 (arXiv 2404.14743), their simulation: f = 10 - (theta^T x - 3)^2 with
    |theta_off| / |theta_on| = 9. Strengths 0.02, 0.05, 0.1, 0.3, 1 give 0.016, 0.040, 0.080, 0.232,
    0.642 for the naive gradient; f is then 10.0, of the projection 2.46, and 2.27 for look-ahead.
    """
    basis = linalg.random_frames(key, num_components=1, dim=64, rank=16, dtype=float)[0]
    on, off = jax.random.normal(key, (2, 64), float)
    on = basis @ (basis.T @ on)
    off = off - basis @ (basis.T @ off)
    theta = (on / jnp.linalg.norm(on) + 9 * off / jnp.linalg.norm(off)) / 82**0.5
    denoise_fn = lambda x, t: VP.alpha(t) * x @ basis @ basis.T  # N(0, P); alpha^2 + sigma^2 = 1
    target = lambda x: -0.5 * (x @ theta - 3) ** 2  # its gradient is (3 - theta^T x) theta
    f = lambda x: float(jnp.mean(10 + 2 * target(x)))
    ts = jnp.append(jnp.arange(200, 0, -1) / 200, 0.0)

    @jax.jit
    def run(scale):
        def one(rule):
            guided = guidance.reward(denoise_fn, target, VP, scale, rule=rule)
            return sampling.sample(key, guided, VP, ts, (200, 64), solver=solvers.ancestral()).x

        return one("naive"), one("lookahead")

    project = lambda x: x @ basis @ basis.T
    norm = lambda x: jnp.linalg.norm(x, axis=1)
    ratio = lambda x: float(jnp.mean(norm(x - project(x)) / norm(project(x))))
    for scale, expected in ((0.1, 0.080), (0.3, 0.232), (1.0, 0.642)):
        naive, ahead = run(scale)
        assert ratio(naive) == pytest.approx(expected, rel=0.06)
        assert ratio(ahead) < 1e-10
    assert f(naive) == pytest.approx(10.0, abs=1e-9)
    assert f(project(naive)) == pytest.approx(2.46, abs=0.2)
    assert f(ahead) == pytest.approx(2.27, abs=0.2)
    assert f(project(ahead)) == pytest.approx(f(ahead), abs=1e-9)


@pytest.mark.parametrize("rule", [*guidance.RULES, "classifier"])
def test_pure_noise_is_finite(rule, key):
    """alpha = 0, in value and gradient."""
    d = lambda x, t: RF.alpha(t) * x / (RF.alpha(t) ** 2 + RF.sigma(t) ** 2)  # data N(0, I)
    if rule == "classifier":
        guided = guidance.classifier(d, lambda x, t: d(x, t)[:, 0], RF)
    else:
        guided = guidance.reward(d, lambda x: x[:, 0], RF, rule=rule)
    out, slope = jax.value_and_grad(lambda x: guided(x, 1.0)[:, 0].sum())(jnp.ones((2, 3)))
    assert float(out) == pytest.approx(0.0 if rule == "lookahead" else 2.0, abs=5e-3)
    assert np.all(np.isfinite(slope))


def test_bad_input(key, unchecked):
    d, x = lambda x, t: x, jnp.ones((3, 2))
    with pytest.raises(ValueError, match="rule"):
        guidance.reward(d, lambda x: x[:, 0], VE, rule="greedy")
    with pytest.raises(ValueError, match="scale"):
        guidance.reward(d, lambda x: x[:, 0], VE, float("inf"))
    for guided in (
        guidance.reward(d, lambda x: x, VE),
        guidance.reward(d, lambda x: x.sum(), VE),
        guidance.classifier(d, lambda x, t: x.sum(), VE),
    ):
        with pytest.raises(ValueError, match="one number per example"):
            guided(x, 1.0)
    with pytest.raises(ValueError, match="denoise_fn returned"):
        guidance.reward(lambda x, t: x[:, :1], lambda x: x[:, 0], VE)(x, 1.0)
