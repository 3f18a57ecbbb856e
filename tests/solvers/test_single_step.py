"""Runge-Kutta and DPM-Solver steps: loops in the papers' coordinates, orders, evaluations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import sampling, schedules, solvers

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()
MEAN, VAR = np.array([0.5, -1.0, 0.2]), np.array([1.0, 0.25, 0.01])


def bent(y, rho):
    np_ = jnp if isinstance(y, jax.Array) else np
    return np_.tanh(y) * 0.8 + 0.1 * y / (1 + rho**2)


def run(solver, schedule, ts, x_T, denoise=bent):
    def denoise_fn(x, t):
        alpha = schedule.alpha(t)
        return denoise(x / alpha, schedule.sigma(t) / alpha)

    draw = lambda: (
        sampling.sample(jax.random.key(0), denoise_fn, schedule, ts, x_T, solver=solver).x
    )
    return np.asarray(jax.jit(draw)())


@pytest.mark.parametrize("schedule", [VE, VP, FLOW])
@pytest.mark.parametrize("name", ["midpoint", "rk4"])
def test_is_the_textbook_method_in_rho(name, schedule, x64):
    rhos = np.asarray(schedules.karras_grid(8, 0.02, 20.0), np.float64)
    ts = np.asarray(schedules.times_from_sigmas(schedule, rhos), np.float64)
    slope = lambda y, rho: (y - bent(y, rho)) / rho
    start = y = 20.0 * np.random.default_rng(0).standard_normal((5, 3))
    for a, b in itertools.pairwise(rhos):
        h, one = b - a, slope(y, a)
        if b == 0:
            y = y + h * one
            continue
        two = slope(y + h / 2 * one, a + h / 2)
        if name == "midpoint":
            y = y + h * two
            continue
        three = slope(y + h / 2 * two, a + h / 2)
        four = slope(y + h * three, b)
        y = y + h / 6 * (one + 2 * two + 2 * three + four)
    x = run(getattr(solvers, name)(), schedule, ts, float(schedule.alpha(ts[0])) * start)
    np.testing.assert_allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("schedule", [VE, VP])
@pytest.mark.parametrize(
    "solver",
    [solvers.dpm_solver(2), solvers.dpm_solver(3), solvers.rk4()],
    ids=["dpm_2", "dpm_3", "rk4"],
)
def test_order_against_the_exact_flow_of_a_gaussian(solver, schedule, x64, key):
    first = schedules.noise_levels(schedule, schedule.t_max)
    last = 0.05
    x_T = schedule.sigma(schedule.t_max) * jax.random.normal(key, (64, 3))
    y = np.asarray(x_T) / float(schedule.alpha(schedule.t_max))
    exact = MEAN + np.sqrt((VAR + last**2) / (VAR + float(first) ** 2)) * (y - MEAN)
    denoise = lambda y, rho: MEAN[None] + (VAR / (VAR + rho**2))[None] * (y - MEAN[None])
    errors = []
    for num_steps in (64, 128):
        u = np.linspace(0, 1, num_steps + 1)
        rhos = (float(first) ** (1 / 7) + u * (last ** (1 / 7) - float(first) ** (1 / 7))) ** 7
        ts = np.array(schedules.times_from_sigmas(schedule, rhos), np.float64)
        ts[0] = schedule.t_max
        x = run(solver, schedule, ts, x_T, denoise) / float(schedule.alpha(ts[-1]))
        errors.append(np.sqrt(np.mean((x - exact) ** 2)))
    slope = np.log2(errors[0] / errors[1])
    print(f"{solver.name} {solver.order} {errors} slope {slope:.3f}")
    assert abs(slope - solver.order) < 0.15
    assert errors[-1] < 10.0 ** -(1.5 * solver.order)


def test_evaluations_are_those_counted(key):
    seen = []

    def denoise_fn(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return 0.5 * x

    for solver in (solvers.midpoint(), solvers.dpm_solver(3), solvers.rk4()):
        seen.clear()
        ts = np.array([10.0, 3.0, 1.0, 0.0])
        made = sampling.sample(key, denoise_fn, VE, ts, (2, 3), solver=solver)
        jax.block_until_ready(made.x)
        jax.effects_barrier()
        assert made.nfe == len(seen) == 2 * solver.num_evals + 1
        assert min(seen) >= 1.0 - 1e-6


def test_pure_noise_is_left_by_a_step_of_euler(x64):
    c = solvers.plan(solvers.dpm_solver(3), FLOW, [1.0, 0.5, 0.2, 0.0]).coefficients
    assert not c.weights[0].any() and c.weights[1].any() and not c.weights[2].any()
    assert all(np.isfinite(part).all() for part in c)
    with pytest.raises(ValueError, match="unknown order: expected one of 2, 3, got 4"):
        solvers.dpm_solver(4)
