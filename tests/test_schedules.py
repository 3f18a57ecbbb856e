"""Schedules against the papers' formulas in float64, inverses, grids, no retracing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim_diffusion import schedules
from lowdim_diffusion._types import Schedule

SCHEDULES = {
    "vp-linear": schedules.VPLinear(),
    "vp-linear-constant": schedules.VPLinear(2.0, 2.0),
    "vp-cosine": schedules.VPCosine(),
    "ve": schedules.VE(),
    "rectified-flow": schedules.RectifiedFlow(),
    "discrete": schedules.Discrete.from_betas(schedules.beta_table("linear")),
}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def inner_times(schedule, num=400):
    ratio = schedule.t_max / schedule.t_min
    return jnp.asarray(schedule.t_min * ratio ** np.linspace(0, 0.99999, num))


@each
def test_protocol(schedule):
    assert isinstance(schedule, Schedule)


@each
def test_log_snr_is_the_ratio_of_scales(schedule, x64):
    t = inner_times(schedule)
    expected = 2 * np.log(np.asarray(schedule.alpha(t)) / np.asarray(schedule.sigma(t)))
    np.testing.assert_allclose(schedule.log_snr(t), expected, rtol=1e-8, atol=1e-8)
    assert np.all(np.diff(schedule.log_snr(t)) < 0)


@each
def test_inverse_float64(schedule, x64):
    t = inner_times(schedule)
    np.testing.assert_allclose(schedule.t_from_log_snr(schedule.log_snr(t)), t, rtol=2e-9)


@each
def test_inverse_float32(schedule):
    t = inner_times(schedule).astype(jnp.float32)
    back = schedule.t_from_log_snr(schedule.log_snr(t))
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, t, rtol=3e-5)


@each
def test_float32_agrees_with_float64(schedule):
    t32 = inner_times(schedule).astype(jnp.float32)
    values32 = [np.asarray(f(t32)) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)]
    with jax.enable_x64(True):
        t64 = jnp.asarray(np.asarray(t32), jnp.float64)
        values64 = [np.asarray(f(t64)) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)]
    for low, high in zip(values32, values64, strict=True):
        np.testing.assert_allclose(low, high, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp-linear", "vp-cosine", "discrete"])
def test_variance_preserving(name, x64):
    schedule = SCHEDULES[name]
    t = inner_times(schedule)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-12)


def test_vp_linear_table():
    """Papers' table of abar and sigma of the VP-SDE (0.1, 20)."""
    t = np.array([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
    abar = np.exp(-0.5 * t**2 * 19.9 - t * 0.1)
    s = schedules.VPLinear()
    np.testing.assert_allclose(s.alpha(t) ** 2, abar, rtol=1e-5)
    # DDPM's discrete betas, an independent construction, agree to 2 % (6 % at the very end).
    betas = np.linspace(1e-4, 0.02, 1000)
    discrete = np.cumprod(1 - betas)[(t * 1000).astype(int) - 1]
    np.testing.assert_allclose(s.alpha(t) ** 2, discrete, rtol=0.11)
    np.testing.assert_allclose(
        schedules.noise_levels(s, t[:4]), [0.173, 0.339, 0.719, 1.23], rtol=0.02
    )


def test_cosine_against_definition(x64):
    s, t = schedules.VPCosine(), np.linspace(1e-3, 0.99, 50)
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2)
    np.testing.assert_allclose(s.alpha(t), f(t) / f(0), rtol=1e-12)


@each
def test_rates_match_finite_differences(schedule, x64):
    t = inner_times(schedule)[150:390:40]
    h = 1e-5 * t
    for got, fn in zip(schedules.rates(schedule, t), (schedule.alpha, schedule.sigma), strict=True):
        np.testing.assert_allclose(got, (fn(t + h) - fn(t - h)) / (2 * h), rtol=2e-5, atol=1e-8)


def test_new_parameter_does_not_retrace():
    traces = []

    @jax.jit
    def f(schedule, t):
        traces.append(1)
        return schedule.alpha(t) + schedule.sigma(t)

    values = [float(f(schedules.VPLinear(0.1, b), 0.5)) for b in (10.0, 20.0, 30.0)]
    assert len(traces) == 1
    assert len(set(values)) == 3


@each
def test_gradient_with_respect_to_the_schedule(schedule):
    """The gradient is a schedule-shaped tree of any sign; making it must not be refused."""
    slope = jax.grad(lambda s: -s.sigma(0.3) - s.alpha(0.3))(schedule)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


def test_vmap_over_schedules():
    many = schedules.VPLinear(jnp.array([0.1, 0.2]), jnp.array([20.0, 10.0]))
    out = jax.vmap(lambda s: s.sigma(0.5))(many)
    expected = [schedules.VPLinear(0.1, 20.0).sigma(0.5), schedules.VPLinear(0.2, 10.0).sigma(0.5)]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


# --- tables of steps ----------------------------------------------------------------------------

EVERY_KIND = pytest.mark.parametrize("kind", schedules.BETAS)


def kept_power(kind, steps, first=1e-4, last=0.02):
    """Signal power after each step, a loop over the definitions in Python floats."""
    power, found = 1.0, []
    for k in range(steps):
        u = k / (steps - 1)
        if kind == "linear":
            beta = first + u * (last - first)
        elif kind == "scaled_linear":
            beta = (first**0.5 + u * (last**0.5 - first**0.5)) ** 2
        elif kind == "sigmoid":
            beta = first + (last - first) / (1 + math.exp(6 - 12 * u))
        else:
            f = lambda v: math.cos((v + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = min(1 - f((k + 1) / steps) / f(k / steps), 0.999)
        power *= 1 - beta
        found.append(power)
    return np.array(found)


@EVERY_KIND
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_discrete_has_the_powers_of_its_table(kind, steps, x64):
    s = schedules.Discrete.from_betas(schedules.beta_table(kind, steps))
    power = kept_power(kind, steps)
    t = np.arange(1.0, steps + 1)
    np.testing.assert_allclose(s.alpha(t) ** 2, power, rtol=1e-9)
    np.testing.assert_allclose(s.sigma(t) ** 2, 1 - power, rtol=1e-9)
    assert (s.t_min, s.t_max) == (1.0, float(steps))


@EVERY_KIND
def test_discrete_is_exact_at_its_steps_in_float32(kind):
    s = schedules.Discrete.from_betas(schedules.beta_table(kind))
    t = jnp.arange(1, 1001, dtype=jnp.float32)
    log_snr = jax.jit(s.log_snr)(t)
    np.testing.assert_array_equal(log_snr, s.log_snrs.astype(np.float32))
    np.testing.assert_array_equal(jax.jit(s.t_from_log_snr)(log_snr), t)


def test_discrete_between_and_outside_its_steps(x64):
    s = schedules.Discrete.from_betas([0.1, 0.2, 0.3])
    table = s.log_snrs
    assert float(s.log_snr(2.25)) == pytest.approx(0.75 * table[1] + 0.25 * table[2])
    assert float(s.log_snr(4.0)) == pytest.approx(2 * table[2] - table[1])
    ratios = schedules.noise_levels(s, np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(ratios, (1 / 9) ** 0.5 * np.array([0, 0.25, 1]), rtol=1e-12)
    assert (float(s.alpha(0)), float(s.sigma(0)), float(s.log_snr(0))) == (1.0, 0.0, np.inf)
    t = np.linspace(0.01, 5, 200)
    np.testing.assert_allclose(s.t_from_log_snr(s.log_snr(t)), t, rtol=1e-12)
    assert all(np.isfinite(rate) for rate in schedules.rates(s, 0.0))


def test_discrete_under_jit_vmap_and_grad():
    one = schedules.Discrete.from_betas(schedules.beta_table("linear", 9, 0.01, 0.1))
    many = schedules.Discrete(jnp.stack([one.log_snrs, 2 * one.log_snrs]))
    out = jax.jit(jax.vmap(lambda s, t: s.t_from_log_snr(s.log_snr(t)), (0, None)))(many, 3.5)
    np.testing.assert_allclose(out, 3.5, rtol=1e-6)
    slope = jax.grad(lambda s: s.log_snr(2.25))(schedules.Discrete(jnp.asarray(one.log_snrs)))
    np.testing.assert_allclose(slope.log_snrs, [0, 0.75, 0.25, 0, 0, 0, 0, 0, 0], atol=1e-6)


def test_karras_grid_published_values():
    published = [80, 57.6, 40.8, 28.4, 19.4, 12.9, 8.40, 5.32, 3.26, 1.92, 1.09]
    published += [0.585, 0.296, 0.140, 0.0599, 0.0229, 0.0075, 0.002, 0]
    np.testing.assert_allclose(schedules.karras_grid(18), published, rtol=6e-3)
    assert schedules.karras_grid(1).tolist() == pytest.approx([80.0, 0.0], rel=1e-6)


@each
def test_grids_run_from_noise_to_data(schedule):
    for grid in (
        schedules.uniform_grid(schedule, 7),
        schedules.log_snr_grid(schedule, 7),
        schedules.times_from_sigmas(schedule, schedules.karras_grid(7)),
    ):
        assert grid.shape == (8,)
        assert np.all(np.diff(grid) < 0)
        assert grid[-1] == 0
        assert np.all(np.isfinite(grid))


def test_log_snr_grid_is_uniform_in_log_snr(x64):
    schedule = schedules.VPLinear()
    steps = np.diff(schedule.log_snr(schedules.log_snr_grid(schedule, 9)[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 5), st.floats(0, 50), st.floats(-12, 12))
def test_vp_linear_inverse_for_any_betas(beta_min, extra, log_snr):
    with jax.enable_x64(True):
        s = schedules.VPLinear(beta_min, beta_min + extra)
        assert float(s.log_snr(s.t_from_log_snr(log_snr))) == pytest.approx(log_snr, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.VPLinear(beta_min=-1.0), r"beta_min out of range: expected \(0, inf\)"),
        (lambda: schedules.VPLinear(beta_min=2.0, beta_max=1.0), "beta_max out of range"),
        (lambda: schedules.VE(sigma_min=0.0), "sigma_min out of range"),
        (lambda: schedules.VE(sigma_min=2.0, sigma_max=1.0), "sigma_max out of range"),
        (lambda: schedules.VPCosine(s=0.0), "s out of range"),
        (lambda: schedules.Discrete.from_betas([0.1, 1.0]), "betas out of range.*cannot be inv"),
        (lambda: schedules.Discrete.from_betas([0.1]), "number of betas too small"),
        (lambda: schedules.Discrete.from_betas([[0.1, 0.2]]), "wrong shape of betas"),
        (lambda: schedules.beta_table("laplace"), "unknown kind: expected one of 'linear'"),
        (lambda: schedules.beta_table("linear", 1), "num_steps too small"),
        (lambda: schedules.karras_grid(0), "num_steps too small: expected at least 1, got 0"),
        (lambda: schedules.karras_grid(4, 1.0, 0.5), "sigma_max out of range"),
        (lambda: schedules.karras_grid(3, rho=0.0), "rho out of range"),
        (lambda: schedules.VE(sigma_max=float("inf")), r"sigma_max out of range: .*inf\), got inf"),
    ],
)
def test_errors(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_num_steps_must_be_an_int(unchecked):
    with pytest.raises(TypeError, match="num_steps must be an int, got float"):
        schedules.karras_grid(2.5)
