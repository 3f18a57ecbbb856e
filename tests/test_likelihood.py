"""Log-densities against exact ones: both estimators, every schedule, gradients, bits, slopes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from g8 import mixture

from lowdim_diffusion import distributions, likelihood, schedules
from lowdim_diffusion.linalg import random_frames

VE, FLOW = schedules.VE(), schedules.RectifiedFlow()
DISCRETE = schedules.Discrete.from_betas(schedules.beta_table())


@pytest.fixture(scope="module")
def g8():
    """Fixture G8: two rank-2 components in eight dimensions with a floor, 64 points at 1e-3."""
    with jax.enable_x64(True):
        p = mixture()
        x, _ = p.sample(jax.random.key(1), 64)
        return p, x + 1e-3 * jax.random.normal(jax.random.key(2), x.shape)


def run(p, y, fn=likelihood.log_prob, **options):
    """``(result, largest error)`` of one compiled evaluation, under VE from 1e-3 to 50."""
    levels = {} if "ts" in options else {"t_min": 1e-3, "t_max": 50.0}
    fn = functools.partial(fn, jax.random.key(7), p.denoiser(VE), VE, **levels, **options)
    found = jax.jit(fn)(y)
    return found, float(jnp.max(jnp.abs(found.log_prob - p.log_prob(y, 1.0, 1e-3))))


# ------------------------------------------------------------------ the probability flow


@pytest.mark.parametrize("steps", [(50, 100), pytest.param((100, 200), marks=pytest.mark.slow)])
def test_errors_on_g8_are_of_order_four_down_to_the_floor_of_the_prior(g8, steps, x64):
    """Runge-Kutta in log rho, on other subspaces, had 2.1e-3, 1.4e-4, 8.5e-6; the floor 1.4e-3."""
    p, y = g8
    published = {50: 2.1e-3, 100: 1.4e-4, 200: 8.5e-6}
    coarse, first = run(p, y, ts=np.geomspace(50.0, 1e-3, steps[0] + 1), prior=p.log_prob)
    fine, floor = run(p, y, num_steps=steps[1])
    truth = p.log_prob(y, 1.0, 1e-3)
    mean, covariance = p.moments()
    normal = lambda covariance: scipy.stats.multivariate_normal(mean, covariance).logpdf(fine.x_T)
    far = {  # other laws at the largest noise, at the same end of the flow
        "exact": p.log_prob(fine.x_T, 1.0, 50.0),
        "gaussian": normal(covariance + 50**2 * np.eye(8)),
        "default": normal(50**2 * np.eye(8)),
    }
    other = {n: fine.log_prob - far["default"] + value - truth for n, value in far.items()}
    errors = {n: float(np.abs(e).max()) for n, e in other.items()}
    print(f"G8: {steps[0]} steps {first:.1e}, {steps[1]} steps {errors}")
    assert first < published[steps[0]] and errors["exact"] < published[steps[1]]
    assert math.log2(first / errors["exact"]) > 3.7
    assert 5e-4 < floor < 3e-3 and errors["gaussian"] < 0.2 * floor
    assert (coarse.nfe, fine.nfe) == (5 * steps[0] + 1, 5 * steps[1] + 1) and fine.stderr is None


@pytest.mark.slow
def test_a_gaussian_at_several_largest_noises(key):
    """In float32, one program: the largest noise is traced."""
    p = distributions.Gaussian(0.3 * jnp.ones(6), jnp.eye(6)[:, :2], noise_std=0.05)
    x, _ = p.sample(key, 32)

    @jax.jit
    def fn(x, sigma_max):
        ve = schedules.VE(sigma_max=sigma_max)
        found = likelihood.log_prob(key, p.denoiser(ve), ve, x, prior=p.log_prob)
        return found.log_prob

    for sigma_max in (20.0, 80.0, 300.0):
        np.testing.assert_allclose(fn(x, sigma_max), p.log_prob(x, 1.0, 0.002), atol=1e-3)
    assert fn._cache_size() == 1


@pytest.mark.parametrize(
    ("schedule", "t_max"),
    [
        pytest.param(
            FLOW, float(FLOW.t_from_log_snr(-14.0)), id="flow"
        ),  # at t = 1 rho is infinite
        pytest.param(DISCRETE, 1000.0, id="discrete"),
        pytest.param(schedules.VPLinear(), 1.0, id="vp", marks=pytest.mark.slow),
        pytest.param(schedules.VPCosine(), 0.999, id="cosine", marks=pytest.mark.slow),
    ],
)
def test_density_and_latent_of_a_gaussian_on_every_schedule(schedule, t_max, x64):
    """By the defaults, against N(1, diag(var)) and its exact flow."""
    var = np.array([[1.0, 0.25, 0.04]])
    y = np.array([[0.4, -0.2, 0.1], [1.0, 1.0, 0.3]])

    def denoise_fn(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return 1 + a * var / (a**2 * var + s**2) * (x - a)

    def density(y, rho):
        return scipy.stats.norm.logpdf(y, 1, np.sqrt(var + rho**2)).sum(1)

    rho_0, rho = (float(schedules.noise_levels(schedule, t)) for t in (schedule.t_min, t_max))
    prior = lambda y, alpha, sigma: jnp.sum(
        jax.scipy.stats.norm.logpdf(y, alpha, jnp.sqrt(alpha**2 * var + sigma**2)), 1
    )
    fn = functools.partial(likelihood.log_prob, jax.random.key(0), denoise_fn, schedule)
    found = jax.jit(functools.partial(fn, prior=prior))(jnp.asarray(y))
    flow = 1 + (y - 1) * np.sqrt((var + rho**2) / (var + rho_0**2))
    np.testing.assert_allclose(found.x_T, float(schedule.alpha(t_max)) * flow, rtol=1e-4)
    np.testing.assert_allclose(found.log_prob, density(y, rho_0), atol=1e-3)


@pytest.mark.parametrize("probe", ["rademacher", pytest.param("normal", marks=pytest.mark.slow)])
def test_hutchinson_is_unbiased_and_its_error_is_stated(g8, probe, x64):
    p, y = g8
    options = {"trace": "hutchinson", "num_probes": 64, "num_steps": 60, "prior": p.log_prob}
    found, _ = run(p, y[:4], probe=probe, **options)
    error = found.log_prob - p.log_prob(y[:4], 1.0, 1e-3)
    print(f"standard error of 64 probes, {probe}: {np.mean(found.stderr):.2f}")
    assert np.all(np.abs(error) < 4 * found.stderr + 2e-3)
    low, high = {"rademacher": (0.1, 1), "normal": (1, 6)}[probe]
    assert low < np.mean(found.stderr) < high


def test_signs_are_exact_on_a_diagonal_jacobian_and_probes_belong_to_examples(key):
    white = lambda x, t: x / (1 + t**2)
    x = jax.random.normal(key, (6, 2, 2, 1))
    fn = jax.jit(
        lambda x, index, probe="rademacher": (
            likelihood.log_prob(
                key, white, VE, x, trace="hutchinson", probe=probe, index=index, num_steps=40
            ).log_prob
        ),
        static_argnames="probe",
    )
    whole = fn(x, jnp.arange(6))
    want = -0.5 * jnp.sum(x**2, axis=(1, 2, 3)) - 2 * math.log(2 * math.pi)
    np.testing.assert_allclose(whole, want, atol=2e-3)
    whole = fn(x, jnp.arange(6), probe="normal")
    part = functools.partial(fn, probe="normal")
    parts = jax.pmap(part)(x.reshape(2, 3, 2, 2, 1), jnp.arange(6).reshape(2, 3))
    np.testing.assert_allclose(whole, parts.reshape(6), rtol=1e-5)
    assert np.std(whole - want) > 0.1


@pytest.mark.slow
def test_the_gradient_is_the_score(g8, x64):
    p, y = g8
    y = y[:4] + 0.2 * jax.random.normal(jax.random.key(5), (4, 8))
    options = {"t_min": 0.2, "t_max": 50.0, "num_steps": 40, "prior": p.log_prob}
    fn = lambda y: likelihood.log_prob(jax.random.key(0), p.denoiser(VE), VE, y, **options)
    score = jax.jit(jax.grad(lambda y: jnp.sum(fn(y).log_prob)))(y)
    exact = p.score(y, 1.0, 0.2)
    np.testing.assert_allclose(score, exact, atol=1e-3 * np.abs(exact).max())


# ------------------------------------------------------------------ Ito's formula


def test_elbo_of_the_exact_denoiser_is_the_density(g8, x64):
    p, y = g8
    y = y[:16]
    options = {"num_levels": 200, "num_paths": 32, "prior": p.log_prob}
    found, _ = run(p, y, fn=likelihood.elbo, **options)
    z = (found.log_prob - p.log_prob(y, 1.0, 1e-3)) / found.stderr
    print(f"standard error {np.mean(found.stderr):.3f}, z {np.mean(z):.2f} +- {np.std(z):.2f}")
    assert np.abs(z).max() < 4 and np.std(z) < 1.7
    assert abs(np.mean(z)) < 4 / math.sqrt(16)
    assert np.mean(found.stderr) < 0.5
    assert found.nfe == 200 * 32 + 1 and found.x_T is None


def test_a_gauge_moves_the_flow_and_the_bound_but_not_the_density(key, x64):
    """A field R with div(p R) = 0 added to the score; its cost to the bound is half its energy."""
    var = np.array([2.0, 1.0, 0.5, 0.1, 0.01])
    turn = np.random.default_rng(0).standard_normal((5, 5))
    turn = 0.3 * (turn - turn.T)
    y = jnp.sqrt(var + 0.01)[None] * jax.random.normal(key, (256, 5))
    exact = scipy.stats.norm.logpdf(y, 0, np.sqrt(var + 0.01)).sum(1)
    prior = lambda y, alpha, sigma: jnp.sum(
        jax.scipy.stats.norm.logpdf(y, 0, jnp.sqrt(var + sigma**2)[None]), 1
    )

    def run(fn, gauge, **options):
        def denoise_fn(x, t):
            variance = jnp.reshape(t, (-1, 1)) ** 2  # of the noise: x0_hat = x + variance (s + R)
            score = -x / (var[None] + variance)
            return x + variance * (score - gauge * score @ turn.T)

        options = {"t_min": 0.1, "t_max": 50.0, "prior": prior, **options}
        return jax.jit(lambda y: fn(key, denoise_fn, VE, y, **options))(y)

    for gauge in (0.0, 1.0):
        found = run(likelihood.log_prob, gauge, num_steps=60)
        np.testing.assert_allclose(found.log_prob, exact, atol=1e-3)
    straight, turned = (run(likelihood.log_prob, g, num_steps=60).x_T for g in (0.0, 1.0))
    assert np.abs(straight - turned).max() > 10

    energy = (turn**2).sum(0) * np.log((var + 50**2) / (var + 0.01))  # over all v, E ||R||^2 dv
    gap = exact - run(likelihood.elbo, 1.0, num_levels=400).log_prob
    print(f"gap {gap.mean():.2f} +- {gap.std() / 16:.2f}, half the energy {energy.sum() / 2:.2f}")
    assert abs(gap.mean() - energy.sum() / 2) < 4 * gap.std() / 16


# ------------------------------------------------------------------ bits and slopes


def test_bits_of_uniform_colours_are_the_bits_of_their_number(key):
    for levels, data_range in ((256, (-1.0, 1.0)), (2, (0.0, 1.0)), (64, (0.0, 63.0))):
        width = (data_range[1] - data_range[0]) / (levels - 1)
        log_prob = jnp.full(3, -12 * math.log(levels * width))
        found = likelihood.bits_per_dim(log_prob, 12, levels=levels, data_range=data_range)
        np.testing.assert_allclose(found, math.log2(levels), rtol=1e-6)
        x = jnp.full((2, 4000), data_range[1])
        noisy = likelihood.dequantize(key, x, levels=levels, data_range=data_range) - x
        assert np.abs(noisy).max() <= width / 2 * 1.001
        np.testing.assert_allclose(np.std(noisy), width / math.sqrt(12), rtol=0.02)


def test_the_noise_slope_counts_dimensions(key, x64):
    """The slopes that another implementation found between these levels."""
    p = distributions.MoLRG(random_frames(key, 2, 8, 2, dtype=jnp.float64))
    x_0, _ = p.sample(jax.random.key(1), 4000)
    density = lambda y, sigma: p.log_prob(y, 1.0, sigma)
    sigmas = [0.1, 10**-1.5, 0.01, 10**-2.5, 1e-3]
    fn = jax.jit(lambda pair: likelihood.noise_slope(jax.random.key(2), density, x_0, pair))
    slopes = [float(fn(jnp.array(sigmas[i : i + 2])).slope) for i in range(4)]
    print("slopes", np.round(slopes, 4))
    np.testing.assert_allclose(slopes, [-5.989, -5.999, -6.000, -6.000], atol=6e-3)
    np.testing.assert_allclose(fn(jnp.array([1e-4, 1e-3])).dimension, 2, atol=1e-3)


@pytest.mark.slow
def test_the_noise_slope_from_a_denoiser(key):
    p = distributions.MoLRG(random_frames(key, 2, 6, 2))
    x_0, _ = p.sample(jax.random.key(1), 64)
    density = lambda y, sigma: (
        likelihood.log_prob(key, p.denoiser(VE), VE, y, t_min=sigma, num_steps=50).log_prob
    )
    found = jax.jit(lambda x: likelihood.noise_slope(key, density, x, jnp.array([0.01, 0.02])))(x_0)
    np.testing.assert_allclose(found.dimension, 2, atol=0.03)


# ------------------------------------------------------------------ adaptive steps


@pytest.mark.slow
def test_adaptive_steps_reach_the_tolerance(g8, x64):
    pytest.importorskip("diffrax")
    p, y = g8
    errors = {}
    for tol in (1e-4, 1e-8):
        found, errors[tol] = run(p, y[:8], tol=tol, prior=p.log_prob)
        assert found.nfe.shape == (8,) and np.all(found.nfe > 40)
    print(errors, found.nfe)
    assert errors[1e-4] < 1e-2 and errors[1e-8] < 1e-6
    options = {"trace": "hutchinson", "num_probes": 2}
    probed, _ = run(p, y[:8], tol=1e-6, **options)
    fixed, _ = run(p, y[:8], num_steps=200, **options)
    np.testing.assert_allclose(probed.log_prob, fixed.log_prob, atol=1e-3)
    alone, _ = run(p, y[:1], tol=1e-8, prior=p.log_prob)
    np.testing.assert_array_equal(alone.nfe, found.nfe[:1])


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trace": "skilling"}, "unknown trace: expected one of 'exact', 'hutchinson'"),
        ({"probe": "uniform"}, "unknown probe"),
        ({"num_probes": 0}, "num_probes too small"),
        ({"num_steps": 0}, "num_steps too small"),
        ({"ts": [80.0, 1.0, 0.0]}, r"no density without noise: .*ts\[:-1\]"),
        ({"ts": [80.0, 1.0], "t_min": 1.0}, "one or the other"),
        ({"t_min": 90.0}, "log_prob: ts must decrease"),
        ({"t_max": 90.0}, "leaves the schedule's range"),
        ({"x_0": np.ones(3, np.float32)}, "wrong shape of x"),
        ({"index": jnp.arange(4), "trace": "hutchinson"}, "wrong shape of index"),
        ({"denoise_fn": lambda x, t: x[:, :1]}, "denoise_fn returned"),
        ({"tol": -1.0}, "tol out of range"),
    ],
)
def test_errors(options, match, key, unchecked):
    white = lambda x, t: x / (1 + t**2)
    arguments = {"denoise_fn": white, "schedule": VE, "x_0": jnp.ones((2, 3)), **options}
    with pytest.raises(ValueError, match=match):
        likelihood.log_prob(key, **arguments)


def test_other_errors(key):
    with pytest.raises(ValueError, match="wrong shape of sigmas"):
        likelihood.noise_slope(key, lambda y, s: y[:, 0], jnp.ones((2, 3)), jnp.array([1.0]))
    with pytest.raises(ValueError, match="data_range"):
        likelihood.bits_per_dim(jnp.zeros(2), 3, data_range=(1.0, -1.0))
    with pytest.raises(ValueError, match="num_levels too small"):
        likelihood.elbo(key, lambda x, t: x, VE, jnp.ones((2, 3)), num_levels=0)


def test_without_diffrax_the_error_names_the_extra(key, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffrax", None)
    white = lambda x, t: x / (1 + t**2)
    with pytest.raises(ModuleNotFoundError, match=r"log_prob: .*lowdim-diffusion\[diffrax\]"):
        likelihood.log_prob(key, white, VE, jnp.ones((2, 3)), tol=1e-5)
