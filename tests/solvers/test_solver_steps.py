"""Single methods against plain loops in their papers' coordinates; the record's contract."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.solvers import State, plan

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()


def bent(y, rho):
    """Some smooth nonlinear D(y, rho); the same formula for NumPy and jax."""
    np_ = jnp if isinstance(y, jax.Array) else np
    return np_.tanh(y) * 0.8 + 0.1 * y / (1 + rho**2)


def bent_denoiser(schedule):
    def denoise_fn(x, t):
        alpha = schedule.alpha(t)
        return bent(x / alpha, schedule.sigma(t) / alpha)

    return denoise_fn


def times_and_rhos(schedule, num_steps=12):
    rhos = np.asarray(schedules.karras_grid(num_steps, 0.02, 20.0), np.float64)
    ts = np.asarray(schedules.times_from_sigmas(schedule, rhos), np.float64)
    return ts, rhos


def run(solver, schedule, ts, x_T):
    key, denoise_fn = jax.random.key(0), bent_denoiser(schedule)
    return jax.jit(lambda: sampling.sample(key, denoise_fn, schedule, ts, x_T, solver=solver).x)()


@pytest.fixture
def start(x64):
    return 20.0 * np.random.default_rng(0).standard_normal((5, 3))


@pytest.mark.parametrize("schedule", [VE, VP, FLOW])
def test_ddim_is_euler_in_ve_coordinates(schedule, start):
    ts, rhos = times_and_rhos(schedule)
    y = start
    for a, b in itertools.pairwise(rhos):
        y = y + (b - a) * (y - bent(y, a)) / a
    x = run(solvers.ddim(eta=0.0), schedule, ts, float(schedule.alpha(ts[0])) * start)
    np.testing.assert_allclose(x, y, atol=1e-9)
    assert solvers.ddim().step is solvers.euler().step
    assert solvers.ddim().coefficients is solvers.euler().coefficients


@pytest.mark.parametrize("schedule", [VE, VP, FLOW])
def test_heun_is_algorithm_1_of_edm(schedule, start):
    ts, rhos = times_and_rhos(schedule)
    y = start
    for a, b in itertools.pairwise(rhos):
        slope = (y - bent(y, a)) / a
        euler = y + (b - a) * slope
        second = slope if b == 0 else (euler - bent(euler, b)) / b
        y = y + (b - a) * (slope + second) / 2
    x = run(solvers.heun(), schedule, ts, float(schedule.alpha(ts[0])) * start)
    np.testing.assert_allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("schedule", [VE, VP])
def test_churned_heun_is_algorithm_2_of_edm(schedule, start):
    ts, rhos = times_and_rhos(schedule)
    settings = {"churn": 3.0, "churn_min": 0.1, "churn_max": 10.0, "noise_std": 1.01}
    noise = np.random.default_rng(1).standard_normal((len(rhos), *start.shape))
    y = start
    for i, (a, b) in enumerate(itertools.pairwise(rhos)):
        gamma = min(3.0 / 12, np.sqrt(2) - 1) if 0.1 <= a <= 10.0 else 0.0
        raised = a * (1 + gamma)
        y = y + 1.01 * np.sqrt(raised**2 - a**2) * noise[i]
        slope = (y - bent(y, raised)) / raised
        euler = y + (b - raised) * slope
        second = slope if b == 0 else (euler - bent(euler, b)) / b
        y = y + (b - raised) * (slope + second) / 2
    solver = solvers.heun(**settings)
    coefficients = plan(solver, schedule, ts).coefficients
    state = solver.init(jnp.asarray(float(schedule.alpha(ts[0])) * start))
    for i in range(12):
        c = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), coefficients)
        draw = lambda j, i=i: jnp.asarray(noise[i])
        state = solver.step(bent_denoiser(schedule), state, c, draw, clean=i == 11).state
    np.testing.assert_allclose(state.x, y, atol=1e-9)


@pytest.mark.parametrize("schedule", [VE, VP])
def test_dpmpp_2m_is_algorithm_2_of_the_paper(schedule, start):
    ts, rhos = times_and_rhos(schedule)
    y, previous, lambdas = start, None, -np.log(np.maximum(rhos, 1e-300))
    for i, (a, b) in enumerate(itertools.pairwise(rhos)):
        h, denoised = lambdas[i + 1] - lambdas[i], bent(y, a)
        if previous is None or b == 0:
            mixed = denoised
        else:
            r = (lambdas[i] - lambdas[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        y = (b / a) * y - np.expm1(-h) * mixed
        previous = denoised
    x = run(solvers.dpmpp_2m(), schedule, ts, float(schedule.alpha(ts[0])) * start)
    np.testing.assert_allclose(x, y, atol=1e-9)


def test_ancestral_kernel_is_the_ddpm_posterior(x64):
    """Ho et al. 2020 eqs. (6)-(7) with their discrete betas, and both of their variances."""
    ts = np.array([0.8, 0.5, 0.3])
    abar = np.asarray(VP.alpha(ts)) ** 2
    beta = 1 - abar[:-1] / abar[1:]
    x = jnp.array([[0.3, -2.0]])
    x0 = jnp.array([[1.0, 0.5]])
    for variance in (0.0, 1.0):
        solver = solvers.ancestral(variance)
        coefficients = plan(solver, VP, ts).coefficients
        for i in range(2):
            c = jax.tree.map(lambda a, i=i: a[i], coefficients)
            kernel = solver.kernel(lambda x, t: x0, State(x), c)
            rest = 1 - abar[i]
            mean = np.sqrt(abar[i + 1]) * beta[i] / rest * np.asarray(x0) + np.sqrt(1 - beta[i]) * (
                1 - abar[i + 1]
            ) / rest * np.asarray(x)
            small = (1 - abar[i + 1]) / rest * beta[i]
            np.testing.assert_allclose(kernel.mean.x, mean, rtol=1e-10)
            np.testing.assert_allclose(kernel.std**2, beta[i] if variance else small, rtol=1e-10)


def test_ddim_eta_is_the_papers_sigma(x64):
    ts = np.array([0.8, 0.5])
    abar = np.asarray(VP.alpha(ts)) ** 2
    c = plan(solvers.ddim(0.7), VP, ts).coefficients
    sigma = 0.7 * np.sqrt((1 - abar[1]) / (1 - abar[0])) * np.sqrt(1 - abar[0] / abar[1])
    np.testing.assert_allclose(c.std[0], sigma, rtol=1e-10)
    np.testing.assert_allclose(c.direction[0], np.sqrt(1 - abar[1] - sigma**2), rtol=1e-10)


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_ancestral_is_ddim_with_eta_one(schedule, key):
    ts = schedules.log_snr_grid(schedule, 10)
    draw = jax.jit(
        lambda solver: (
            sampling.sample(key, bent_denoiser(VE), schedule, ts, (4, 3), solver=solver).x
        )
    )
    np.testing.assert_allclose(draw(solvers.ancestral()), draw(solvers.ddim(1.0)), rtol=1e-4)


def test_step_is_its_kernel_plus_noise(key):
    solver = solvers.ddim(0.6)
    c = jax.tree.map(
        lambda a: jnp.float32(a[3]), plan(solver, VE, schedules.karras_grid(8)).coefficients
    )
    x, z = jax.random.normal(key, (2, 4, 3))
    kernel = solver.kernel(bent_denoiser(VE), State(x), c)
    step = solver.step(bent_denoiser(VE), State(x), c, lambda j: z)
    np.testing.assert_allclose(step.state.x, kernel.mean.x + kernel.std * z, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [solvers.euler, solvers.heun, solvers.dpmpp_2m, solvers.ancestral, lambda: solvers.ddim(0.3),
     lambda: solvers.heun(churn=5.0)],
)  # fmt: skip
def test_records_are_equal_hashable_and_pytrees(make):
    assert make() == make() and hash(make()) == hash(make())
    leaves, treedef = jax.tree.flatten(make())
    assert jax.tree.unflatten(treedef, leaves) == make()
    assert all(isinstance(leaf, float) for leaf in leaves)
    assert (make().kernel is None) or make().stochastic


def test_float64_numbers_used_in_the_same_trace_do_not_confuse_the_host():
    ts, schedule = np.array([0.9, 0.2]), schedules.VPLinear(beta_min=np.float64(0.1))
    draw = lambda key: (
        schedule.sigma(jnp.asarray(ts)[0]),
        plan(solvers.euler(), schedule, ts).grid.sigma,
    )
    np.testing.assert_allclose(jax.jit(draw)(0)[1], [0.999856, 0.584498], rtol=1e-4)


def test_coefficients_are_float64_on_the_host_and_agree_with_the_graphs():
    ts = schedules.times_from_sigmas(VP, schedules.karras_grid(18))
    for solver in (solvers.dpmpp_2m(), solvers.ddim(0.4), solvers.heun(churn=9.0)):
        host = plan(solver, VP, ts)
        assert all(a.dtype == np.float64 for a in jax.tree.leaves(host))
        graph = jax.jit(plan)(solver, VP, ts)
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(graph))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), host, graph
        )
    assert host.grid.sigma[-1] == 0 and host.grid.alpha[-1] == 1


def test_grids_that_end_at_t_min_end_clean():
    for schedule in (VE, VP, FLOW):
        ts = jnp.linspace(schedule.t_max, schedule.t_min, 5)
        grid = plan(solvers.euler(), schedule, ts).grid
        assert solvers.ends_clean(schedule, ts) is True
        assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)
    assert solvers.ends_clean(VE, [1.0, 0.01]) is False
    unknown = []
    jax.make_jaxpr(lambda ts: unknown.append(solvers.ends_clean(VE, ts)))(jnp.ones(2))
    assert unknown == [None]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: solvers.ddim(1.5), "ddim: eta out of range"),
        (lambda: solvers.heun(churn=-1.0), "heun: churn out of range"),
        (lambda: solvers.ancestral(variance=2.0), "ancestral: variance out of range"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()
