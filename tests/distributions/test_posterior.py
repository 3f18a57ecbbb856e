"""The exact posterior against dense formulas, against quadrature, and in its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from lowdim_diffusion.distributions import Empirical, Gaussian, MoLRG, condition


def dense(mixture, a, y, noise_std):
    """Textbook conditioning with full matrices, one y: weights, means, covariances, evidence."""
    log_w, means, covariances = [], [], []
    for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
        s = a @ c @ a.T + noise_std**2 * np.eye(len(a))
        gain = np.linalg.solve(s, a @ c).T
        log_w.append(np.log(w) + multivariate_normal(a @ m, s).logpdf(y))
        means.append(m + gain @ (y - a @ m))
        covariances.append(c - gain @ a @ c)
    return (
        np.exp(log_w - logsumexp(log_w)),
        np.array(means),
        np.array(covariances),
        logsumexp(log_w),
    )


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_posterior_equals_dense_formulas(noise_std, x64, mixture_arguments, dense_mixture):
    arguments = mixture_arguments()
    p, rng = MoLRG(**arguments), np.random.default_rng(1)
    a, y = rng.normal(size=(4, 9)), rng.normal(size=(2, 4))
    found = jax.jit(condition)(p, a, y, noise_std)
    x = found.sample(jax.random.key(0), 1)[0][0]
    log_density = found.log_prob(x)
    for i in range(2):
        w, means, covariances, evidence = dense(dense_mixture.of(**arguments), a, y[i], noise_std)
        np.testing.assert_allclose(found.weights[i], w, rtol=1e-8)
        np.testing.assert_allclose(found.means[i], means, atol=1e-8)
        np.testing.assert_allclose(found.log_evidence[i], evidence, atol=1e-8)
        mean = w @ means
        spread = means - mean
        covariance = np.einsum("k,knm->nm", w, covariances + spread[:, :, None] * spread[:, None])
        np.testing.assert_allclose(found.mean()[i], mean, atol=1e-8)
        np.testing.assert_allclose(found.covariance()[i], covariance, atol=1e-8)
        np.testing.assert_allclose(found.variance()[i], np.trace(covariance), rtol=1e-8)
        if noise_std:  # Bayes
            likelihood = multivariate_normal(a @ x[i], noise_std**2).logpdf(y[i])
            expected = p.log_prob(x[i : i + 1])[0] + likelihood - evidence
            np.testing.assert_allclose(log_density[i], expected, atol=1e-8)


def test_samples_have_the_posteriors_moments(x64, mixture_arguments):
    p, rng = MoLRG(**mixture_arguments()), np.random.default_rng(2)
    found = jax.jit(condition)(p, rng.normal(size=(2, 9)), rng.normal(size=(1, 2)), 0.5)
    x, labels = found.sample(jax.random.key(3), 40_000)
    x, cov = np.asarray(x[:, 0]), np.asarray(found.covariance()[0])
    error = (x.mean(0) - found.mean()[0]) / np.sqrt(np.diag(cov) / len(x))
    assert np.abs(error).max() < 4.5
    assert np.abs(np.cov(x.T) - cov).max() < 0.03 * cov.max()
    np.testing.assert_allclose(np.bincount(labels[:, 0]) / len(x), found.weights[0], atol=0.012)


def test_identity_with_noise_is_the_denoiser(x64, mixture_arguments):
    p = MoLRG(**mixture_arguments())
    y = np.random.default_rng(3).normal(size=(5, 9))
    found = jax.jit(condition)(p, np.eye(9), y, 0.7)
    np.testing.assert_allclose(found.mean(), p.posterior_mean(y, 1.0, 0.7), atol=1e-10)
    np.testing.assert_allclose(found.weights, p.posterior_weights(y, 1.0, 0.7), atol=1e-10)
    np.testing.assert_allclose(found.log_evidence, p.log_prob(y, 1.0, 0.7), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noiseless_subspace_is_found_from_few_numbers(dtype, x64):
    """Rank 2 of 12 without floor: 5 numbers say which subspace, and where on it, exactly."""
    rng = np.random.default_rng(4)
    bases = np.linalg.qr(rng.normal(size=(3, 12, 2)))[0].astype(dtype)
    p = MoLRG(bases)
    x, labels = p.sample(jax.random.key(0), 6)
    a = rng.normal(size=(5, 12)).astype(dtype)
    found = jax.jit(lambda y: condition(p, a, y))(x @ a.T)
    assert found.mean().dtype == dtype and found.factors.shape[-1] == 7
    tolerance = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(found.mean(), x, atol=tolerance)
    np.testing.assert_allclose(found.weights, jax.nn.one_hot(labels, 3), atol=1e-4)
    np.testing.assert_allclose(found.sample(jax.random.key(1), 1)[0][0], x, atol=tolerance)


def test_gaussian_is_one_component_and_gradients_pass(x64):
    rng = np.random.default_rng(5)
    p = Gaussian(rng.normal(size=6), rng.normal(size=(6, 2)), 0.1)
    a, y = rng.normal(size=(3, 6)), rng.normal(size=(2, 3, 1))
    mean, cov = (np.asarray(m) for m in p.moments())
    s = a @ cov @ a.T + 0.04 * np.eye(3)
    expected = mean + (y[..., 0] - mean @ a.T) @ np.linalg.solve(s, a @ cov)

    @jax.jit
    @jax.grad
    def slope(y):
        return jnp.sum(condition(p, a, y, 0.2).mean() ** 2)

    np.testing.assert_allclose(condition(p, a, y, 0.2).mean(), expected, atol=1e-10)
    expected = 2 * expected @ np.linalg.solve(s, a @ cov).T
    np.testing.assert_allclose(slope(jnp.asarray(y))[..., 0], expected, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 4)), np.ones((1, 2))), r"wrong shape of a: expected \(any, 5\)"),
        ((np.ones((2, 5)), np.ones(2)), r"wrong shape of y.*y\[None\]"),
        ((np.ones((2, 5)), np.ones((1, 3))), "wrong shape of y.*2 numbers"),
        ((np.ones((2, 5)), np.ones((1, 2)), -1.0), "noise_std out of range"),
    ],
)
def test_bad_input(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        condition(Gaussian(np.zeros(5), np.ones((5, 1))), *arguments)


def test_only_gaussians_are_conditioned(unchecked):
    with pytest.raises(TypeError, match="got Empirical"):
        condition(Empirical(np.ones((2, 5))), np.ones((1, 5)), np.ones((1, 1)))
