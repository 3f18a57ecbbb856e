"""Measurement guidance: one step against dense formulas, whole runs against the exact posterior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import (
    distributions,
    guidance,
    linalg,
    sampling,
    schedules,
    sharding,
    solvers,
)

VP, T = schedules.VPLinear(), 0.4
ALPHA = np.exp(-0.25 * T**2 * 19.9 - 0.05 * T)
SIGMA = np.sqrt(1 - ALPHA**2)
DIM, ROWS = 8, 3


@pytest.fixture
def case(x64):
    """A linear denoiser ``x W^T``, one step's inputs, and a measurement for each example."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(DIM, DIM)) / 4
    x_t = rng.normal(size=(2, DIM))
    x0_hat = x_t @ w.T
    eps = (x_t - ALPHA * x0_hat) / SIGMA
    a, y = rng.normal(size=(ROWS, DIM)), rng.normal(size=(2, ROWS))
    return w, x_t, x0_hat, eps, a, y


def linear(w):
    return lambda x, t: x @ w.T


def corrected(hook, x0_hat, eps, carry=None):
    out = jax.jit(hook)(jnp.asarray(x0_hat), jnp.asarray(eps), jnp.asarray(T), carry)
    return jax.tree.map(np.asarray, out[:2])


def test_dps_steps_down_the_gradient_of_the_norm(case):
    w, _, x0_hat, eps, a, y = case
    hook = guidance.dps(linear(w), VP, guidance.matrix(a), y, step=0.7)
    found, same = corrected(hook, x0_hat, eps)
    r = y - x0_hat @ a.T
    gradient = -(r / np.linalg.norm(r, axis=1, keepdims=True)) @ a @ w
    np.testing.assert_allclose(found, x0_hat - 0.7 / ALPHA * gradient, atol=1e-12)
    np.testing.assert_array_equal(same, eps)


@pytest.mark.parametrize("noise_std", [0.0, 0.4])
def test_pigdm_pulls_the_pseudo_inverse_back(case, noise_std):
    w, _, x0_hat, eps, a, y = case
    hook = guidance.pigdm(linear(w), VP, guidance.matrix(a), y, noise_std=noise_std, data_std=2.0)
    found, same = corrected(hook, x0_hat, eps)
    v = 4 * SIGMA**2 / (4 * ALPHA**2 + SIGMA**2)
    gram = a @ a.T + noise_std**2 / v * np.eye(ROWS)
    expected = x0_hat + np.linalg.solve(gram, (y - x0_hat @ a.T).T).T @ a @ w
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(same, eps)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_mmps_is_the_posterior_mean_of_a_gaussian(noise_std, x64):
    """Given x_t and y together: one measurement more."""
    rng = np.random.default_rng(1)
    p = distributions.Gaussian(rng.normal(size=DIM), rng.normal(size=(DIM, 4)), 0.1)
    a, y, x_t = rng.normal(size=(ROWS, DIM)), rng.normal(size=(2, ROWS)), rng.normal(size=(2, DIM))
    op = guidance.matrix(a)
    guided = guidance.mmps(p.denoiser(VP), VP, op, y, noise_std=noise_std, num_iters=ROWS + 3)
    mean, cov = (np.asarray(m) for m in p.moments())
    both = np.vstack([a, ALPHA * np.eye(DIM)])
    noise = np.diag([noise_std**2] * ROWS + [SIGMA**2] * DIM)
    gain = cov @ both.T @ np.linalg.inv(both @ cov @ both.T + noise)
    expected = mean + (np.hstack([y, x_t]) - mean @ both.T) @ gain.T
    np.testing.assert_allclose(jax.jit(guided)(x_t, np.full(2, T)), expected, atol=1e-9)
    options = {"noise_std": noise_std, "num_iters": ROWS, "linear_solver": "gmres"}
    guided = guidance.mmps(p.denoiser(VP), VP, op, y, **options)
    np.testing.assert_allclose(jax.jit(guided)(x_t, np.full(2, T)), expected, atol=1e-9)


def test_gmres_solves_with_a_jacobian_that_is_not_symmetric(x64):
    """Where conjugate gradients diverge."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(DIM, DIM)) + 2 * np.eye(DIM)
    y, x_t = rng.normal(size=(2, DIM)), rng.normal(size=(2, DIM))
    op, run = guidance.matrix(np.eye(DIM)), functools.partial(guidance.mmps, linear(w), VP)
    guided = lambda name: run(op, y, noise_std=0.5, num_iters=DIM, linear_solver=name)(
        jnp.asarray(x_t), T
    )
    v = SIGMA**2 / ALPHA * w.T  # what a vector-Jacobian product takes for the covariance
    x0_hat = x_t @ w.T
    solved = np.linalg.solve(v + 0.25 * np.eye(DIM), (y - x0_hat).T).T
    np.testing.assert_allclose(guided("gmres"), x0_hat + solved @ v.T, atol=1e-9)
    assert np.abs(guided("cg") - guided("gmres")).max() > 0.1


def test_ddnm_replaces_the_row_space_and_nothing_else(case):
    _, _, x0_hat, eps, a, y = case
    found, same = corrected(guidance.ddnm(VP, guidance.matrix(a), y), x0_hat, eps)
    np.testing.assert_allclose(found @ a.T, y, atol=1e-12)
    null = np.eye(DIM) - np.linalg.pinv(a) @ a
    np.testing.assert_allclose(found @ null, x0_hat @ null, atol=1e-12)
    np.testing.assert_array_equal(same, eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dds_solves_and_does_not_break_down(case, dtype):
    """Three rows: forty iterations are far beyond the rank."""
    _, _, x0_hat, eps, a, y = (None if v is None else np.asarray(v, dtype) for v in case)
    op, tolerance = guidance.matrix(a), 200 * np.finfo(dtype).eps
    pinv = np.linalg.pinv(a)
    found, same = corrected(guidance.dds(op, y, num_iters=40), x0_hat, eps)
    np.testing.assert_allclose(found, x0_hat + (y - x0_hat @ a.T) @ pinv.T, atol=tolerance)
    np.testing.assert_array_equal(same, eps)
    found, _ = corrected(guidance.dds(op, y, num_iters=40, gamma=2.0), x0_hat, eps)
    m = np.eye(DIM) + 2 * a.T @ a
    np.testing.assert_allclose(found, np.linalg.solve(m, (x0_hat + 2 * y @ a).T).T, atol=tolerance)


def test_replacement_renews_what_is_measured(x64):
    mask = np.array([1, 0, 1, 1, 0, 0, 0, 0])
    op, b = guidance.inpainting(mask), 4000
    x0_hat, eps, y = jnp.full((b, DIM), 0.5), jnp.full((b, DIM), 2.0), jnp.ones((1, 3))
    keys = sharding.example_keys(jax.random.key(0), jnp.arange(b))
    new_x0, new_eps, new_keys = jax.jit(guidance.replacement(VP, op, y))(x0_hat, eps, T, keys)
    np.testing.assert_allclose(new_x0[0], np.where(mask, 1, 0.5), atol=1e-12)
    np.testing.assert_allclose(new_eps[:, mask == 0], 2, atol=1e-12)
    inside = np.asarray(new_eps[:, mask == 1])
    assert abs(inside.mean()) < 0.05 and abs(inside.std() - 1) < 0.05
    assert not (jax.random.key_data(new_keys) == jax.random.key_data(keys)).all(1).any()


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("noise_std", [0.1, 5.0])
def test_noise_of_y_becomes_part_of_the_states(noise_std, renewed, x64):
    """True x_0 and prediction 0: the new state is at its level in every direction, whatever s."""
    b, rng = 20_000, np.random.default_rng(2)
    a = rng.normal(size=(ROWS, DIM))
    y = noise_std * rng.normal(size=(b, ROWS))
    eps = jnp.asarray(rng.normal(size=(b, DIM)))
    method = guidance.replacement if renewed else guidance.ddnm
    hook = method(VP, guidance.matrix(a), y, noise_std=noise_std)
    keys = sharding.example_keys(jax.random.key(0), jnp.arange(b))
    x0_hat, new_eps, _ = jax.jit(hook)(0 * eps, eps, T, keys)
    state = (ALPHA * x0_hat + SIGMA * new_eps) @ np.linalg.svd(a)[2].T
    np.testing.assert_allclose(state.std(0), SIGMA, rtol=0.03)
    u, s, vt = np.linalg.svd(a)
    fits = ALPHA * noise_std <= SIGMA * s
    assert fits.all() == (noise_std < 1)
    np.testing.assert_allclose((x0_hat @ vt.T)[:, :ROWS], fits * (y @ u) / s, atol=1e-9)
    if not renewed:
        left = np.sqrt(np.maximum(1 - (ALPHA * noise_std / (SIGMA * s)) ** 2, 0))
        share = np.append(np.where(fits, left, 1), np.ones(DIM - ROWS))
        np.testing.assert_allclose(new_eps @ vt.T, share * np.asarray(eps @ vt.T), atol=1e-9)


@pytest.mark.slow
def test_all_start_from_pure_noise_and_have_gradients(key):
    """Rectified flow: no signal at all at t = 1. One measurement for all, in float32."""
    flow, noise_std = schedules.RectifiedFlow(), 0.1
    p = distributions.MoLRG(linalg.random_frames(key, 2, DIM, 2), noise_std=0.1)
    denoise_fn, op = p.denoiser(flow), guidance.blur((DIM, 1, 1), np.array([[0.3], [1.0], [0.3]]))
    ts, keys = schedules.uniform_grid(flow, 3), sharding.example_keys(key, jnp.arange(4))

    def end(y):
        hooks = {
            "dps": guidance.dps(denoise_fn, flow, op, y),
            "pigdm": guidance.pigdm(denoise_fn, flow, op, y, noise_std=noise_std),
            "ddnm": guidance.ddnm(flow, op, y, noise_std=noise_std),
            "dds": guidance.dds(op, y, gamma=9.0, num_iters=2),
            "replacement": guidance.replacement(flow, op, y, noise_std=noise_std),
        }
        run = lambda fn, hook, carry=None: (
            sampling.sample(
                key,
                fn,
                flow,
                ts,
                (4, DIM, 1, 1),
                solver=solvers.ddim(),
                correct=hook,
                correct_carry=carry,
            ).x
        )
        guided = guidance.mmps(denoise_fn, flow, op, y, noise_std=noise_std)
        carry = {"replacement": keys}
        made = {name: run(denoise_fn, hook, carry.get(name)) for name, hook in hooks.items()}
        made["mmps"] = run(guided, None)
        return sum(map(jnp.sum, made.values())), made

    slope, made = jax.jit(jax.grad(end, has_aux=True))(jnp.ones((1, DIM, 1, 1)))
    for name, x in made.items():
        assert x.dtype == jnp.float32 and jnp.isfinite(x).all(), name
    assert jnp.isfinite(slope).all() and (slope != 0).all()


class G64:
    """Three subspaces of rank 4 in 64 dimensions; of each example 32 noiseless measurements."""

    def __init__(self, rows=32, num=64):
        frame_key, x_key, a_key = jax.random.split(jax.random.key(0), 3)
        scales = jnp.sqrt(jnp.array([[4, 2, 1, 0.5]])).repeat(3, 0)
        bases = linalg.random_frames(frame_key, 3, 64, 4)
        self.p = distributions.MoLRG(bases, scales=scales, noise_std=1e-3)
        self.x0 = self.p.sample(x_key, num)[0]
        self.a = jax.random.normal(a_key, (num, rows, 64)) / rows**0.5
        self.denoise_fn = self.p.denoiser(VP)

    @property
    def oracle(self):
        mean = lambda a, x: distributions.condition(self.p, a, (a @ x)[None]).mean()[0]
        return self.error(jax.jit(jax.vmap(mean))(self.a, self.x0))

    def error(self, x):
        return float(jnp.linalg.norm(x - self.x0) / jnp.linalg.norm(self.x0))

    def run(self, steps, method, *, solver=None, grid=schedules.uniform_grid, wrapped=False):
        """Error when each example is sampled with the hook ``method(operator, y)``."""
        ts = grid(VP, steps)

        def one(key, a, x0):
            op = guidance.matrix(a)
            hook, carry = method(op, op.apply(x0[None])), jax.random.split(key, 1)
            denoise_fn = self.denoise_fn
            if wrapped:
                denoise_fn = lambda x, t: hook(self.denoise_fn(x, t), x, t, None)[0]
            return sampling.sample(
                key,
                denoise_fn,
                VP,
                ts,
                (1, 64),
                solver=solver or solvers.ddim(),
                correct=None if wrapped else hook,
                correct_carry=carry,
            ).x[0]

        keys = jax.random.split(jax.random.key(1), len(self.x0))
        return self.error(jax.jit(jax.vmap(one))(keys, self.a, self.x0))


def test_dds_reaches_the_oracle_as_a_hook_only():
    """Written as a denoiser it makes the solver recompute eps: .218 published in place of .0045."""
    g, grid = G64(), schedules.log_snr_grid
    assert 1.5e-3 < g.oracle < 3.5e-3
    assert g.oracle < g.run(100, guidance.dds, grid=grid) < 1.5 * g.oracle
    assert g.run(100, guidance.dds, grid=grid, wrapped=True) > 0.1


@pytest.mark.slow
def test_dds_has_the_published_errors():
    """Published: 9.7e-2, 1.8e-2, 4.8e-3, 2.5e-3 at T = 20, 50, 100, 300; 4.0e-2 with eta .85."""
    g = G64(num=256)
    found = [g.run(steps, guidance.dds) for steps in (20, 50, 100, 300)]
    published = (9.7e-2, 1.8e-2, 4.8e-3, 2.5e-3)
    assert all(0.6 < f / p < 1.6 for f, p in zip(found, published, strict=True))
    assert found[2] < 1e-2 and g.oracle < found[3] < 1.2 * g.oracle
    assert g.run(100, guidance.dds, solver=solvers.ddim(0.85)) > 2 * found[2]
    few = G64(rows=16, num=256)
    found = [few.run(steps, guidance.dds) for steps in (20, 50, 100)]
    assert all(0.6 < f / p < 1.6 for f, p in zip(found, (0.57, 0.22, 0.05), strict=True))


@pytest.mark.slow
def test_resample_works_but_dds_is_better():
    """Published: .074 and .031 at T = 100 and 300; DDS .006 and .0025."""
    g = G64(num=256)
    solver, project = guidance.resample(), functools.partial(guidance.ddnm, VP)
    found = [g.run(steps, project, solver=solver) for steps in (100, 300)]
    assert all(0.5 < f / p < 1.5 for f, p in zip(found, (0.074, 0.031), strict=True))
    assert found[0] > 3 * g.run(100, guidance.dds)


@pytest.mark.slow
def test_replacement_improves_with_repeats():
    """Published for 32 of 64 entries in 50 steps: .152; .041 with 10 repeats; exact .0024."""
    g = G64(num=256)
    mask = np.random.default_rng(0).permutation(64) < 32
    g.a = jnp.broadcast_to(guidance.inpainting(mask).matrix(), (256, 32, 64))
    replace = functools.partial(guidance.replacement, VP)
    solver = solvers.ancestral()
    found = [g.run(50, replace, solver=guidance.repeated(solver, r)) for r in (1, 2, 5, 10)]
    assert found[0] > found[1] > found[2] > 0.9 * found[3] and 0.1 < found[0] < 0.2
    assert g.oracle < found[3] < 0.06


def test_repeated_counts_its_evaluations_and_refuses_memory():
    """All data at 0: whatever the way back and forth, the state is sigma times a normal."""
    ts, zero, key = [0.9, 0.8, 0.5, T], lambda x, t: 0 * x, jax.random.key(0)
    run = lambda ts, solver: sampling.sample(key, zero, VP, ts, (4000, 1), solver=solver)
    result = run(ts, guidance.repeated(solvers.ddim(0.5), 3))
    assert result.nfe == 3 * 3 and float(result.x.std()) == pytest.approx(SIGMA, rel=0.04)
    assert run([*ts, 0.0], guidance.repeated(solvers.ddim(), 3)).nfe == 3 * 3 + 1
    with pytest.raises(ValueError, match="remembers steps"):
        run(ts, guidance.repeated(solvers.dpmpp_2m(), 2))


def test_resample_weighs_as_in_the_paper(x64):
    """The share of the corrected prediction; without trust in it, DDIM."""
    ts = np.array([0.9, 0.5, 0.2])
    a = np.exp(-0.25 * ts**2 * 19.9 - 0.05 * ts) ** 2  # the paper's bar alpha
    var = 40 * (1 - a[1:]) / (1 - a[:-1]) * (1 - a[:-1] / a[1:])
    trust = solvers.plan(guidance.resample(), VP, ts).coefficients.trust
    np.testing.assert_allclose(trust, var / (var + 1 - a[1:]), rtol=1e-12)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, DIM)))
    hook = guidance.ddnm(VP, guidance.matrix(np.eye(3, DIM)), jnp.ones((1, 3)))
    run = lambda solver, hook: (
        sampling.sample(
            jax.random.key(0), lambda x, t: 0.3 * x, VP, ts, x, solver=solver, correct=hook
        ).x
    )
    untrusted, plain = run(guidance.resample(0.0), hook), run(solvers.ddim(), None)
    np.testing.assert_allclose(untrusted, plain, atol=1e-12)


BAD = {
    "y": (lambda op: guidance.dds(op, jnp.ones((2, 5))), "dds: wrong shape of y"),
    "unbatched": (lambda op: guidance.ddnm(VP, op, jnp.ones(3)), r"y\[None\]"),
    "noise": (
        lambda op: guidance.mmps(linear(1), VP, op, jnp.ones((1, 3)), noise_std=-1.0),
        "noise_std out of range",
    ),
    "step": (lambda op: guidance.dps(linear(1), VP, op, jnp.ones((1, 3)), step=0.0), "step out of"),
    "gamma": (lambda op: guidance.dds(op, jnp.ones((1, 3)), gamma=-1.0), "gamma out of range"),
    "repeats": (lambda op: guidance.repeated(solvers.ddim(), 0), "num_repeats too small"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, unchecked):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make(guidance.matrix(np.eye(3, DIM)))


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [((4, DIM + 1), 1, "measurement operator of another shape"), ((4, DIM), 3, "1 or 4, got 3")],
)
def test_measurement_has_to_fit_the_examples(shape, count, message, unchecked):
    hook = guidance.dds(guidance.matrix(np.eye(3, DIM)), jnp.ones((count, 3)))
    with pytest.raises(ValueError, match=message):
        ts = schedules.uniform_grid(VP, 2)
        key, solver = jax.random.key(0), solvers.ddim()
        sampling.sample(key, lambda x, t: x, VP, ts, shape, solver=solver, correct=hook)


def test_denoiser_has_to_keep_the_shape(unchecked):
    op = guidance.matrix(np.eye(3, DIM))
    guided = guidance.mmps(lambda x, t: x[:, :2], VP, op, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="mmps: x_t has shape"):
        guided(jnp.ones((2, DIM)), 0.5)
