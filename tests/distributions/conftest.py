"""Dense float64 formulas, written with scipy from the definitions, to check the factored ones."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal


class DenseMixture:
    """Mixture of Gaussians with full covariance matrices."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means = np.asarray(weights), np.asarray(means)
        self.covariances = np.asarray(covariances)

    @classmethod
    def of(cls, bases, weights, means, scales, noise_std):
        floor = noise_std**2 * np.eye(bases.shape[1])
        return cls(
            weights, means, [(u * s**2) @ u.T + floor for u, s in zip(bases, scales, strict=True)]
        )

    def _marginals(self, alpha, sigma):
        eye = np.eye(self.means.shape[1])
        return [alpha**2 * c + sigma**2 * eye for c in self.covariances]

    def log_joint(self, x, alpha, sigma):
        return np.stack(
            [
                np.log(w) + multivariate_normal(alpha * m, c).logpdf(x)
                for w, m, c in zip(
                    self.weights, self.means, self._marginals(alpha, sigma), strict=True
                )
            ],
            axis=-1,
        )

    def log_prob(self, x, alpha, sigma):
        return logsumexp(self.log_joint(x, alpha, sigma), axis=-1)

    def posterior_weights(self, x, alpha, sigma):
        joint = self.log_joint(x, alpha, sigma)
        return np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))

    def _component_means(self, x, alpha, sigma):
        return np.stack(
            [
                m + (x - alpha * m) @ np.linalg.solve(t, alpha * c)
                for m, c, t in zip(
                    self.means, self.covariances, self._marginals(alpha, sigma), strict=True
                )
            ],
            axis=1,
        )

    def posterior_mean(self, x, alpha, sigma):
        w = self.posterior_weights(x, alpha, sigma)
        return np.einsum("bk,bkn->bn", w, self._component_means(x, alpha, sigma))

    def score(self, x, alpha, sigma):
        return (alpha * self.posterior_mean(x, alpha, sigma) - x) / sigma**2

    def posterior_jacobian(self, x, alpha, sigma):
        w = self.posterior_weights(x, alpha, sigma)
        means = self._component_means(x, alpha, sigma)
        second = np.einsum("bk,bkn,bkm->bnm", w, means, means)
        mean = np.einsum("bk,bkn->bn", w, means)
        within = [
            c - alpha**2 * c @ np.linalg.solve(t, c)
            for c, t in zip(self.covariances, self._marginals(alpha, sigma), strict=True)
        ]
        cov = np.einsum("bk,knm->bnm", w, np.array(within)) + second
        return alpha / sigma**2 * (cov - mean[:, :, None] * mean[:, None, :])


@pytest.fixture
def dense_mixture():
    return DenseMixture


def _mixture_arguments(seed=0, num_components=3, dim=9, rank=4, dtype=np.float64):
    """All generality at once: oblique subspaces, unequal ranks, weights, means, scales, floor."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.normal(size=(num_components, dim, rank)))[0]
    scales = rng.uniform(0.3, 2.0, size=(num_components, rank))
    if num_components > 1:
        scales[1, rank // 2 :] = 0
    arguments = dict(
        bases=bases,
        weights=rng.dirichlet(np.full(num_components, 5.0)),
        means=0.5 * rng.normal(size=(num_components, dim)),
        scales=scales,
        noise_std=0.2,
    )
    return {name: np.asarray(value, dtype) for name, value in arguments.items()}


@pytest.fixture
def mixture_arguments():
    return _mixture_arguments


def _finite_differences(fn, x, step=1e-5):
    """Central differences of ``fn: [b, n] -> [b, m]`` as ``[b, m, n]``."""
    columns = []
    for i in range(x.shape[1]):
        shift = np.zeros(x.shape[1])
        shift[i] = step
        columns.append((np.asarray(fn(x + shift)) - np.asarray(fn(x - shift))) / (2 * step))
    return np.stack(columns, axis=-1)


@pytest.fixture
def finite_differences():
    return _finite_differences


NAMES = ("log_prob", "posterior_weights", "posterior_mean", "score", "posterior_jacobian")


@functools.partial(
    jax.jit,
    static_argnames="names",
    compiler_options={"xla_backend_optimization_level": 0},  # compiling dominates these tests
)
def _evaluate(p, x, alpha=1.0, sigma=0.0, names=NAMES):
    """The named methods in one compiled call, shared by all tests with equal shapes."""
    return {name: getattr(p, name)(x, alpha, sigma) for name in names}


@pytest.fixture
def evaluate():
    return _evaluate
