"""The terms of classifier-free guidance against Gaussian closed forms and dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import distributions, guidance, sampling, schedules, solvers

DIM = 6
VE, RF = schedules.VE(), schedules.RectifiedFlow()


def pair(rank=2, noise_std=0.3, dim=DIM):
    """Gaussians that span a part of the space (ranks below dim / 2) or all of it."""
    rng = np.random.default_rng(0)
    make = lambda noise: distributions.Gaussian(
        rng.normal(size=dim), rng.normal(size=(dim, rank)), noise
    )
    return make(noise_std), make(2 * noise_std)


def dense(schedule, p_c, p_u, x, t):
    """The terms from n x n matrices in numpy, as the paper writes them."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    (m_c, c_c), (m_u, c_u) = (tuple(np.asarray(a) for a in p.moments()) for p in (p_c, p_u))
    eye = np.eye(len(m_c))
    a_c, a_u = (
        alpha * c @ np.linalg.inv(alpha**2 * c + sigma**2 * eye) if sigma else eye / alpha
        for c in (c_c, c_u)
    )
    values, vectors = np.linalg.eig(a_c - a_u)  # not eigh
    inverse = np.linalg.inv(vectors)
    y = np.asarray(x) - alpha * m_c
    part = lambda keep: (y @ (vectors * (values * keep) @ inverse).T).real
    shift = np.broadcast_to((eye - alpha * a_u) @ (m_c - m_u), y.shape)
    return shift, part(values.real > 0), part(values.real <= 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "rank"), [(VE, 2), (RF, 4)], ids=["part of the space", "all of it"]
)
def test_terms_are_those_of_dense_matrices_and_add_up(schedule, rank, x64):
    p_c, p_u = pair(rank)
    x = jax.random.normal(jax.random.key(1), (3, DIM), float)
    ts = jnp.array([0.2, 0.6, float(schedule.t_max)])
    terms_fn = jax.jit(guidance.linear_terms(p_c, p_u, schedule))
    found = terms_fn(x, ts)
    total = p_c.denoiser(schedule)(x, ts) - p_u.denoiser(schedule)(x, ts)
    np.testing.assert_allclose(sum(found), total, atol=1e-12)
    for i, t in enumerate(ts):
        alone = terms_fn(x, t)  # a scalar time is the same as one per example
        expected = dense(schedule, p_c, p_u, x, t)
        for term, one, known in zip(found[:3], alone[:3], expected, strict=True):
            np.testing.assert_allclose(one, known, atol=1e-10)
            np.testing.assert_allclose(term[i], known[i], atol=1e-10)
        assert not alone.rest.any()


def test_one_class_has_no_floor_and_no_noise_is_left(x64):
    """At sigma = 0 of a singular law only what the classes span moves; all is finite."""
    p_c, p_u = pair(noise_std=0.0)
    vp = schedules.VPLinear()
    terms = guidance.linear_terms(p_c, p_u, vp)(jnp.ones((2, DIM)), 0.0)
    assert all(np.isfinite(term).all() for term in terms)


def test_float32_terms_add_up_to_the_guidance():
    """Check 22 of the papers: 1e-6 of the size of the guidance."""
    dtype = lambda p: jax.tree.map(lambda a: a.astype(jnp.float32), p)
    p_c, p_u = (dtype(p) for p in pair())
    ve, x = VE, 3 * jax.random.normal(jax.random.key(1), (64, DIM))
    total = p_c.denoiser(ve)(x, 1.0) - p_u.denoiser(ve)(x, 1.0)
    error = sum(jax.jit(guidance.linear_terms(p_c, p_u, ve))(x, 1.0)) - total
    assert jnp.linalg.norm(error) < 1e-6 * jnp.linalg.norm(total)


def test_local_terms_of_gaussians_are_the_linear_ones(x64):
    schedule, (p_c, p_u) = RF, pair()
    x, ts = jax.random.normal(jax.random.key(1), (2, 3, 2), float), jnp.array([0.3, 0.9])
    fns = p_c.denoiser(schedule), p_u.denoiser(schedule)
    means = p_c.mean.reshape(3, 2), p_u.mean.reshape(3, 2)
    found = jax.jit(guidance.local_terms(*fns, schedule, *means, chunk=4))(x, ts)
    linear = jax.jit(guidance.linear_terms(p_c, p_u, schedule))(x, ts)
    for term, known in zip(found, linear, strict=True):
        np.testing.assert_allclose(term, known, atol=1e-10)


@pytest.mark.slow
def test_local_terms_of_a_mixture_use_its_posterior_covariance(x64):
    """Parts of a nonlinear pair: sigma^2 J is the posterior covariance; the four add up."""
    frames = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (DIM, 4), float))[0]
    bases = frames.reshape(DIM, 2, 2).transpose(1, 0, 2)
    one, both = distributions.MoLRG(bases[:1]), distributions.MoLRG(bases)
    ve, x, zero = VE, jnp.ones((2, DIM)), jnp.zeros(DIM)
    fns = one.denoiser(ve), both.denoiser(ve)
    found = jax.jit(guidance.local_terms(*fns, ve, zero, zero))(x, 0.8)
    np.testing.assert_allclose(sum(found), fns[0](x, 0.8) - fns[1](x, 0.8), atol=1e-12)
    delta = one.posterior_jacobian(x, 1.0, 0.8) - both.posterior_jacobian(x, 1.0, 0.8)
    values, vectors = np.linalg.eigh(np.asarray(delta))
    coordinates = np.einsum("bij,bi->bj", vectors, x)
    positive = np.einsum("bij,bj->bi", vectors, np.maximum(values, 0) * coordinates)
    np.testing.assert_allclose(found.positive, positive, atol=1e-10)
    assert abs(found.rest).max() > 1e-3 and not found.mean_shift.any()


def test_gradients_pass_where_eigenvalues_coincide(x64):
    """Most eigenvalues of a difference of low-rank Jacobians are zero."""
    rng = np.random.default_rng(0)
    make = lambda: distributions.MoLRG(jnp.linalg.qr(rng.normal(size=(2, 5, 1)))[0])
    ve, zero = VE, jnp.zeros(5)
    terms_fn = guidance.local_terms(make().denoiser(ve), make().denoiser(ve), ve, zero, zero)
    size = jax.jit(lambda x: jnp.sum(terms_fn(x, 0.5).positive ** 2))
    x, step = rng.normal(size=(1, 5)), 1e-5 * rng.normal(size=(1, 5))
    slope = (size(x + step) - size(x - step)) / 2
    np.testing.assert_allclose(jnp.sum(jax.grad(size)(x) * step), slope, rtol=1e-6)


@pytest.mark.slow
def test_equal_weights_are_classifier_free_guidance(x64):
    (p_c, p_u), ve = pair(), VE
    terms_fn, ts = guidance.linear_terms(p_c, p_u, ve), schedules.karras_grid(6)
    fns = p_c.denoiser(ve), p_u.denoiser(ve)
    by_terms = guidance.guided_by_terms(
        fns[0], terms_fn, mean_shift=1.5, positive=1.5, negative=1.5, rest=1.5
    )
    run = lambda fn: (
        sampling.sample(jax.random.key(0), fn, ve, ts, (4, DIM), solver=solvers.heun()).x
    )
    plain = run(guidance.classifier_free(*fns, 2.5))
    np.testing.assert_allclose(run(by_terms), plain, atol=1e-4)
    each = guidance.guided_by_terms(fns[0], terms_fn, positive=jnp.array([0.0, 2.0]))
    x = jnp.ones((2, DIM))
    moved = each(x, 1.0) - fns[0](x, 1.0)
    assert not moved[0].any()
    np.testing.assert_allclose(moved[1], 2 * terms_fn(x, 1.0).positive[1], atol=1e-12)


def test_bad_input_is_named(unchecked):
    (p_c, p_u), ve = pair(), VE
    with pytest.raises(ValueError, match="mean of uncond"):
        guidance.linear_terms(p_c, pair(dim=5)[0], ve)
    terms_fn = guidance.linear_terms(p_c, p_u, ve)
    with pytest.raises(ValueError, match="size of an example: expected 6, got"):
        terms_fn(jnp.ones((2, 5)), 1.0)
    with pytest.raises(ValueError, match="wrong shape of t"):
        terms_fn(jnp.ones((2, DIM)), jnp.ones(3))
    with pytest.raises(ValueError, match="positive out of range"):
        guidance.guided_by_terms(p_c.denoiser(ve), terms_fn, positive=np.inf)
    local = guidance.local_terms(p_c.denoiser(ve), p_u.denoiser(ve), ve, jnp.ones(5), p_u.mean)
    with pytest.raises(ValueError, match="wrong shape of cond_mean"):
        local(jnp.ones((2, DIM)), 1.0)
