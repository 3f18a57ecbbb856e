"""Gradients through a run: recomputed, and by the adjoint equation; adaptive steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.linalg import random_frames

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()


def gaussian(var, schedule=VE):
    """Denoiser of N(0, diag(var))."""

    def denoise_fn(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return (a * var / (a**2 * var + s**2))[None] * x

    return denoise_fn


def mixture():
    bases = random_frames(jax.random.key(0), 2, 8, 2, dtype=jnp.float64)
    means = jnp.stack([0.6 * bases[0, :, 0], -0.6 * bases[0, :, 0]])
    return MoLRG(bases, means=means, scales=[[1.0, 0.5], [0.7, 0.7]], noise_std=0.1)


# ------------------------------------------------------------------ recomputing


@pytest.mark.parametrize(
    ("solver", "save", "remats"),
    [(solvers.heun(), "denoised", (3,)), (solvers.ancestral(), 4, (True, 20))],
    ids=["heun", "ancestral"],
)
def test_what_is_recomputed_does_not_change_anything(solver, save, remats, key):
    ts = schedules.karras_grid(11)

    def loss(var, remat):
        run = functools.partial(sampling.sample, key, gaussian(var), VE, ts, (2, 3), solver=solver)
        result = run(save=save, remat=remat)
        return jnp.sum(result.x**2) + jnp.sum(result.trajectory), result.trajectory

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    var = jnp.array([1.0, 0.5, 0.1])
    want, states = grad(var, False)
    for remat in remats:
        found, kept = grad(var, remat)
        np.testing.assert_allclose(found, want, rtol=1e-5)
        np.testing.assert_allclose(kept, states, rtol=1e-5)


WIDTH, DIM, BATCH = 256, 8, 32


def temporary_bytes(num_steps, way):
    """Of one gradient with respect to the parameters of an MLP, as XLA plans it."""
    ts = np.geomspace(80.0, 0.01, num_steps + 1)
    x_T = jnp.ones((BATCH, DIM))
    solver = solvers.bdia() if way == "bdia" else solvers.euler()

    def loss(params):
        first, last = params
        denoise_fn = lambda x, t: jnp.tanh(jnp.tanh(x @ first / (1 + t)) @ last @ first) @ last
        if way in ("adjoint", "bdia"):
            return jnp.sum(sampling.sample_adjoint(denoise_fn, VE, ts, x_T, solver=solver))
        run = functools.partial(sampling.sample, jax.random.key(0), denoise_fn, VE, ts, x_T)
        return jnp.sum(run(solver=solver, remat=way).x)

    params = jnp.ones((DIM, WIDTH)), jnp.ones((WIDTH, DIM))
    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_a_gradient():
    """Growth from 25 to 100 steps, in states."""
    state = 4 * BATCH * DIM
    growth = {
        way: (temporary_bytes(100, way) - temporary_bytes(25, way)) / state
        for way in (False, True, "adjoint")
    }
    growth["bdia"] = (temporary_bytes(100, "bdia") - temporary_bytes(25, "bdia")) / state
    growth["every 10th"] = (temporary_bytes(100, 10) - temporary_bytes(25, 5)) / state
    print("growth of memory from 25 to 100 steps, in states:", growth)
    assert growth[False] > 75 * 2 * WIDTH / DIM  # two hidden layers at every step
    assert 74 < growth[True] < 160
    assert growth["every 10th"] < 25
    assert growth["adjoint"] < 2 and growth["bdia"] < 2


# ------------------------------------------------------------------ the adjoint equation


def test_adjoint_of_a_gaussian_is_the_closed_form(x64):
    var = jnp.array([2.0, 0.5, 0.01])
    rho_T, rho_0 = 20.0, 0.05
    ts = np.geomspace(rho_T, rho_0, 201)
    x_T = jnp.array([[5.0, -11.0, 20.0]])
    run = lambda x_T, var: sampling.sample_adjoint(gaussian(var), VE, ts, x_T, solver=solvers.rk4())
    x_0, vjp = jax.jit(lambda x_T, var: jax.vjp(run, x_T, var))(x_T, var)
    by_x, by_var = vjp(jnp.ones((1, 3)))
    np.testing.assert_allclose(by_x[0], np.sqrt((var + rho_0**2) / (var + rho_T**2)), rtol=1e-5)
    exact = 0.5 * x_0[0] * (1 / (var + rho_0**2) - 1 / (var + rho_T**2))
    np.testing.assert_allclose(by_var, exact, rtol=1e-5)
    errors = (
        np.abs(by_var / exact - 1),
        np.abs(by_x[0] ** 2 * (var + rho_T**2) / (var + rho_0**2) - 1),
    )
    print("largest relative errors", [float(e.max()) for e in errors])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "end", "solver", "tol"),
    [
        pytest.param(VE, 0.0, solvers.rk4(), 1e-5, id="ve", marks=pytest.mark.slow),
        # From alpha = 0, where the solver's first step is Euler's.
        pytest.param(FLOW, 0.0, solvers.heun(), 3e-3, id="flow"),
        pytest.param(VP, 1e-2, solvers.rk4(), 1e-4, id="vp-noisy-end", marks=pytest.mark.slow),
    ],
)
def test_adjoint_of_a_mixture_is_the_gradient_of_the_scan(schedule, end, solver, tol, x64):
    p = mixture()
    ts = schedules.times_from_sigmas(schedule, np.geomspace(50.0, 0.03, 101))
    ts = np.concatenate([[schedule.t_max], ts[:-1], [0.0] if end == 0 else []])
    x_T = schedule.sigma(ts[0]) * jax.random.normal(jax.random.key(1), (6, 8))
    x_T = x_T + schedule.alpha(ts[0]) * p.sample(jax.random.key(2), 6)[0]
    target = jax.random.normal(jax.random.key(3), (6, 8))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(x_T, p, adjoint):
        def loss(x_T, p):
            run = {"solver": solver}
            if adjoint:
                x = sampling.sample_adjoint(p.denoiser(schedule), schedule, ts, x_T, **run)
            else:
                key = jax.random.key(0)
                x = sampling.sample(key, p.denoiser(schedule), schedule, ts, x_T, **run).x
            return jnp.sum((x - target) ** 2), x

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x_T, p)

    (by_x, by_p), x = gradient(x_T, p, True)
    (want_x, want_p), want = gradient(x_T, p, False)
    np.testing.assert_allclose(x, want, rtol=1e-12)
    scale = np.abs(want_x).max()
    print("error by x_T", np.abs(by_x - want_x).max() / scale)
    np.testing.assert_allclose(by_x, want_x, atol=tol * scale)
    for found, expected in zip(jax.tree.leaves(by_p), jax.tree.leaves(want_p), strict=True):
        np.testing.assert_allclose(found, expected, atol=2 * tol * np.abs(expected).max())


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(solvers.bdia(), id="bdia"),
        pytest.param(solvers.edict(), id="edict", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_reversible_solvers_are_those_of_the_run(solver, x64):
    """However coarse the grid."""
    p = mixture()
    ts = schedules.times_from_sigmas(VP, np.append(np.geomspace(50.0, 0.1, 8), 0.0))
    x_T = jax.random.normal(jax.random.key(1), (3, 8))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(x_T, p, adjoint):
        def loss(x_T, p):
            if adjoint:
                x = sampling.sample_adjoint(p.denoiser(VP), VP, ts, x_T, solver=solver)
            else:
                key = jax.random.key(0)
                x = sampling.sample(key, p.denoiser(VP), VP, ts, x_T, solver=solver).x
            return jnp.sum((x - 1) ** 2)

        return jax.grad(loss, argnums=(0, 1))(x_T, p)

    found, want = (jax.tree.leaves(gradient(x_T, p, adjoint)) for adjoint in (True, False))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(b).max())


def test_adjoint_with_labels_a_traced_grid_and_vmap(x64):
    """Whole numbers in the closure have no gradient; whether the end is clean is found later."""
    labels = jnp.array([0, 1, 1])
    x_T = 10 * jnp.ones((3, 2))

    def loss(table, ts, x_T):
        denoise_fn = lambda x, t: (x + t**2 * table[labels][:, None]) / (1 + t**2)
        return jnp.sum(sampling.sample_adjoint(denoise_fn, VE, ts, x_T, solver=solvers.dpmpp_2m()))

    grad = jax.jit(jax.grad(loss))
    for end in (0.0, 0.01):
        ts = np.append(np.geomspace(10.0, 0.02, 60), end)
        found = grad(jnp.array([0.3, -0.5]), ts, x_T)
        known = jax.jit(lambda table, ts=ts: jax.grad(loss)(table, ts, x_T))(jnp.array([0.3, -0.5]))
        np.testing.assert_allclose(found, known, rtol=1e-6)
        shrink = np.sqrt((1 + 0.02**2) / 101) / (1 + 0.02**2)
        np.testing.assert_allclose(found, (1 - shrink) * np.array([2, 4]), rtol=1e-2)
    tables = jnp.array([[0.3, -0.5], [1.0, 2.0]])
    together = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, None)))(tables, ts, x_T)
    np.testing.assert_allclose(together[0], found, rtol=1e-9)


def test_adjoint_errors(key):
    ts = schedules.karras_grid(5)
    with pytest.raises(ValueError, match=r"sample_adjoint: the solver draws noise: .*ancestral"):
        sampling.sample_adjoint(
            gaussian(jnp.ones(3)), VE, ts, jnp.ones((2, 3)), solver=solvers.ancestral()
        )
    run = functools.partial(sampling.sample, key, gaussian(jnp.ones(3)), VE, ts, (2, 3))
    with pytest.raises(ValueError, match="remat too small"):
        run(solver=solvers.euler(), remat=0)


# ------------------------------------------------------------------ steps that adapt


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow", marks=pytest.mark.slow)]
)
def test_adaptive_steps_follow_the_exact_flow(schedule, key, x64):
    pytest.importorskip("diffrax")
    var = jnp.array([2.0, 0.5, 0.0])
    calls = []

    def denoise_fn(x, t):
        jax.debug.callback(lambda t: calls.append(t), t)
        return gaussian(var, schedule)(x, t)

    ts = jnp.array([schedule.t_max, 0.02])
    run = functools.partial(sampling.sample_adaptive, key, denoise_fn, schedule, ts)
    x_T = schedule.sigma(ts[0]) * jax.random.normal(key, (4, 3))
    found = jax.jit(lambda x_T: run(x_T, tol=1e-8))(x_T)
    jax.effects_barrier()
    (a_T, a), (s_T, s) = schedule.alpha(ts), schedule.sigma(ts)
    exact = x_T * jnp.sqrt((a**2 * var + s**2) / (a_T**2 * var + s_T**2))[None]
    print(schedule, "nfe", found.nfe, "error", float(np.abs(found.x - exact).max()))
    np.testing.assert_allclose(found.x, exact, atol=1e-6)
    assert np.max(found.nfe) <= len(calls) <= 4 * np.max(found.nfe)
    alone = jax.jit(lambda x_T: run(x_T, tol=1e-8))(x_T[:1])
    np.testing.assert_allclose(alone.x, found.x[:1], rtol=1e-12)
    np.testing.assert_array_equal(alone.nfe, found.nfe[:1])
    jax.effects_barrier()
    calls.clear()
    one = jax.block_until_ready(jax.jit(lambda x_T: run(x_T, tol=1e-4))(x_T[:1]))
    jax.effects_barrier()
    print(one.nfe, len(calls))
    assert int(one.nfe[0]) == len(calls)


def test_adaptive_steps_end_on_the_denoised_example(key):
    pytest.importorskip("diffrax")
    var = jnp.array([2.0, 0.5, 0.0])
    run = functools.partial(sampling.sample_adaptive, key, gaussian(var), VE)
    shape = (4, 3)
    clean = jax.jit(lambda ts: run(ts, shape).x)(jnp.array([80.0, 0.0]))
    noisy = jax.jit(lambda ts: run(ts, shape).x)(jnp.array([80.0, 0.0021]))
    np.testing.assert_allclose(clean[:, :2], noisy[:, :2], rtol=1e-4)
    assert not clean[:, 2].any() and noisy[:, 2].all()


def test_without_diffrax_the_error_names_the_extra(key, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffrax", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"sample_adaptive: .*lowdim-diffusion\[diffrax\]"
    ):
        sampling.sample_adaptive(key, gaussian(jnp.ones(3)), VE, [80.0, 0.0], (2, 3))
