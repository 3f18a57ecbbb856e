"""Momentum methods: published limits of stability, and what beta = 1 leaves."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lowdim_diffusion import sampling, schedules, solvers

VE, VP = schedules.VE(), schedules.VPLinear()

# Real-axis limits of y' = mu y; Adams-Bashforth's times (2 - beta) / beta for the heavy ball.
LIMITS = [
    (solvers.heavy_ball(1, 0.8), -3.0),
    (solvers.heavy_ball(2, 0.8), -1.5),
    (solvers.heavy_ball(3, 0.8), -6 / 11 * 1.5),
    (solvers.heavy_ball(4, 0.5), -0.3 * 3),
    (solvers.ghvb(2, 0.8), -1.2),
    (solvers.ghvb(2, 0.5), -1.5),
    (solvers.ghvb(3, 0.8), -0.642),
    (solvers.ghvb(3, 0.5), -0.782),
    (solvers.ghvb(4, 0.8), -0.352),
    (solvers.ghvb(4, 0.5), -0.428),
]


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        pytest.param(s, z, id=f"{s.name}{z:.2f}", marks=() if i in (1, 6) else pytest.mark.slow)
        for i, (s, z) in enumerate(LIMITS)
    ],
)
def test_limit_of_stability(solver, limit, x64):
    ts = np.linspace(60.0, 50.0, 11)  # VE: t is rho, and all steps are of length 1
    plan = solvers.plan(solver, VE, ts)
    c = jax.tree.map(lambda a: jnp.asarray(a[8]), plan.coefficients)
    flat, restore = jax.flatten_util.ravel_pytree(solver.init(jnp.zeros((1, 1))))

    @jax.jit
    def companion(mu):
        denoise_fn = lambda x, t: x - t * mu * x  # eps = mu x
        step = lambda v: jax.flatten_util.ravel_pytree(
            solver.step(denoise_fn, restore(v), c, None).state
        )[0]
        return jax.jacfwd(step)(jnp.zeros(flat.size))

    growth = lambda z: max(abs(np.linalg.eigvals(np.asarray(companion(-z))))) - 1
    found = scipy.optimize.brentq(growth, 0.7 * limit, 1.4 * limit, xtol=1e-6)
    np.testing.assert_allclose(found, limit, rtol=3e-3)


@pytest.mark.parametrize("make", [solvers.heavy_ball, solvers.ghvb])
def test_beta_one_is_adams_bashforth_on_equal_steps(make, x64):
    ts = np.linspace(10.0, 1.0, 19)
    x_T = 10 * np.random.default_rng(0).standard_normal((4, 3))
    denoise_fn = lambda x, t: 0.8 * jnp.tanh(x) + 0.05 * x
    draw = jax.jit(
        lambda solver: sampling.sample(jax.random.key(0), denoise_fn, VE, ts, x_T, solver=solver).x,
        static_argnums=0,
    )
    np.testing.assert_allclose(draw(make(3, 1.0)), draw(solvers.adams_bashforth(3)), rtol=1e-9)
    assert np.abs(draw(make(3, 0.6)) - draw(make(3, 1.0))).max() > 1e-4


def test_steps_at_infinite_log_snr_are_eulers():
    c = solvers.plan(solvers.ghvb(4), schedules.RectifiedFlow(), [1.0, 0.6, 0.3, 0.0]).coefficients
    assert c.length[0] == 0 == c.length[-1] and c.length[1] < 0
    assert c.first.tolist() == [True, True, False] and (c.weights[1] == [1, 0, 0, 0]).all()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="heavy_ball: beta out of range"):
        solvers.heavy_ball(2, 0.0)
    with pytest.raises(ValueError, match="ghvb: unknown order"):
        solvers.ghvb(5)
