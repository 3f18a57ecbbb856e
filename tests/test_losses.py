"""Losses against closed forms: the autoencoder identity, optimality, weights, levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lowdim_diffusion import (
    corruption,
    distributions,
    linalg,
    losses,
    networks,
    schedules,
)

SCHEDULES = {
    "vp-linear": schedules.VPLinear(),
    "vp-cosine": schedules.VPCosine(),
    "ve": schedules.VE(),
    "rectified-flow": schedules.RectifiedFlow(),
}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


# ---- the theory ----


@pytest.mark.parametrize("t", [0.1, 0.4, 0.8])
def test_autoencoder_identity(t, key):
    """E||c U U^T (s x + g eps) - x||^2 = ||x||^2 - (2cs - c^2 s^2)||U^T x||^2 + c^2 g^2 d."""
    dim, rank, draws = 20, 3, 200_000
    schedule = schedules.VPLinear()
    basis = linalg.random_frames(jax.random.key(7), 1, dim, rank)[0]
    x = jax.random.normal(jax.random.key(8), (dim,))
    s, g = float(schedule.alpha(t)), float(schedule.sigma(t))
    c = s / (s**2 + g**2)
    denoise_fn = lambda x_t, t: c * linalg.project(basis, x_t)
    x0 = jnp.broadcast_to(x, (draws, dim))
    eps = jax.random.normal(key, (draws, dim))
    got = dim * np.mean(
        np.asarray(losses.squared_errors(denoise_fn, schedule, x0, t, eps), np.float64)
    )
    inside = float(jnp.sum((basis.T @ x) ** 2))
    expected = float(x @ x) - (2 * c * s - (c * s) ** 2) * inside + c**2 * g**2 * rank
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_exact_denoiser_has_the_least_error_and_it_is_the_mmse(key):
    """For N(0, diag(l)) the error of the posterior mean is sum l s^2 / (a^2 l + s^2)."""
    variances = np.array([4.0, 1.0, 0.25, 0.0])
    p = distributions.Gaussian(
        jnp.zeros(4), jnp.diag(jnp.sqrt(jnp.asarray(variances, jnp.float32)))
    )
    schedule, t, draws = schedules.RectifiedFlow(), 0.4, 400_000
    x0, _ = p.sample(jax.random.key(1), draws)
    eps = jax.random.normal(key, x0.shape)
    exact = p.denoiser(schedule)
    error = lambda fn: float(losses.squared_errors(fn, schedule, x0, t, eps).mean())
    a, s = 0.6, 0.4
    mmse = np.mean(variances * s**2 / (a**2 * variances + s**2))
    assert error(exact) == pytest.approx(mmse, rel=5e-3)
    for scale in (0.95, 1.05):
        assert error(lambda x, t, c=scale: c * exact(x, t)) > error(exact)


# ---- levels ----


def times(schedule, level, num=20_000, **options):
    index = jnp.arange(num)
    return losses.draw_times(jax.random.key(0), schedule, level, index, **options)


@each
def test_log_normal(schedule):
    t, log_snr, _ = times(schedule, losses.log_normal())
    log_sigma = -np.asarray(log_snr) / 2
    assert scipy.stats.kstest(log_sigma, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3
    np.testing.assert_allclose(schedule.log_snr(t), log_snr, rtol=1e-4, atol=1e-3)


@each
def test_log_uniform(schedule):
    _, log_snr, density = times(schedule, losses.log_uniform(0.05, 3.0))
    low, width = np.log(0.05), np.log(60)
    assert (
        scipy.stats.kstest(-np.asarray(log_snr) / 2, scipy.stats.uniform(low, width).cdf).pvalue
        > 1e-3
    )
    np.testing.assert_allclose(density, 1 / (2 * width), rtol=2e-3)


@each
def test_uniform(schedule):
    t, _, _ = times(schedule, losses.uniform())
    span = scipy.stats.uniform(schedule.t_min, schedule.t_max - schedule.t_min)
    assert scipy.stats.kstest(np.asarray(t), span.cdf).pvalue > 1e-3


def test_logit_normal():
    t, _, _ = times(schedules.RectifiedFlow(), losses.logit_normal(0.5, 0.8))
    logit = np.log(np.asarray(t)) - np.log1p(-np.asarray(t))
    assert scipy.stats.kstest(logit, scipy.stats.norm(0.5, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("level", [losses.log_normal(), losses.uniform(), losses.logit_normal()])
def test_density_is_that_of_the_log_snr(level):
    """Averaging 1/density over the draws gives the length of the covered interval."""
    schedule = schedules.VPLinear()
    _, log_snr, density = times(schedule, level, 200_000)
    log_snr, density = np.asarray(log_snr), np.asarray(density)
    low, high = np.quantile(log_snr, [0.1, 0.9])
    inside = (log_snr > low) & (log_snr < high)
    assert np.mean(inside / density) == pytest.approx(high - low, rel=0.02)


def test_stratified_times_fill_every_stratum():
    schedule = schedules.VE()
    _, log_snr, _ = times(schedule, losses.log_normal(0.0, 1.0), 64, num_strata=64)
    u = scipy.stats.norm.cdf(-np.asarray(log_snr) / 2)
    np.testing.assert_array_equal(np.floor(u * 64), np.arange(64))


@pytest.mark.slow
def test_times_depend_on_the_index_alone():
    draw = lambda index: losses.draw_times(
        jax.random.key(0), schedules.VE(), losses.log_normal(), index, num_strata=8
    )[0]
    np.testing.assert_array_equal(draw(jnp.arange(8))[3:5], draw(jnp.arange(3, 5)))


# ---- weights ----


def test_weights_in_numbers():
    log_snr, density = jnp.log(jnp.array([0.25, 100.0])), jnp.array([0.5, 0.1])
    sigma = np.array([2.0, 0.1])  # sigma / alpha
    call = lambda w: np.asarray(w(log_snr, density))
    edm = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    np.testing.assert_allclose(call(losses.edm_weight(0.5)), edm, rtol=1e-5)
    np.testing.assert_allclose(call(losses.snr_weight()), [0.25, 100], rtol=1e-5)
    np.testing.assert_allclose(call(losses.min_snr_weight(5.0)), [0.25, 5], rtol=1e-5)
    np.testing.assert_allclose(call(losses.uniform_weight()), [1, 1])
    np.testing.assert_allclose(call(losses.likelihood_weight()), [0.25, 500], rtol=1e-5)
    sigmoid = np.array([0.25, 100]) / (1 + np.exp(3) * np.array([0.25, 100]))
    np.testing.assert_allclose(call(losses.sigmoid_weight(-3.0)), sigmoid, rtol=1e-5)


def test_edm_weight_is_unit_weight_on_the_network():
    """weight * c_out^2 = 1 (Karras et al. 2022, eq. 8)."""
    t = jnp.array([0.01, 0.5, 20.0])
    c_out = corruption.precondition(schedules.VE(), t, data_std=0.7).c_out
    weight = losses.edm_weight(0.7)(schedules.VE().log_snr(t), t)
    np.testing.assert_allclose(weight * c_out**2, 1, rtol=1e-5)


@pytest.mark.parametrize("level", [losses.log_normal(0.0, 2.0), losses.log_uniform(0.01, 100.0)])
def test_likelihood_weight_integrates_the_bound(level, key):
    """For N(0, 1) the integral of SNR * mmse / 2 over log-SNR is known: mmse = 1 / (1 + SNR)."""
    schedule, num = schedules.VE(0.01, 100.0), 400_000
    _, log_snr, density = times(schedule, level, num)
    mmse = 1 / (1 + np.exp(np.asarray(log_snr, np.float64)))
    weight = np.asarray(losses.likelihood_weight()(log_snr, density), np.float64)
    low, high = -2 * np.log(10.0), 2 * np.log(10.0)  # where both levels draw enough
    inside = (np.asarray(log_snr) > low) & (np.asarray(log_snr) < high)
    expected = 0.5 * (np.logaddexp(0, high) - np.logaddexp(0, low))
    assert np.mean(weight * mmse * inside) == pytest.approx(expected, rel=0.02)


# ---- the loss of a network ----


def make(**options):
    net = networks.make("mlp", data_shape=(6,), width=16, depth=1, **options)
    return net, net.init(jax.random.key(0))


@pytest.mark.slow
def test_loss_is_the_same_on_any_split(key):
    net, params = make()
    x = jax.random.normal(jax.random.key(1), (12, 6))
    loss_fn = losses.make_loss(net, schedules.VE(), num_strata=12)
    whole = loss_fn(params, {"x": x}, key)
    assert whole.shape == (12,)
    part = loss_fn(params, {"x": x[4:8], "index": jnp.arange(4, 8)}, key)
    np.testing.assert_allclose(part, whole[4:8], rtol=1e-5)
    np.testing.assert_allclose(loss_fn(params, x, key), whole, rtol=1e-6)


@each
@pytest.mark.parametrize("parametrization", corruption.PARAMETRIZATIONS)
def test_gradients_are_finite(schedule, parametrization, key):
    if parametrization == "eps" and isinstance(schedule, schedules.RectifiedFlow):
        pytest.skip("refused, see test_denoisers")
    net, params = make()
    loss_fn = losses.make_loss(
        net, schedule, parametrization=parametrization, level=losses.uniform()
    )
    mean = lambda params: loss_fn(params, jnp.ones((8, 6)), key).mean()
    grads = jax.grad(mean)(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_labels_are_dropped_at_the_given_rate(key):
    """With every label dropped the loss cannot depend on the labels; with none it does."""
    net, params = make(num_classes=3)
    params = jax.tree.map(lambda p: p + 0.1, params)  # off the zero-initialised output
    batch = lambda label: {"x": jnp.ones((6, 6)), "label": jnp.full(6, label)}
    for rate, same in ((1.0, True), (0.0, False)):
        loss_fn = losses.make_loss(net, schedules.VE(), label_dropout=rate)
        a, b = (loss_fn(params, batch(label), key) for label in (0, 2))
        assert np.allclose(a, b) == same


def test_hard_assignment_uses_the_clean_example(key):
    """The hard-max autoencoder picks its subspace by the clean sample, whatever the noise."""
    bases = jnp.eye(6).reshape(6, 2, 3).transpose(1, 0, 2)
    net = networks.make(
        "lowrank", data_shape=(6,), num_components=2, rank=3, assignment="hard", orthonormal="none"
    )
    x0 = jnp.array([[2.0, 0, 1, 0, 1, 0]])  # coordinates 0, 2, 4: the first basis or the second
    owner = int(jnp.argmax(jnp.sum(jnp.einsum("knd,bn->bkd", bases, x0) ** 2, -1)))
    level = losses.log_uniform(2.0, 2.0 + 1e-6)
    loss_fn = losses.make_loss(
        net, schedules.VE(), parametrization="x0", level=level, weight=losses.uniform_weight()
    )
    params = jax.tree.map(lambda p: bases.reshape(p.shape), net.init(key))
    big = jnp.broadcast_to(x0, (40_000, 6))
    got = 6 * float(loss_fn(params, big, key).mean())
    c, inside = 1 / 5, float(jnp.sum((bases[owner].T @ x0[0]) ** 2))
    expected = float(x0[0] @ x0[0]) - (2 * c - c**2) * inside + c**2 * 4 * 3
    assert got == pytest.approx(expected, rel=0.02)


def test_errors(unchecked):
    net, _ = make()
    with pytest.raises(ValueError, match="label_dropout out of range"):
        losses.make_loss(net, schedules.VE(), label_dropout=1.5)
    with pytest.raises(ValueError, match="std out of range"):
        losses.log_normal(std=0.0)
