"""Composition and Langevin dynamics against the product of Gaussians, one-dimensional and exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian

from lowdim_diffusion import denoisers, guidance, sampling, schedules, solvers

VP, VE, RF = schedules.VPLinear(), schedules.VE(), schedules.RectifiedFlow()
LAWS = [([0.0], [9.0]), ([-1.0], [1.0]), ([1.0], [1.0])]  # means and variances; first: no condition
PRODUCT = 9 / 17  # 1 / (1 + 1 - 1 / 9) = 0.5294


def composed(schedule, weights=None, kind=0):
    """The composition of the denoisers (kind 0) or of the log-densities (1)."""
    base, *others = [gaussian(schedule, *law)[kind] for law in LAWS]
    return guidance.compose(base, others, weights)


def test_score_is_that_of_the_powers(key, x64):
    """AND and NOT, one weight per example, against the gradient of the composed log-density."""
    x, t = jax.random.normal(key, (4, 1), float), 0.7
    weights = [jnp.array([1.0, 2.0, -0.5, 0.0]), jnp.array([1.0, -1.0, 3.0, 0.0])]
    both, density = composed(RF, weights), composed(RF, weights, kind=1)
    expected = jax.grad(lambda x: density(x, t).sum())(x)
    np.testing.assert_allclose(denoisers.score_fn(both, RF)(x, t), expected, rtol=1e-9)
    np.testing.assert_allclose(both(x, 1.0)[:, 0], [0.0, -3.0, 3.5, 0.0])  # the means


def test_samplers_alone_miss_the_product(x64):
    """Variances 0.1115 (flow) and 0.374 (reverse SDE), by the exact recursion of the moments.

    In closed form, from ``rho = sigma / alpha``: 1/9 and 91/243.
    """
    x = jnp.array([[0.0], [1.0]])
    slope = lambda out: (out[1] - out[0])[0]
    ts = schedules.log_snr_grid(VP, 200)
    flow = sampling.sample(jax.random.key(0), composed(VP), VP, ts, x, solver=solvers.heun()).x
    assert float(slope(flow) ** 2) == pytest.approx(0.1115, rel=2e-3)

    solver = solvers.ancestral()
    steps = solvers.plan(solver, VP, schedules.log_snr_grid(VP, 2000)).coefficients

    def move(var, c):
        kernel = solver.kernel(composed(VP), solvers.State(x), c)
        return slope(kernel.mean.x) ** 2 * var + kernel.std**2, None

    var, _ = jax.lax.scan(move, jnp.ones(()), jax.tree.map(jnp.asarray, steps))
    assert float(var) == pytest.approx(91 / 243, rel=8e-3)


def test_langevin_at_every_level_reaches_the_product(key):
    """One step of relative size 0.1 per level: 0.5294 / (1 - 0.05), the bias of ULA."""
    solver, grid = solvers.ancestral(), schedules.log_snr_grid(VP, 100)
    run = jax.tree.map(jnp.float32, solvers.plan(solver, VP, grid))

    def move(x, inputs):
        c, t, key = inputs
        draw = lambda j: jax.random.normal(jax.random.fold_in(key, j), x.shape)
        x = solver.step(composed(VP), solvers.State(x), c, draw).state.x
        noise = VP.sigma(t) ** 2
        var = 1 / (2 / (VP.alpha(t) ** 2 + noise) - 1 / (9 * VP.alpha(t) ** 2 + noise))
        out = guidance.langevin(
            jax.random.fold_in(key, 1), composed(VP), VP, x, t, step_size=0.1 * var
        )
        return out.x, None

    inputs = run.coefficients, run.grid.t[1:], jax.random.split(key, 100)
    inputs = jax.tree.map(lambda a: a[:99], inputs)  # the last step leads to the clean example
    x, _ = jax.lax.scan(move, jax.random.normal(key, (20000, 1)), inputs)
    assert float(jnp.var(x)) == pytest.approx(0.5573, rel=0.03)


def test_metropolis_removes_the_bias(key):
    """Large steps: ULA settles at V / (1 - eta / 2V), MALA at V."""
    t = jnp.float32(VP.t_min)
    x, eta = 0.6 * jax.random.normal(key, (20000, 1)), 0.6 * PRODUCT
    energy = composed(VP, kind=1)
    run = lambda **options: guidance.langevin(
        key, composed(VP), VP, x, t, step_size=eta, num_steps=20, **options
    )
    plain, exact = run(), run(log_prob_fn=energy)
    assert float(jnp.var(plain.x)) == pytest.approx(PRODUCT / 0.7, rel=0.03)
    assert float(jnp.var(exact.x)) == pytest.approx(PRODUCT, rel=0.03)
    assert np.all(plain.acceptance == 1) and 0.8 < float(jnp.mean(exact.acceptance)) < 0.98


def test_energy_decides_about_the_law(key):
    """MALA with the drift of another density is still exact."""
    x = jax.random.normal(key, (20000, 1))
    white, wide = lambda x, t: x / (1 + t**2), lambda x, t: -(x[:, 0] ** 2) / 4
    out = guidance.langevin(key, white, VE, x, 0.1, step_size=0.5, num_steps=40, log_prob_fn=wide)
    assert float(jnp.var(out.x)) == pytest.approx(2.0, rel=0.03)


def test_bad_input(key, unchecked):
    d, x = composed(VE), jnp.ones((3, 1))
    for args, message in (
        (([],), "at least 1"),
        (([d], [1.0, 2.0]), "one per condition, of which there are 1"),
        (([d], [float("inf")]), "weight 0"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.compose(d, *args)
    with pytest.raises(ValueError, match="condition 1 returned"):
        guidance.compose(d, [d, lambda x, t: x[:2]])(x, 1.0)
    for options, message in (
        (dict(step_size=0.0), "step_size"),
        (dict(step_size=0.1, t=0.0), "sigma"),
        (dict(step_size=0.1, t=jnp.ones(3)), "one noise level"),
        (dict(step_size=0.1, log_prob_fn=lambda x, t: x), "log_prob_fn"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.langevin(key, d, VE, x, **{"t": 1.0, **options})
