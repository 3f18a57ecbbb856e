"""Networks as denoisers: preconditioning, the clean-input network, scores, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import denoisers, distributions, linalg, networks, schedules

SCHEDULES = {
    "vp-linear": (schedules.VPLinear(), 0.3),
    "vp-cosine": (schedules.VPCosine(), 0.4),
    "ve": (schedules.VE(), 1.3),
    "rectified-flow": (schedules.RectifiedFlow(), 0.6),
}
each = pytest.mark.parametrize(("schedule", "t"), SCHEDULES.values(), ids=SCHEDULES.keys())


@each
def test_untrained_edm_denoiser_is_the_wiener_filter_of_white_data(schedule, t):
    """With the output layer at zero, x0_hat = c_skip x_t: the posterior mean of N(0, s^2 I)."""
    net = networks.make("mlp", data_shape=(5,), width=8, depth=1)
    denoise_fn = denoisers.from_network(net, net.init(jax.random.key(0)), schedule, data_std=0.7)
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    exact = distributions.Gaussian(jnp.zeros(5), 0.7 * jnp.eye(5)).denoiser(schedule)
    np.testing.assert_allclose(denoise_fn(x_t, t), exact(x_t, t), rtol=1e-5, atol=1e-6)


@each
def test_lowrank_network_with_the_true_bases_is_the_exact_denoiser(schedule, t):
    bases = linalg.random_frames(jax.random.key(1), 2, 12, 3)
    net = networks.make("lowrank", data_shape=(12,), num_components=2, rank=3)
    params = jax.tree.map(lambda p: bases.reshape(p.shape), net.init(jax.random.key(0)))
    denoise_fn = denoisers.from_network(net, params, schedule, parametrization="x0")
    p = distributions.MoLRG(bases)
    x0, _ = p.sample(jax.random.key(2), 16)
    eps = jax.random.normal(jax.random.key(3), x0.shape)
    x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    np.testing.assert_allclose(
        denoise_fn(x_t, t), p.denoiser(schedule)(x_t, t), rtol=2e-4, atol=2e-5
    )


@each
def test_score_of_an_exact_denoiser(schedule, t):
    p = distributions.Gaussian(jnp.ones(4), jnp.eye(4, 2), 0.3)
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    got = denoisers.score_fn(p.denoiser(schedule), schedule)(x_t, jnp.asarray(t))
    expected = p.score(x_t, schedule.alpha(t), schedule.sigma(t))
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


def test_scalar_and_batched_times_agree():
    net = networks.make("unet", data_shape=(8, 8, 1), channels=8, channel_mult=(1,), num_blocks=1)
    params = jax.tree.map(lambda p: p + 0.05, net.init(jax.random.key(0)))
    denoise_fn = denoisers.from_network(net, params, schedules.VE())
    x_t = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    one, many = denoise_fn(x_t, jnp.asarray(0.5)), denoise_fn(x_t, jnp.full(3, 0.5))
    np.testing.assert_allclose(one, many, rtol=1e-6)


@pytest.mark.slow
def test_forward_and_reverse_derivatives_agree():
    """Jacobian tools need both: <u, J v> = <J^T u, v>."""
    net = networks.make("unet", data_shape=(8, 8, 1), channels=8, channel_mult=(1,), num_blocks=1)
    params = jax.tree.map(lambda p: p + 0.05, net.init(jax.random.key(0)))
    f = lambda x: denoisers.from_network(net, params, schedules.VE())(x, jnp.asarray(0.5))
    x, u, v = jax.random.normal(jax.random.key(1), (3, 2, 8, 8, 1))
    forward = jnp.vdot(u, jax.jvp(f, (x,), (v,))[1])
    reverse = jnp.vdot(jax.vjp(f, x)[1](u)[0], v)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


def test_eps_without_signal_is_refused():
    net = networks.make("mlp", data_shape=(5,), width=8, depth=1)
    with pytest.raises(ValueError, match=r'alpha\(t_max\) = 0: expected "velocity"'):
        denoisers.from_network(net, {}, schedules.RectifiedFlow(), parametrization="eps")


def test_wrong_time_shape():
    net = networks.make("mlp", data_shape=(5,), width=8, depth=1)
    denoise_fn = denoisers.from_network(net, net.init(jax.random.key(0)), schedules.VE())
    with pytest.raises(ValueError, match="wrong shape of t"):
        denoise_fn(jnp.ones((4, 5)), jnp.ones(3))
