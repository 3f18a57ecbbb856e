"""The low-rank autoencoder against the dense posterior mean of the mixture, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from lowdim_diffusion import distributions, networks
from lowdim_diffusion.networks import lowrank

K, N, D = 3, 10, 2


def build(**config):
    return networks.make("lowrank", data_shape=(N,), num_components=K, rank=D, **config)


def dense_posterior_mean(frames, x, sigma, cross_std=0.0):
    """E[x0 | x] of an equal mixture of N(0, U U^T) from n x n covariances (papers: lemma 1)."""
    out = np.zeros_like(x)
    everything = cross_std**2 * sum(u @ u.T for u in frames)
    clean = [(1 - cross_std**2) * u @ u.T + everything for u in frames]
    for b in range(len(x)):
        covs = [c + sigma[b] ** 2 * np.eye(N) for c in clean]
        logs = np.array(
            [-0.5 * np.linalg.slogdet(c)[1] - 0.5 * x[b] @ np.linalg.solve(c, x[b]) for c in covs]
        )
        weights = np.exp(logs - logsumexp(logs))
        for w, own, c in zip(weights, clean, covs, strict=True):
            out[b] += w * (own @ np.linalg.solve(c, x[b]))
    return out


@pytest.mark.parametrize("orthonormal", ["qr", "polar"])
@pytest.mark.parametrize(("joint", "cross_std"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_is_the_exact_posterior_mean(x64, key, orthonormal, joint, cross_std):
    net = build(orthonormal=orthonormal, joint=joint, cross_std=cross_std)
    params = {"bases": jax.random.normal(key, (K, N, D), jnp.float64)}
    frames = np.asarray(lowrank.frames(params["bases"], orthonormal=orthonormal, joint=joint))
    sigma = np.array([0.05, 0.3, 1.0, 5.0, 50.0])
    clean = np.einsum("nd,bd->bn", frames[0], np.random.default_rng(0).normal(size=(5, D)))
    x = clean + sigma[:, None] * np.random.default_rng(1).normal(size=(5, N))
    got = net.apply(params, jnp.asarray(x), jnp.log(sigma) / 4)
    exact = dense_posterior_mean(frames, x, sigma, cross_std)
    np.testing.assert_allclose(got, exact, rtol=1e-8, atol=1e-10)
    if joint:
        p = distributions.MoLRG.noisy(frames, cross_std)
        np.testing.assert_allclose(p.posterior_mean(x, 1.0, sigma), exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("orthonormal", ["qr", "polar"])
def test_frames(x64, key, orthonormal):
    bases = jax.random.normal(key, (K, N, D), jnp.float64)
    u = lowrank.frames(bases, orthonormal=orthonormal)
    np.testing.assert_allclose(
        jnp.einsum("knd,kne->kde", u, u), np.stack([np.eye(D)] * K), atol=1e-12
    )
    for k in range(K):  # same span
        np.testing.assert_allclose(u[k] @ (u[k].T @ bases[k]), bases[k], atol=1e-12)
    u = lowrank.frames(bases, orthonormal=orthonormal, joint=True)
    flat = np.concatenate(list(u), axis=1)
    np.testing.assert_allclose(flat.T @ flat, np.eye(K * D), atol=1e-12)
    stacked = lowrank.frames(jnp.stack([bases, 2 * bases]), orthonormal=orthonormal, joint=True)
    np.testing.assert_allclose(stacked, jnp.stack([u, u]), atol=1e-12)


def test_free_bases_are_used_as_they_are(x64, key):
    net = build(orthonormal="none")
    params = {"bases": jax.random.normal(key, (K, N, D), jnp.float64)}
    x = jax.random.normal(jax.random.key(1), (1, N), jnp.float64)
    sigma = 0.7
    energy = np.array([np.sum((u.T @ x[0]) ** 2) for u in params["bases"]])
    w = np.exp(energy / (2 * sigma**2 * (1 + sigma**2)))
    w /= w.sum()
    expected = sum(wk * u @ (u.T @ x[0]) for wk, u in zip(w, params["bases"], strict=True))
    got = net.apply(params, x, jnp.log(sigma) / 4)[0]
    np.testing.assert_allclose(got, expected / (1 + sigma**2), rtol=1e-9)


@pytest.mark.parametrize("joint", [False, True])
def test_starts_orthonormal(key, joint):
    bases = build(joint=joint).init(key)["bases"]
    assert bases.shape == (K, N, D)
    np.testing.assert_allclose(lowrank.frames(bases, joint=joint), bases, atol=2e-6)


def test_hard_assignment(x64, key):
    net = build(assignment="hard", joint=True)
    params = {"bases": jax.random.normal(key, (K, N, D), jnp.float64)}
    frames = lowrank.frames(params["bases"], joint=True)
    clean = jnp.stack([frames[0, :, 0], frames[2, :, 1]])
    misleading = clean + 3 * frames[1, :, 0][None]
    sigma = 0.5
    project = lambda k, x: frames[k] @ (frames[k].T @ x) / (1 + sigma**2)
    by_itself = net.apply(params, misleading, jnp.log(sigma) / 4)
    np.testing.assert_allclose(by_itself[0], project(1, misleading[0]), atol=1e-12)
    by_clean = net.apply(params, misleading, jnp.log(sigma) / 4, clean=clean)
    np.testing.assert_allclose(by_clean[0], project(0, misleading[0]), atol=1e-12)
    np.testing.assert_allclose(by_clean[1], project(2, misleading[1]), atol=1e-12)
    with pytest.raises(ValueError, match="wrong shape of clean"):
        net.apply(params, misleading, 0.0, clean=clean[:1])


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_finite_with_gradients_from_tiny_to_huge_noise(key, assignment):
    net = build(assignment=assignment)
    params = net.init(key)
    sigma = jnp.geomspace(1e-4, 1e3, 15)
    x = params["bases"][0, :, 0][None] + sigma[:, None] * jax.random.normal(key, (15, N))
    loss = lambda p, x: jnp.mean(net.apply(p, x, jnp.log(sigma) / 4) ** 2)
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))


def test_float32_keeps_its_digits_at_tiny_noise(key):
    """phi reaches 5e7: the weights come from differences of energies, so they stay right."""
    net = build()
    params = net.init(key)
    sigma = jnp.array([1e-4, 1e-3, 1e-2])
    a = jax.random.normal(jax.random.key(1), (3, D))
    x = a @ params["bases"][1].T
    got = net.apply(params, x, jnp.log(sigma) / 4)
    np.testing.assert_allclose(got, x / (1 + sigma[:, None] ** 2), atol=3e-6)


def test_an_image_is_its_pixels(key):
    flat = build().init(key)
    x = jax.random.normal(jax.random.key(1), (2, N))
    image = networks.make("lowrank", data_shape=(5, 2, 1), num_components=K, rank=D)
    got = image.apply(flat, x.reshape(2, 5, 2, 1), 0.1)
    np.testing.assert_array_equal(got.reshape(2, N), build().apply(flat, x, 0.1))
    assert image.input_scale == "clean"
