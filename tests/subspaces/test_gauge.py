"""Gauge fields against closed forms of Gaussians; what they do to a Jacobian and not to samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import (
    denoisers,
    distributions,
    linalg,
    sampling,
    schedules,
    solvers,
    subspaces,
)

DIM, RANK = 10, 5
VE, VP = schedules.VE(), schedules.VPLinear()


def turning(seed=0, dim=DIM):
    """An antisymmetric matrix with all singular values 1."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
    half = np.kron(np.eye(dim // 2), [[0, 1], [-1, 0]])
    return q @ half @ q.T


def test_gaussian_field_is_the_closed_form(x64):
    """R = A Sigma_t^{-1} (x - a m), and the Jacobian has sigma^2 / a c A Sigma_t^{-1} more."""
    rng = np.random.default_rng(0)
    p = distributions.Gaussian(rng.normal(size=4), rng.normal(size=(4, 2)), 0.2)
    matrix, c, t = turning(dim=4), 0.7, 0.3
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    inverse = np.linalg.inv(alpha**2 * np.asarray(p.moments()[1]) + sigma**2 * np.eye(4))
    x = jnp.asarray(rng.normal(size=(3, 4)))
    fn = subspaces.gauged(p.denoiser(VP), VP, matrix, strength=c)
    score = jax.jit(denoisers.score_fn(fn, VP))(x, t)
    turned = (np.asarray(x) - alpha * np.asarray(p.mean)) @ (c * matrix @ inverse).T
    np.testing.assert_allclose(score - p.score(x, alpha, sigma), turned, atol=1e-11)
    jacobian = jax.jit(jax.jacfwd(lambda x: fn(x[None], t)[0]))(x[0])
    exact = p.posterior_jacobian(x[:1], alpha, sigma)[0]
    np.testing.assert_allclose(
        jacobian - exact, sigma**2 / alpha * c * matrix @ inverse, atol=1e-11
    )


def field_of_a_mixture():
    """``(R, score, samples)`` at one level of VP: a potential that is not constant."""
    bases = linalg.random_frames(jax.random.key(0), 2, 6, 2, dtype=jnp.float64)
    p = distributions.MoLRG(bases, means=np.eye(2, 6), noise_std=0.1)
    alpha, sigma, w = VP.alpha(0.2), VP.sigma(0.2), jnp.arange(6.0)
    fn = subspaces.gauged(
        p.denoiser(VP), VP, turning(dim=6), potential=lambda x: jnp.sin(x.reshape(-1, 6) @ w)
    )
    score = lambda x: p.score(x, alpha, sigma)
    field = lambda x: denoisers.score_fn(fn, VP)(x, 0.2) - score(x)
    x0, _ = p.sample(jax.random.key(1), 4000)
    x = alpha * x0 + sigma * jax.random.normal(jax.random.key(2), x0.shape, x0.dtype)
    return field, score, x


@pytest.mark.slow
def test_a_gauge_changes_no_marginal_and_another_field_does(x64):
    field, score, x = field_of_a_mixture()
    few = x[:5].reshape(5, 3, 2)  # any shape of data
    probes = jnp.repeat(jnp.eye(6)[:, None], 5, 1).reshape(6, 5, 3, 2) * 6**0.5  # a whole basis

    @jax.jit
    def measure(few, x):
        residuals = [subspaces.gauge_residual(field, score, few, probes=p) for p in (None, probes)]
        tests = [
            subspaces.gauge_scores(jax.random.key(3), field(x) + c * score(x), x) for c in (0, 0.3)
        ]
        return residuals, jnp.sum(field(few) * score(few), axis=(1, 2)), tests

    residuals, inner, (gauge, other) = measure(few, x)
    assert abs(inner).min() > 0.1
    for residual in residuals:
        np.testing.assert_allclose(residual, 0, atol=1e-9)
    assert abs(gauge).max() < 4 and abs(gauge).mean() < 1.5
    assert abs(other).mean() > 5


def gauged_gaussian(strength):
    basis = linalg.random_frames(jax.random.key(0), 1, DIM, RANK)[0]
    p = distributions.Gaussian(jnp.zeros(DIM), basis)
    return p, basis, subspaces.gauged(p.denoiser(VE), VE, turning(), strength=strength)


@pytest.mark.slow
def test_gauge_keeps_samples_and_dimension_but_turns_the_subspace():
    """The table of Horvat & Pfister's example: covariance, dimension, angle, asymmetry."""
    key, x0 = jax.random.key(0), jax.random.normal(jax.random.key(1), (4, RANK))

    @jax.jit
    def measure(c):
        p, basis, fn = gauged_gaussian(c)
        ts = schedules.karras_grid(40)
        drawn = sampling.sample(key, fn, VE, ts, (4000, DIM), solver=solvers.heun()).x
        cov = jnp.einsum("bi,bj->ij", drawn, drawn, precision="highest") / len(drawn)
        x, t = x0 @ basis.T, 0.05
        at = lambda x: fn(x, t)
        sine = lambda v: jnp.sin(subspaces.principal_angles(v, basis)[-1])
        angles = []
        for symmetric in (False, True):
            u, _, vt = subspaces.jacobian_svd(at, x[:1], RANK, key=key, symmetric=symmetric)
            angles += [sine(vt[0].T), sine(u[0])]
        dims = [
            subspaces.dimension.jacobian_rank(fn, VE, x, t, rule="above"),
            subspaces.dimension.normal_bundle(key, fn, VE, x, 0.01),
        ]
        asymmetry = subspaces.jacobian_asymmetry(key, at, x)[0]
        return jnp.linalg.norm(cov - p.moments()[1]), jnp.stack(angles), dims, asymmetry

    errors, basis = {}, np.asarray(gauged_gaussian(0.0)[1])
    for c, (low, high) in {0.0: (0, 1e-3), 0.1: (0.06, 0.12), 0.3: (0.2, 0.32)}.items():
        errors[c], (right, left, of_half, _), dims, asymmetry = measure(c)
        assert low <= right < high, c
        assert abs(of_half - right / 2) < 0.01 and left < 0.6 * c**2 + 0.002
        for found in dims:
            np.testing.assert_array_equal(found, RANK)
        inverse = np.linalg.inv(basis @ basis.T + 0.05**2 * np.eye(DIM))
        dense = np.eye(DIM) - 0.05**2 * (np.eye(DIM) - c * turning()) @ inverse
        ratio = np.linalg.norm(dense - dense.T) / np.linalg.norm(dense + dense.T)
        np.testing.assert_allclose(asymmetry, ratio, rtol=1e-3, atol=1e-5)
    assert abs(errors[0.3] - errors[0.0]) < 0.05 and errors[0.3] < 0.2


def test_symmetric_part_of_a_jacobian(x64, key):
    """Singular values, vectors and norm of (J + J^T) / 2, against the dense matrix."""
    matrix = np.random.default_rng(0).normal(size=(6, 6))
    fn, x = lambda x: (x.reshape(-1, 6) @ matrix.T).reshape(x.shape), jnp.ones((2, 3, 2))
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    order = np.argsort(-abs(values))
    found = subspaces.jacobian_spectrum(fn, x, symmetric=True)
    np.testing.assert_allclose(found[1], abs(values[order]), atol=1e-12)
    _, s, vt = subspaces.jacobian_svd(fn, x, 2, key=key, symmetric=True, max_iters=200, tol=1e-9)
    np.testing.assert_allclose(s[0], abs(values[order[:2]]), atol=1e-10)
    assert subspaces.projector_distance(vt[0].T, jnp.asarray(vectors[:, order[:2]])) < 1e-6


def test_bad_input_is_named(unchecked, key):
    p, _, _ = gauged_gaussian(0.1)
    with pytest.raises(ValueError, match="the matrix is not antisymmetric"):
        subspaces.gauged(p.denoiser(VE), VE, np.eye(DIM))
    with pytest.raises(ValueError, match=r"wrong shape of antisymmetric: expected \(10, 10\)"):
        subspaces.gauged(p.denoiser(VE), VE, turning(dim=4))(jnp.ones((1, DIM)), 1.0)
    with pytest.raises(ValueError, match="wrong shape of values"):
        subspaces.gauge_scores(key, jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="too few samples"):
        subspaces.gauge_scores(key, jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="no symmetric part: expected as many outputs"):
        subspaces.jacobian_spectrum(lambda x: x[:, :1], jnp.ones((1, 2)), symmetric=True)
