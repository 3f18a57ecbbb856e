"""The driver: randomness, what is kept, hooks, tracing, gradients, devices, inversion, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_solver import ALL, STOCHASTIC

from lowdim_diffusion import sampling, schedules, sharding, solvers
from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.linalg import random_frames

VE, VP = schedules.VE(), schedules.VPLinear()
COSINE, FLOW = schedules.VPCosine(), schedules.RectifiedFlow()
TS = np.asarray(schedules.karras_grid(6))


def for_solvers(*names):
    return pytest.mark.parametrize("solver", [ALL[name] for name in names], ids=names)


def slow(value, name):
    return pytest.param(value, marks=pytest.mark.slow, id=name)


def white(x, t):
    """Denoiser of N(0, I) under VE."""
    return x / (1 + t**2)


def tilted(schedule, scale):
    """Denoiser of N((1, ..., 1), scale^2 I)."""

    def denoise_fn(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return 1 + alpha * scale**2 / (alpha**2 * scale**2 + sigma**2) * (x - alpha)

    return denoise_fn


def sample(key, shape=(6, 3), *, denoise_fn=white, schedule=VE, ts=TS, solver=ALL["heun"], **kw):
    return sampling.sample(key, denoise_fn, schedule, ts, shape, solver=solver, **kw)


def draw(key, *args, **kwargs):
    """One run, compiled as a whole."""
    return jax.jit(lambda key: sample(key, *args, **kwargs))(key)


# ------------------------------------------------------------------ randomness and batches


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(s, id=name) if name in ("heun_churn", "langevin") else slow(s, name)
        for name, s in STOCHASTIC.items()
    ],
)
def test_samples_do_not_depend_on_the_split(solver, key):
    whole = draw(key, solver=solver).x
    part = jax.jit(lambda index: sample(key, (2, 3), solver=solver, index=index).x)
    parts = [part(jnp.arange(i, i + 2)) for i in (0, 2, 4)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(whole))) == whole.size


@for_solvers("heun", "ancestral")
def test_blocks_and_devices_do_not_change_samples(solver, key):
    whole = draw(key, (19, 3), solver=solver, save="all")

    def batched(size, mesh=None):
        run = functools.partial(sampling.sample_batched, solver=solver, save="all", mesh=mesh)
        return jax.jit(lambda key: run(key, white, VE, TS, (19, 3), batch_size=size))(key)

    if solver.stochastic:
        results = {f"{d} devices": batched(8, sharding.data_mesh(d)) for d in (2, 8)}
    else:
        results = {f"batch {b}": batched(b) for b in (4, 64)}
    for name, result in results.items():
        assert result.trajectory.shape == (7, 19, 3), name
        for got, want in ((result.x, whole.x), (result.trajectory, whole.trajectory)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(result.ts, TS)
        assert result.nfe == whole.nfe


def test_blocks_take_starts_and_conditions(key):
    x_T = 80 * jax.random.normal(key, (5, 3))
    labelled = lambda x, t, label: label[:, None] + 0 * x
    run = functools.partial(sampling.sample_batched, solver=ALL["euler"], batch_size=2)
    for mesh in (None, sharding.data_mesh(2)):
        result = run(key, labelled, VE, TS, x_T, cond=jnp.arange(5), mesh=mesh)
        np.testing.assert_allclose(result.x, np.arange(5.0)[:, None] * np.ones(3))
    plain = run(key, white, VE, TS, x_T)
    np.testing.assert_allclose(plain.x, draw(key, x_T, solver=ALL["euler"]).x, rtol=1e-5)


def test_initial_noise_has_the_schedules_scale(key):
    for schedule, t in ((VE, 80.0), (VP, 1.0), (FLOW, 1.0), (VE, 5.0)):
        noise = sampling.initial_noise(key, schedule, t, (400, 20))
        std = float(schedule.sigma(t))
        assert abs(float(noise.std()) - std) < 5 * std / np.sqrt(2 * 8000)
    x_T = sampling.initial_noise(key, VE, 5.0, (6, 3))
    a, b = draw(key, ts=[5.0, 1.0]).x, draw(key, x_T, ts=[5.0, 1.0]).x
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_x_T_is_taken_as_it_is_and_the_key_is_not_used(key):
    x_T = jnp.ones((2, 4, 4, 1))
    a, b = (draw(k, x_T, save="all") for k in (key, jax.random.key(9)))
    np.testing.assert_array_equal(a.trajectory[0], x_T)
    np.testing.assert_array_equal(a.x, b.x)
    assert a.x.shape == x_T.shape


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("solver", [ALL["heun"], slow(ALL["ancestral"], "ancestral")])
def test_save_policies_agree(solver, key):
    final, states = draw(key, solver=solver), draw(key, solver=solver, save="all")
    assert final.trajectory is None and final.ts is None
    assert states.trajectory.shape == (7, 6, 3)
    np.testing.assert_allclose(states.ts, TS)
    np.testing.assert_allclose(states.trajectory[-1], states.x)
    np.testing.assert_allclose(final.x, states.x, rtol=1e-5)
    for k, kept in ((2, [0, 2, 4, 6]), (4, [0, 4, 6])):
        some = draw(key, solver=solver, save=k)
        np.testing.assert_allclose(some.trajectory, states.trajectory[np.array(kept)], rtol=1e-5)
        np.testing.assert_allclose(some.ts, TS[kept])
    denoised = draw(key, solver=solver, save="denoised")
    assert denoised.trajectory.shape == (6, 6, 3)
    np.testing.assert_allclose(denoised.ts, TS[:-1])
    np.testing.assert_allclose(denoised.trajectory[-1], denoised.x, rtol=1e-5)  # clean end
    want = jax.vmap(white)(states.trajectory[:-1], states.ts[:-1])
    np.testing.assert_allclose(denoised.trajectory, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "save"),
    [("heun", "final"), ("heun", 1000), ("unipc_3", "final")]
    + [
        pytest.param(name, "final", marks=pytest.mark.slow)
        for name in ALL
        if name not in ("heun", "unipc_3")
    ],
)
def test_memory_does_not_grow_with_steps(name, save, key):
    def temporary_bytes(num_steps, save):
        ts = schedules.karras_grid(num_steps)
        options = {"ts": ts, "save": save, "solver": ALL[name]}
        run = jax.jit(lambda key: sample(key, (16, 4096), **options).x)
        return run.lower(key).compile().memory_analysis().temp_size_in_bytes

    one_state = 16 * 4096 * 4
    few, many = temporary_bytes(10, save), temporary_bytes(500, save)
    assert many - few < one_state


def test_deterministic_steps_draw_nothing(key):
    """From given starts the program has no random operation; a stochastic one has."""
    x_T = jnp.ones((4, 3))
    for name in ("heun", "dpm_3", "dpmpp_3m", "deis_3", "unipc_3", "ghvb_2", "bdia", "ancestral"):
        solver = ALL[name]
        run = lambda key, solver=solver: sample(key, x_T, ts=TS, solver=solver).x
        program = str(jax.make_jaxpr(run)(key))
        assert ("random_bits" in program) == solver.stochastic, name


NFE = {"heun": 11, "heun_churn": 11, "dpm_3": 16, "rk4": 21, "sde_heun": 11, "langevin": 11}
NFE |= {"midpoint": 11, "dpm_2": 11, "edict": 12}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("heun", "langevin", "edict")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL
    ],
)
def test_nfe_is_the_number_of_calls(name, key):
    calls = []

    def counting(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return white(x, t)

    def run(ts):
        return sample(key, denoise_fn=counting, ts=ts, solver=ALL[name])

    evals, traced = ALL[name].num_evals, name == "heun"
    cases = [(NFE.get(name, 6), lambda: run(TS)), (4 * evals, lambda: run(TS[:-2]))]
    cases += [(6 * evals, lambda: jax.jit(run)(TS))] if traced else []
    for expected, call in cases:
        result = jax.block_until_ready(call() if traced else jax.jit(call)())
        jax.effects_barrier()
        assert isinstance(result.nfe, int)
        assert result.nfe == len(calls) == expected
        calls.clear()


# ------------------------------------------------------------------ tracing and transformations


QUICK = ("ddim_half", "heun_churn", "dpmpp_2m", "unipc_2", "sde_heun")


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, id=name) if name in QUICK else slow(s, name) for name, s in ALL.items()],
)
@pytest.mark.parametrize(
    "schedule",
    [pytest.param(FLOW, id="flow"), slow(VE, "ve"), slow(VP, "vp"), slow(COSINE, "cosine")],
)
def test_traced_numbers_give_the_same_samples_and_finite_gradients(solver, schedule, key):
    """From t_max (alpha = 0 for rectified flow) to a clean end, with everything traced."""
    ts = np.append(np.linspace(schedule.t_max, schedule.t_max / 9, 6), 0).astype(np.float32)
    x_T = schedule.sigma(ts[0]) * jax.random.normal(key, (4, 3))

    def run(scale, x_T, ts, solver, schedule):
        denoise_fn = tilted(schedule, scale)
        x = sample(key, x_T, denoise_fn=denoise_fn, schedule=schedule, ts=ts, solver=solver).x
        return jnp.sum(x**2), x

    known = jax.jit(lambda: run(0.7, x_T, ts, solver, schedule)[1])()
    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, traced = gradient(0.7, x_T, ts, solver, schedule)
    np.testing.assert_allclose(traced, known, rtol=2e-3, atol=2e-4)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
    assert abs(gradients[0]) > 1e-3


def test_gradient_of_a_sample_matches_a_finite_difference(x64):
    ts = np.asarray(schedules.karras_grid(6), np.float64)

    @jax.jit
    @jax.value_and_grad
    def value(scale):
        return jnp.sum(sample(jax.random.key(0), denoise_fn=tilted(VE, scale), ts=ts).x ** 2)

    h = 1e-5
    numerical = (value(1.3 + h)[0] - value(1.3 - h)[0]) / (2 * h)
    np.testing.assert_allclose(value(1.3)[1], numerical, rtol=1e-6)


def test_new_numbers_do_not_retrace():
    traces = []

    @jax.jit
    def run(key, ts, schedule, solver):
        traces.append(1)
        return sample(key, ts=ts, schedule=schedule, solver=solver).x

    for i, (eta, sigma_max) in enumerate(((0.3, 80.0), (0.9, 70.0), (1.0, 60.0))):
        ts = schedules.karras_grid(6, sigma_max=sigma_max)
        run(jax.random.key(i), ts, schedules.VE(sigma_max=sigma_max), solvers.ddim(eta))
    assert len(traces) == 1

    static = jax.jit(sampling.sample, static_argnums=(1, 4), static_argnames=("solver", "save"))
    for seed in range(3):  # every time a new, equal solver
        static(jax.random.key(seed), white, VE, TS, (2, 3), solver=solvers.heun(), save="all")
    assert static._cache_size() == 1


EVERY = [
    pytest.param(s, id=name) if name == "ancestral" else slow(s, name) for name, s in ALL.items()
]


@pytest.mark.parametrize("solver", EVERY)
def test_vmap_over_runs_equals_a_loop(solver):
    keys = jax.random.split(jax.random.key(3), 3)
    run = lambda k: sample(k, solver=solver, save=3).trajectory
    together, one = jax.jit(jax.vmap(run))(keys), jax.jit(run)
    np.testing.assert_allclose(together, [one(k) for k in keys], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", EVERY)
def test_runs_under_pmap(solver, key):
    index = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    parts = jax.pmap(lambda i: sample(key, (2, 3), solver=solver, index=i).x)(index)
    whole = draw(key, (8, 3), solver=solver).x
    np.testing.assert_allclose(parts.reshape(8, 3), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())
def test_dtypes(solver):
    def dtype(shape_or_x_T, denoise_fn=white):
        run = lambda key: sample(key, shape_or_x_T, denoise_fn=denoise_fn, solver=solver).x
        return jax.eval_shape(run, jax.random.key(0)).dtype

    low = lambda x, t: white(x, t).astype(jnp.bfloat16)
    assert dtype((6, 3), low) == dtype(jnp.ones((2, 3), jnp.bfloat16)) == jnp.float32
    with jax.enable_x64(True):
        assert dtype((6, 3)) == jnp.float64
        assert dtype(jnp.ones((2, 3), jnp.float32)) == jnp.float32


# ------------------------------------------------------------------ the correction hook


@for_solvers("heun", "ancestral")
def test_an_idle_hook_changes_nothing_and_carries(solver, key):
    def count(x0_hat, eps, t, carry):
        return x0_hat, eps, carry + 1

    hook = {"solver": solver, "correct": count, "correct_carry": 0}
    hooked = draw(key, **hook)
    np.testing.assert_allclose(hooked.x, draw(key, solver=solver).x, rtol=1e-6)
    assert hooked.carry == hooked.nfe
    traced = jax.jit(lambda ts: sample(key, ts=ts, **hook))(TS)
    assert traced.carry == hooked.nfe  # the call without effect does not count


@for_solvers("heun", "dpmpp_2m", "ddim_half")
def test_a_constraint_on_the_prediction_holds_for_the_sample(solver, key):
    def pin(x0_hat, eps, t, carry):
        return x0_hat.at[:, 0].set(7.0), eps, carry

    result = draw(key, solver=solver, correct=pin, save="denoised")
    np.testing.assert_allclose(result.x[:, 0], 7.0)
    np.testing.assert_allclose(result.trajectory[..., 0], 7.0)
    assert np.abs(result.x[:, 1:] - 7).min() > 1


def test_decomposed_sampling_needs_the_unmodified_noise(x64):
    """Data consistency as a hook against the same as a denoiser, which recomputes eps (DDS)."""
    p = MoLRG(
        random_frames(jax.random.key(5), 3, 64, 4, dtype=jnp.float64),
        scales=jnp.tile(jnp.sqrt(jnp.array([[4.0, 2.0, 1.0, 0.5]])), (3, 1)),
        noise_std=1e-3,
    )
    a = jax.random.normal(jax.random.key(6), (32, 64)) / np.sqrt(32)
    truth, _ = p.sample(jax.random.key(7), 64)
    y = truth @ a.T

    def consistent(x0):
        """Five steps of conjugate gradients on A^T A x = A^T y from x0."""

        def iterate(_, carry):
            x0, residual, direction, norm = carry
            image = direction @ a.T
            step = norm / jnp.maximum(jnp.sum(image**2, -1, keepdims=True), 1e-300)
            x0, residual = x0 + step * direction, residual - step * (image @ a)
            old, norm = norm, jnp.sum(residual**2, -1, keepdims=True)
            return x0, residual, residual + norm / jnp.maximum(old, 1e-300) * direction, norm

        residual = (y - x0 @ a.T) @ a
        start = (x0, residual, residual, jnp.sum(residual**2, -1, keepdims=True))
        return jax.lax.fori_loop(0, 5, iterate, start)[0]

    ts = np.append(np.linspace(1, 1e-2, 100), 0.0)
    denoise_fn = p.denoiser(VP)

    def error(**kwargs):
        run = {"schedule": VP, "ts": ts, "solver": ALL["euler"]} | kwargs
        x = draw(jax.random.key(8), truth.shape, **run).x
        return float(jnp.linalg.norm(x - truth) / jnp.linalg.norm(truth))

    hook = lambda x0_hat, eps, t, carry: (consistent(x0_hat), eps, carry)
    kept = error(denoise_fn=denoise_fn, correct=hook)
    recomputed = error(denoise_fn=lambda x, t: consistent(denoise_fn(x, t)))
    print(f"NRMSE eps kept {kept:.4f}, eps recomputed {recomputed:.4f}")
    assert kept < 1e-2
    assert recomputed > 10 * kept


# ------------------------------------------------------------------ inversion


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(VE, id="ve"),
        slow(FLOW, "flow"),
        slow(VP, "vp"),
        slow(COSINE, "cosine"),
    ],
)
def test_inversion_of_a_mixture_and_back(schedule, key):
    p = MoLRG(random_frames(key, 3, 24, 4, orthogonal=True))
    x_0, _ = p.sample(jax.random.key(1), 128)
    ts = schedules.times_from_sigmas(schedule, jnp.geomspace(60.0, 2e-3, 61))
    run = {"denoise_fn": p.denoiser(schedule), "schedule": schedule, "ts": ts}

    @jax.jit
    def round_trip(x_0):
        x_T = sampling.invert(x_0=x_0, solver=ALL["heun"], **run)
        return x_T, sample(key, x_T, **run).x

    x_T, back = round_trip(x_0)
    error = np.linalg.norm(back - x_0) / np.linalg.norm(x_0)
    print(f"round trip {error:.2e}")
    assert error < 1e-3
    # Far from the data: along its subspace an example grows by about sqrt(1 + 60^2).
    assert np.linalg.norm(x_T) > 30 * np.linalg.norm(x_0) * float(schedule.alpha(ts[0]))


@for_solvers("euler", "heun", "dpmpp_2m")
def test_inversion_converges_to_the_exact_flow(solver, x64):
    """For N(1, scale^2 I) the flow scales by the ratio of standard deviations."""
    x_0 = 1 + 0.7 * jax.random.normal(jax.random.key(1), (32, 2))
    exact = 1 + np.sqrt((0.49 + 400) / 0.49) * (np.asarray(x_0) - 1)
    errors = []
    for num_steps in (50, 100):
        ts = np.asarray(schedules.karras_grid(num_steps, 0.05 / num_steps, 20.0), np.float64)
        invert = functools.partial(sampling.invert, tilted(VE, 0.7), VE, ts, solver=solver)
        errors.append(np.linalg.norm(jax.jit(invert)(x_0) - exact) / np.linalg.norm(exact))
    slope = np.log2(errors[0] / errors[1])
    print(solver.name, errors, slope)
    assert slope > solver.order - 0.3
    assert errors[1] < (0.1 if solver.order == 1 else 3e-3)


@for_solvers("heun", "dpmpp_2m")
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_inversion_along_a_traced_grid(solver, end, x64):
    x_0 = 1 + 0.7 * jax.random.normal(jax.random.key(1), (4, 2))
    ts = np.append(np.geomspace(20.0, 0.2, 10), end)
    run = lambda ts: sampling.invert(tilted(VE, 0.7), VE, ts, x_0, solver=solver)
    np.testing.assert_allclose(jax.jit(run)(ts), jax.jit(lambda: run(ts))(), rtol=1e-9)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"ts": [0.0, 1.0, 2.0]}, r"sample: ts must decrease: .*reverse it with ts\[::-1\]"),
        ({"ts": [3.0, 1.0, 1.0]}, r"ts\[1\] = 1, ts\[2\] = 1"),
        ({"ts": [1.0]}, r"wrong shape of ts: .* got \(1,\)"),
        ({"ts": np.ones((2, 2))}, "wrong shape of ts"),
        ({"ts": [1.0, np.nan]}, "not finite"),
        ({"ts": [90.0, 1.0]}, r"leaves the schedule's range: .*raise its sigma_max"),
        ({"ts": TS, "schedule": VP}, "leaves the schedule's range: .*times_from_sigmas"),
        ({"ts": [1.0, -0.1]}, r"range: expected ts\[-1\] >= 0, got -0.1"),
        ({"save": "last"}, "unknown save: expected 'final', 'all', 'denoised' or an integer"),
        ({"save": 0}, "save too small"),
        ({"shape": (6,)}, r"wrong shape: expected \(b, \*data\)"),
        ({"shape": np.ones(3, np.float32)}, "wrong shape of x"),
        ({"index": jnp.arange(4)}, "wrong shape of index"),
        (
            {"denoise_fn": lambda x, t: jnp.ones((6, 4))},
            r"sample: x_t has shape \(6, 3\) but denoise_fn returned \(6, 4\); check the network",
        ),
        (
            {"correct": lambda x0, eps, t, carry: (x0[:1], eps, carry)},
            r"x0_hat has shape \(6, 3\) but correct returned \(1, 3\)",
        ),
    ],
)
def test_errors_of_sample(kwargs, match, key):
    with pytest.raises(ValueError, match=match):
        sample(key, **kwargs)


def test_other_errors(key):
    with pytest.raises(TypeError, match="floating array"):
        sample(key, jnp.ones((6, 3), jnp.int32))
    x_0 = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="the start is not a state of this solver: expected what"):
        sample(key, solvers.State(x_0), solver=ALL["dpmpp_2m"])
    with pytest.raises(ValueError, match=r"invert: the solver draws noise: .*got ancestral"):
        sampling.invert(white, VE, TS, x_0, solver=ALL["ancestral"])
    with pytest.raises(ValueError, match="invert: ts must decrease"):
        sampling.invert(white, VE, TS[::-1], x_0, solver=ALL["heun"])
    batched = functools.partial(
        sampling.sample_batched, key, white, VE, TS, (9, 3), solver=ALL["euler"], batch_size=3
    )
    with pytest.raises(ValueError, match="devices must divide the batch size"):
        batched(mesh=sharding.data_mesh(2))
    with pytest.raises(ValueError, match="wrong shape of cond"):
        batched(cond=jnp.arange(4))
