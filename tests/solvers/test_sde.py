"""Solvers of the reverse SDE against their published loops, and Langevin's stationary law."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import schedules, solvers

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()


def bent(y):
    np_ = jnp if isinstance(y, jax.Array) else np
    return np_.tanh(y) * 0.8 + 0.1 * y


def steps(solver, schedule, ts, x, noise):
    """The solver's own steps with given noise, uncompiled."""
    denoise_fn = lambda x, t: bent(x / schedule.alpha(t))
    coefficients = solvers.plan(solver, schedule, ts).coefficients
    state = solver.init(jnp.asarray(x))
    for i in range(len(ts) - 1):
        c = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), coefficients)
        state = solver.step(denoise_fn, state, c, lambda j, i=i: jnp.asarray(noise[i])).state
    return np.asarray(state.x)


@pytest.fixture
def start(x64):
    rng = np.random.default_rng(0)
    return 10.0 * rng.standard_normal((5, 3)), rng.standard_normal((12, 5, 3))


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_sde_solvers_are_k_diffusions(name, eta, start):
    """Crowson's sample_dpmpp_2m_sde (solver type heun) and sample_dpmpp_3m_sde, written out.

    Its third-order term takes a divided difference for the second derivative, which is twice that.
    """
    x, noise = start
    sigmas = np.asarray(schedules.karras_grid(8, 0.05, 10.0), np.float64)[:-1]
    made = steps(getattr(solvers, name)(eta), VE, sigmas, x, noise)
    past, h = [], []
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        denoised = bent(x)
        h.insert(0, math.log(a / b))
        total = h[0] * (1 + eta)
        x = math.exp(-total) * x - math.expm1(-total) * denoised
        phi_2 = math.expm1(-total) / total + 1
        if name == "dpmpp_3m_sde" and len(past) > 1:
            r0, r1 = h[1] / h[0], h[2] / h[0]
            first, second = (denoised - past[0]) / r0, (past[0] - past[1]) / r1
            slope = first + (first - second) * r0 / (r0 + r1)
            x = x + phi_2 * slope - (phi_2 / total - 0.5) * 2 * (first - second) / (r0 + r1)
        elif past:
            x = x + phi_2 * (denoised - past[0]) * h[0] / h[1]
        x = x + b * math.sqrt(-math.expm1(-2 * h[0] * eta)) * noise[i]
        past = [denoised, *past]
    np.testing.assert_allclose(made, x, rtol=1e-9)


@pytest.mark.parametrize("schedule", [VP, VE])
def test_euler_maruyama_is_that_of_the_score_sde(schedule, start):
    """``x += [f x - g^2 s] dt + g dw`` with f, g of Song et al. 2021, eqs. (29)-(32)."""
    x, noise = start
    vp = schedule == VP
    ts = np.linspace(0.9, 0.1, 9) if vp else np.geomspace(10, 0.1, 9)
    made = steps(solvers.euler_maruyama(), schedule, ts, x, noise)
    for i, (a, b) in enumerate(itertools.pairwise(ts)):
        alpha, sigma = float(schedule.alpha(a)), float(schedule.sigma(a))
        score = (alpha * bent(x / alpha) - x) / sigma**2
        rate = 0.1 + a * 19.9
        f, g2 = (-rate / 2, rate) if vp else (0.0, 2 * a)
        x = x + (f * x - g2 * score) * (b - a) + math.sqrt(g2 * (a - b)) * noise[i]
    np.testing.assert_allclose(made, x, rtol=1e-5)


def test_sde_heun_averages_drifts_with_one_noise(start):
    x, noise = start
    ts = np.linspace(0.9, 0.1, 5)
    made = steps(solvers.sde_heun(0.5), FLOW, ts, x, noise)

    def drift(x, t):  # of dx = v dt with half of the noise of the forward process
        eps = (x - (1 - t) * bent(x / (1 - t))) / t
        velocity = eps - bent(x / (1 - t))
        g2 = 2 * t * (1 + t / (1 - t))
        return velocity + 0.5 * g2 / 2 * eps / t, 0.5 * g2

    for i, (a, b) in enumerate(itertools.pairwise(ts)):
        first, g2 = drift(x, a)
        std = math.sqrt((a - b) * (g2 + drift(x, b)[1]) / 2)
        second, _ = drift(x + (b - a) * first + std * noise[i], b)
        x = x + (b - a) * (first + second) / 2 + std * noise[i]
    np.testing.assert_allclose(made, x, rtol=1e-8)


@pytest.mark.parametrize("make", [solvers.euler_maruyama, solvers.sde_heun, solvers.dpmpp_2m_sde])
def test_ends_are_finite_and_without_noise(make):
    for schedule in (VP, FLOW):
        plan = solvers.plan(make(), schedule, [schedule.t_max, 0.5, 0.1, 0.0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plan.coefficients))
        c = getattr(plan.coefficients, "first", plan.coefficients)
        assert c.std[-1] == 0 and c.std[1] > 0
    with pytest.raises(ValueError, match="eta out of range"):
        make(-1.0)


def test_one_value_and_full_noise_is_ancestral_sampling():
    ts = np.array([0.9, 0.4, 0.1])
    sde = solvers.plan(solvers.dpmpp_2m_sde(), VP, ts).coefficients
    ddpm = solvers.plan(solvers.ancestral(), VP, ts).coefficients
    np.testing.assert_allclose(sde.direction, ddpm.direction, rtol=1e-9)
    np.testing.assert_allclose(sde.std, ddpm.std, rtol=1e-9)


def test_langevin_moves_keep_a_gaussian_up_to_their_bias(x64):
    """Unadjusted moves of size delta lead to the variance v / (1 - delta / 2 v)."""
    data, snr, num_moves = 0.25, 0.3, 200
    var = data + 1.0
    solver = solvers.predictor_corrector(solvers.euler(), num_moves=num_moves, snr=snr)
    plan = solvers.plan(solver, VE, [1.0 + 1e-9, 1.0])
    c = jax.tree.map(lambda a: jnp.asarray(a[0]), plan.coefficients)
    denoise_fn = lambda x, t: data / (data + t**2) * x

    def moved(x_and_noise):
        x, noise = x_and_noise[:1].reshape(1, 1), x_and_noise[1:]
        draw = lambda j: noise[j - 1].reshape(1, 1)
        return solver.step(denoise_fn, solvers.State(x), c, draw).state.x[0, 0]

    by_x, *by_noise = jax.jit(jax.jacrev(moved))(jnp.zeros(1 + num_moves))
    found = by_x**2 * var + np.sum(np.square(by_noise))
    np.testing.assert_allclose(found, var / (1 - snr**2 / var), rtol=1e-8)


def test_a_predictor_with_memory_is_refused():
    with pytest.raises(ValueError, match="remembers earlier steps: expected a one-step solver"):
        solvers.predictor_corrector(solvers.dpmpp_2m())
    make = lambda: solvers.predictor_corrector(solvers.heun(), num_moves=2)
    assert make() == make() and hash(make()) == hash(make()) and make().num_evals == 4
    with pytest.raises(ValueError, match="snr out of range"):
        solvers.predictor_corrector(solvers.heun(), snr=-0.1)
