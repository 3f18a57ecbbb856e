"""Spectra, ranks and linearity along the noise level, against closed forms and published curves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import molrg_data, molrg_mean

from lowdim_diffusion import distributions, linalg, schedules, subspaces

random_frames = jax.jit(
    linalg.random_frames, static_argnums=(1, 2, 3), static_argnames=("orthogonal", "dtype")
)


def atlas(fn, schedule, x, ts, **options):
    key = jax.random.key(5)
    run = lambda x, ts: subspaces.spectral_atlas(key, fn, schedule, x, ts, **options)
    return jax.jit(run)(x, ts)


def test_exact_distribution_of_the_package(x64, key):
    """Unequal scales, random bases, a noise floor: against its own closed-form Jacobian."""
    bases = random_frames(key, 3, 20, 4, dtype=jnp.float64)
    scales = jnp.asarray([[3.0, 2.0, 1.0, 0.5]] * 3)
    p = distributions.MoLRG(bases, scales=scales, noise_std=0.1)
    schedule = schedules.VPLinear()
    ts = jnp.asarray([0.9, 0.4, 0.1])
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    x0, _ = jax.jit(lambda key: p.sample(key, 4))(key)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 20), jnp.float64)
    x = alpha[:, None, None] * x0[None] + sigma[:, None, None] * noise
    got = atlas(p.denoiser(schedule), schedule, x, ts, chunk=7).values
    for i in range(3):
        jacobian = jax.jit(p.posterior_jacobian)(x[i], alpha[i], sigma[i])
        s = np.linalg.svd(np.asarray(alpha[i] * jacobian), compute_uv=False)
        np.testing.assert_allclose(got[i], s, atol=1e-11)


def test_rank_against_noise_reproduces_the_published_curve(key):
    """n = 48, K = 2, d = 6: one subspace at low noise, both at high, a mean in between."""
    bases = random_frames(key, 2, 48, 6, orthogonal=True)
    inverse_sigma = jnp.array([500, 125, 50, 10, 1.67, 0.91, 0.3, 0.12, 0.08, 0.04, 0.02, 0.01])
    published = [0.125, 0.125, 0.125, 0.125, 0.134, 0.193] + [0.25] * 6
    sigmas = 1 / inverse_sigma
    x0 = molrg_data(key, bases, 64)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (12, 64, 48))
    denoise_fn = lambda x, t: molrg_mean(bases, x, t)
    x = x0[None] + sigmas[:, None, None] * noise
    spectra = atlas(denoise_fn, schedules.VE(sigma_max=200.0), x, sigmas).values
    assert spectra.shape == (12, 64, 48)
    ratio = np.asarray(subspaces.numerical_rank(spectra)).mean(1) / 48
    np.testing.assert_allclose(ratio, published, atol=0.02)
    np.testing.assert_allclose(
        ratio[[0, 1, 2, 3, -3, -2, -1]], np.take(published, [0, 1, 2, 3, -3, -2, -1])
    )


@pytest.mark.slow
def test_schedules_share_one_spectrum_and_topk_agrees_with_full(key):
    bases = random_frames(key, 2, 16, 3, orthogonal=True)
    clean = lambda x, sigma: molrg_mean(bases, x, sigma)
    vp = schedules.VPLinear()
    ts = jnp.array([0.9, 0.5, 0.2])
    sigmas = schedules.noise_levels(vp, ts)
    x = molrg_data(key, bases, 4)[None] + sigmas[:, None, None] * jax.random.normal(key, (3, 4, 16))
    vp_fn = lambda x, t: clean(x / vp.alpha(t), schedules.noise_levels(vp, t))
    ve = atlas(clean, schedules.VE(), x, sigmas).values
    in_vp = atlas(vp_fn, vp, x * vp.alpha(ts)[:, None, None], ts).values
    np.testing.assert_allclose(in_vp, ve, atol=1e-5)
    top = atlas(clean, schedules.VE(), x, sigmas, rank=4, tol=1e-4).values
    np.testing.assert_allclose(top, ve[..., :4], atol=1e-4)
    with pytest.raises(ValueError, match="one time per state"):
        atlas(clean, schedules.VE(), x, sigmas[:2])


def test_traced_once(key):
    bases = random_frames(key, 2, 16, 3)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(x, ts):
        fn = lambda x, t: molrg_mean(bases, x, t)
        return subspaces.spectral_atlas(key, fn, schedules.VE(), x, ts, rank=3).values

    x = jax.random.normal(key, (2, 4, 16))
    run(x, jnp.array([1.0, 0.5]))
    run(x + 1, jnp.array([2.0, 0.1]))


def test_leading_values_give_the_rank_energy_and_linearity_of_the_whole(key):
    """Top-k with probes against the full spectrum, a tail that matters, every entry."""
    schedule, ts = schedules.VE(), jnp.array([3.0, 1.0])
    gains = jnp.concatenate([jnp.array([5.0, 4.0, 3.0]), jnp.full(29, 0.5)])
    fn = lambda x, t: x * gains[None] / (1 + t**2)
    states = jax.random.normal(key, (2, 3, 32))
    full = atlas(fn, schedule, states, ts, energy=0.95)
    top = atlas(fn, schedule, states, ts, rank=6, energy=0.95, num_probes=32)
    cumulative = np.sqrt(np.cumsum(np.asarray(gains) ** 2) / np.sum(np.asarray(gains) ** 2))
    rank = 1 + int(np.argmax(cumulative > 0.95))
    assert rank > 3  # the tail counts
    np.testing.assert_allclose(full.rank_ratio, rank / 32)
    held = np.sum(np.asarray(gains[:6]) ** 2) / np.sum(np.asarray(gains) ** 2)
    np.testing.assert_allclose(top.energy, held, rtol=1e-4)
    assert set(np.round(np.asarray(top.rank_ratio).ravel() * 32)) == {min(rank, 7)}
    for found in (full, top):  # the denoiser is linear and symmetric
        np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
        np.testing.assert_allclose(found.norm_ratio, 1, atol=1e-4)
        np.testing.assert_allclose(found.asymmetry, 0, atol=1e-5)


def test_a_level_that_is_not_finite_does_not_spread(key):
    fn = lambda x, t: jnp.where(t == 2.0, jnp.nan, 1.0) * x / (1 + t**2)
    ts = jnp.array([3.0, 2.0, 1.0])
    states = jax.random.normal(key, (3, 2, 8))
    for rank in (None, 2):
        found = atlas(fn, schedules.VE(), states, ts, rank=rank)
        bad = np.isnan(np.asarray(found.values)).any(axis=(1, 2))
        assert bad.tolist() == [False, True, False]
        assert np.isnan(np.asarray(found.rank_ratio)).all(1).tolist() == [False, True, False]


def test_times_outside_the_schedule_are_refused(key):
    states = jnp.zeros((1, 2, 4))
    for schedule, t in ((schedules.VPLinear(), 1.5), (schedules.VE(), 1000.0)):
        with pytest.raises(ValueError, match="t out of range"):
            subspaces.spectral_atlas(key, lambda x, t: x, schedule, states, jnp.array([t]))
        with pytest.raises(ValueError, match="t out of range"):
            subspaces.step_length(schedule, t, (4,))
    with pytest.raises(ValueError, match="t out of range"):
        subspaces.step_length(schedules.VE(), -1.0, (4,))
