"""Soft value-based decoding against a tilted mixture that is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian

from lowdim_diffusion import distributions, guidance, sampling, schedules, solvers

VP, RF = schedules.VPLinear(), schedules.RectifiedFlow()
TEMPERATURE, STD = 0.5, 0.3
TILTED = np.array([0.009, 0.685, 0.306])
CENTERS = np.array([[-1.0, 0.0], [1.0, -1.5], [1.157, 1.5]])


def mixture(weights, centers):
    frames = jnp.broadcast_to(jnp.eye(2), (3, 2, 2))
    scales = jnp.full((3, 2), STD)
    return distributions.MoLRG(frames, jnp.array(weights), jnp.array(centers), scales)


def base_weights():
    """exp(-r / tau) times the tilted weights: those of the law before the reward ``x[0]``."""
    w = TILTED * np.exp(-CENTERS[:, 0] / TEMPERATURE)
    return w / w.sum()


BASE = mixture(base_weights(), CENTERS)
GOAL = mixture(TILTED, CENTERS + np.array([STD**2 / TEMPERATURE, 0.0]))
REWARD = lambda x: x[:, 0]


def exact_value(x, t):
    """tau log E[exp(r / tau) | x_t], up to a constant: Bayes' rule with both noisy densities."""
    levels = VP.alpha(t), VP.sigma(t)
    return TEMPERATURE * (GOAL.log_prob(x, *levels) - BASE.log_prob(x, *levels))


def modes(x):
    """Share of the samples at each centre."""
    near = jnp.argmin(jnp.linalg.norm(x[:, None] - jnp.array(CENTERS)[None], axis=-1), axis=1)
    return jnp.bincount(near, length=3) / len(x)


def distance(x):
    """Total variation of the mode weights from the tilted ones."""
    return float(0.5 * jnp.sum(jnp.abs(modes(x) - TILTED)))


def draw_samples(value_fn, *, num=2000, steps=100, **options):
    solver = guidance.svdd(solvers.ancestral(), value_fn, **options)
    ts = schedules.log_snr_grid(VP, steps)
    denoise_fn = BASE.denoiser(VP)
    return sampling.sample(jax.random.key(0), denoise_fn, VP, ts, (num, 2), solver=solver)


MEAN_VALUE = guidance.posterior_mean_value(BASE.denoiser(VP), REWARD)


def test_fixture():
    """The base law times exp(r / tau) is the goal, up to its constant."""
    x = jax.random.normal(jax.random.key(1), (20, 2))
    gap = GOAL.log_prob(x) - BASE.log_prob(x) - REWARD(x) / TEMPERATURE
    np.testing.assert_allclose(gap - gap[0], np.zeros(20), atol=2e-4)
    assert TILTED @ (CENTERS[:, 0] + STD**2 / TEMPERATURE) == pytest.approx(1.210, abs=5e-4)


def test_one_step_chooses_by_softmax(key):
    """Many examples with the same proposals: shares proportional to exp(v / tau)."""
    num, proposals = 20000, jnp.array([[0.5], [-1.0], [0.0], [2.0]])
    solver = guidance.svdd(
        solvers.ancestral(), lambda x, t: x[:, 0], num_proposals=4, temperature=0.8
    )
    run = solvers.plan(solver, VP, [0.6, 0.3, 0.0])
    c = jax.tree.map(lambda a: jnp.float32(a[0]), run.coefficients)

    def draw(j):
        noise = jax.random.normal(jax.random.fold_in(key, j), (num, 1))
        return jnp.where(j < 4, jnp.broadcast_to(proposals[jnp.minimum(j, 3)], (num, 1)), noise)

    x = solver.step(lambda x, t: 0 * x, solvers.State(jnp.zeros((num, 1))), c, draw).state.x
    made = proposals[:, 0] * c.solver.std
    shares = [float(jnp.mean(jnp.isclose(x[:, 0], value))) for value in made]
    np.testing.assert_allclose(shares, jax.nn.softmax(made / 0.8), atol=0.012)
    greedy = guidance.svdd(
        solvers.ancestral(), lambda x, t: x[:, 0], num_proposals=4, temperature=0.0
    )
    c = jax.tree.map(lambda a: jnp.float32(a[0]), solvers.plan(greedy, VP, [0.6, 0.3, 0.0]))
    x = greedy.step(
        lambda x, t: 0 * x, solvers.State(jnp.zeros((num, 1))), c.coefficients, draw
    ).state.x
    np.testing.assert_allclose(x, jnp.full((num, 1), made[3]))


def test_exact_value_reaches_the_tilted_law():
    """With 10 proposals; 1 is the base law, whose distance is 0.34."""
    result = jax.jit(
        lambda: draw_samples(exact_value, num=1000, steps=60, num_proposals=10, temperature=0.5)
    )()
    assert distance(result.x) < 0.05
    assert float(jnp.mean(result.x[:, 0])) == pytest.approx(1.14, abs=0.08)


@pytest.mark.slow
def test_proposals_against_bias():
    """The exact value's error falls with M, that of r(E[x_0 | x_t]) stays; arg-max has one mode.

    Distances in the order of Li et al. 2024 (arXiv 2408.08252): 0.185 .. 0.005 for M = 2 .. 50, and
    about 0.05 at all M, on another mixture with the same tilted weights and mean reward.
    """

    def run(fn, m, tau=TEMPERATURE):
        return jax.jit(lambda: draw_samples(fn, num_proposals=m, temperature=tau).x)()

    exact = [distance(run(exact_value, m)) for m in (2, 10, 50)]
    assert exact == sorted(exact, reverse=True) and exact[0] > 0.08 and exact[-1] <= 0.02
    assert 0.04 < distance(run(MEAN_VALUE, 10)) < 0.08
    greedy = run(exact_value, 10, 0.0)
    assert float(jnp.max(modes(greedy))) > 0.99 and float(jnp.mean(greedy[:, 0])) > 3


@pytest.mark.slow
def test_contract(key):
    """One proposal is the solver itself; equal calls, equal solvers; evaluations are counted."""
    ts, (d, _) = jnp.array([1.0, 0.5, 0.1, 0.0]), gaussian(RF, [0.3, -0.2], [1.0, 0.5])
    value = guidance.posterior_mean_value(d, REWARD)
    run = lambda solver, **o: sampling.sample(key, d, RF, ts, (6, 2), solver=solver, **o)
    plain = run(solvers.ancestral())
    one = run(guidance.svdd(solvers.ancestral(), value, num_proposals=1))
    np.testing.assert_allclose(one.x, plain.x, rtol=1e-5, atol=1e-6)  # alpha = 0 at the start
    a, b = (guidance.svdd(solvers.ancestral(), value, num_proposals=3) for _ in range(2))
    assert a == b and hash(a) == hash(b)

    traces = []

    @jax.jit
    def compiled(solver, ts):
        traces.append(1)
        return sampling.sample(key, d, RF, ts, (6, 2), solver=solver)

    results = [
        compiled(guidance.svdd(solvers.ancestral(), value, num_proposals=3, temperature=tau), ts)
        for tau in (1.0, 0.5)
    ]
    assert len(traces) == 1 and np.all(np.isfinite(results[0].x))
    known = run(a)
    np.testing.assert_allclose(results[0].x, known.x, rtol=1e-4, atol=1e-5)
    assert known.nfe == 2 * (1 + 3) + 1
    half = sampling.sample(key, d, RF, ts, (3, 2), solver=a, index=jnp.arange(3, 6))
    np.testing.assert_allclose(half.x, known.x[3:], rtol=1e-5, atol=1e-6)
    shifted = run(a, correct=lambda x0, eps, t, carry: (x0 + 1, eps, carry + 1), correct_carry=0)
    assert int(shifted.carry) == 3 and not np.allclose(shifted.x, known.x)


@pytest.mark.slow
def test_wrappers_draw_their_own_noise(key):
    """No number that the inner solver draws is drawn again by a solver around it."""
    inner = guidance.svdd(solvers.ancestral(), lambda x, t: x[:, 0], num_proposals=5)
    asked = []

    def draw(j):
        noise = lambda j: jax.random.normal(jax.random.fold_in(key, j), (2, 2))
        jax.debug.callback(lambda j: asked.append(int(j)), j)
        return noise(j)

    for outer in (solvers.predictor_corrector(inner, num_moves=2), guidance.repeated(inner, 3)):
        c = jax.tree.map(lambda a: jnp.float32(a[0]), solvers.plan(outer, VP, [0.6, 0.3, 0.1]))
        asked.clear()
        outer.step(lambda x, t: x, solvers.State(jnp.ones((2, 2))), c.coefficients, draw)
        jax.effects_barrier()
        assert len(set(asked)) == len(asked) and max(asked) < outer.num_draws


def test_bad_input(key, unchecked):
    value = lambda x, t: x[:, 0]
    for solver, options, message in (
        (solvers.heun(churn=1.0), {}, "no kernel"),
        (solvers.euler(), {}, "no kernel"),
        (solvers.ancestral(), dict(num_proposals=0), "num_proposals"),
        (solvers.ancestral(), dict(temperature=-1.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.svdd(solver, value, **options)
    wrong = guidance.svdd(solvers.ancestral(), lambda x, t: x, num_proposals=2)
    with pytest.raises(ValueError, match="what value_fn returned"):
        sampling.sample(key, lambda x, t: x, VP, [1.0, 0.5, 0.1], (3, 2), solver=wrong)
