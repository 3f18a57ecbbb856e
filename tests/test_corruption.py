"""Conversions go round every pair; preconditioning against EDM's table and by algebra."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import corruption, schedules

SCHEDULES = {
    "vp-linear": (schedules.VPLinear(), np.array([0.05, 0.3, 0.7])),
    "vp-cosine": (schedules.VPCosine(), np.array([0.05, 0.3, 0.9])),
    "ve": (schedules.VE(), np.array([0.05, 1.0, 30.0])),
    "rectified-flow": (schedules.RectifiedFlow(), np.array([0.05, 0.5, 0.95])),
}
each = pytest.mark.parametrize(("schedule", "t"), SCHEDULES.values(), ids=SCHEDULES.keys())


def example(schedule, t, seed=0):
    rng = np.random.default_rng(seed)
    x0, eps = jnp.asarray(rng.standard_normal((2, 3, 2, 2, 1)))
    wide = lambda c: np.asarray(c(t))[:, None, None, None]
    return x0, eps, jnp.asarray(wide(schedule.alpha) * x0 + wide(schedule.sigma) * eps)


@each
@pytest.mark.parametrize(("source", "to"), list(itertools.product(corruption.KINDS, repeat=2)))
def test_all_to_all(schedule, t, source, to, x64):
    x0, eps, x_t = example(schedule, t)
    value = corruption.target(schedule, x0, eps, t, source)
    got = corruption.convert(schedule, value, x_t, t, source=source, to=to)
    np.testing.assert_allclose(
        got, corruption.target(schedule, x0, eps, t, to), rtol=1e-9, atol=1e-9
    )


@each
def test_velocity_is_the_time_derivative(schedule, t, x64):
    x0, eps, _ = example(schedule, t)
    path = lambda t: example(schedule, t)[2]
    h = 1e-6 * t
    slope = (path(t + h) - path(t - h)) / (2 * h)[:, None, None, None]
    got = corruption.target(schedule, x0, eps, t, "velocity")
    np.testing.assert_allclose(got, slope, rtol=1e-6, atol=1e-6)


def test_definitions(x64):
    """The table in numbers, for the variance-preserving schedule at one time."""
    s, t = schedules.VPLinear(), np.array([0.3] * 3)
    x0, eps, x_t = example(s, t)
    alpha, sigma = float(s.alpha(0.3)), float(s.sigma(0.3))
    np.testing.assert_allclose(corruption.target(s, x0, eps, t, "v"), alpha * eps - sigma * x0)
    np.testing.assert_allclose(corruption.target(s, x0, eps, t, "score"), -eps / sigma)
    score = (alpha * x0 - x_t) / sigma**2
    np.testing.assert_allclose(
        corruption.convert(s, x0, x_t, t, source="x0", to="score"), score, rtol=1e-10
    )


def test_perturb_moments(key):
    x0 = jnp.ones((20_000, 3))
    x_t, eps = corruption.perturb(key, schedules.RectifiedFlow(), x0, 0.25)
    np.testing.assert_allclose(x_t, 0.75 + 0.25 * eps, rtol=1e-6, atol=1e-6)
    assert abs(float(x_t.mean()) - 0.75) < 4 * 0.25 / np.sqrt(x0.size)
    assert float(x_t.std()) == pytest.approx(0.25, rel=0.02)


def test_edm_preconditioning_is_table_1(x64):
    sigma, sd = np.array([0.01, 0.5, 40.0]), 0.5
    p = corruption.precondition(schedules.VE(), sigma, data_std=sd)
    np.testing.assert_allclose(p.c_skip, sd**2 / (sigma**2 + sd**2))
    np.testing.assert_allclose(p.c_out, sigma * sd / np.sqrt(sigma**2 + sd**2))
    np.testing.assert_allclose(p.c_in, 1 / np.sqrt(sigma**2 + sd**2))
    np.testing.assert_allclose(p.c_noise, np.log(sigma) / 4)


@each
def test_edm_in_other_schedules_is_the_same_denoiser(schedule, t, x64):
    """x0_hat(x_t, t) must equal the VE denoiser at (x_t / alpha, sigma / alpha)."""
    ve = corruption.precondition(schedules.VE(), schedules.noise_levels(schedule, t), data_std=0.7)
    p = corruption.precondition(schedule, t, data_std=0.7)
    alpha = schedule.alpha(t)
    np.testing.assert_allclose(p.c_skip * alpha, ve.c_skip, rtol=1e-9)
    np.testing.assert_allclose(p.c_in * alpha, ve.c_in, rtol=1e-9)
    np.testing.assert_allclose(p.c_out, ve.c_out, rtol=1e-9)
    np.testing.assert_allclose(p.c_noise, ve.c_noise, rtol=1e-6, atol=1e-9)


@each
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "velocity"])
def test_preconditioning_recovers_x0_from_its_target(schedule, t, kind, x64):
    x0, eps, x_t = example(schedule, t)
    p = corruption.precondition(schedule, t, kind)
    wide = lambda c: np.asarray(c)[:, None, None, None]
    value = corruption.target(schedule, x0, eps, t, kind)
    np.testing.assert_allclose(
        wide(p.c_skip) * x_t + wide(p.c_out) * value, x0, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("parametrization", ["edm", "x0", "v", "velocity"])
def test_finite_where_there_is_no_signal(parametrization):
    p = corruption.precondition(schedules.RectifiedFlow(), jnp.array([0.0, 1.0]), parametrization)
    assert all(np.all(np.isfinite(c)) for c in p)


def test_grad_through_time_is_finite():
    loss = lambda t: sum(corruption.precondition(schedules.VPLinear(), t, "velocity"))
    assert np.isfinite(jax.grad(loss)(0.5))


def test_errors(key, unchecked):
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"wrong shape of t: expected \(\) or \(3,\), got \(2,\)"):
        corruption.perturb(key, schedules.VE(), x, jnp.ones(2))
    with pytest.raises(ValueError, match="unknown kind: expected one of 'x0'"):
        corruption.convert(schedules.VE(), x, x, 1.0, source="x0", to="noise")
    with pytest.raises(ValueError, match="unknown parametrization"):
        corruption.precondition(schedules.VE(), 1.0, "score")
    with pytest.raises(ValueError, match="data_std out of range"):
        corruption.precondition(schedules.VE(), 1.0, data_std=0.0)
