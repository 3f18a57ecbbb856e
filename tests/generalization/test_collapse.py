"""Loops of models against the theory of linear regression, Wishart moments and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma

from lowdim_diffusion import generalization

DIM, COUNT, GENERATIONS, REPEATS = 20, 100, 20, 400


def regression(mix, *, shared):
    """Mean squared errors of least squares per generation, in units of the first's."""

    def errors(key):
        inputs = jax.random.normal(jax.random.fold_in(key, 1), (COUNT, DIM))

        def sample(key, w, num):
            keys = jax.random.split(key)
            x = inputs if shared else jax.random.normal(keys[0], (num, DIM))
            return x, x @ w + jax.random.normal(keys[1], (num,))

        def fit(key, examples, weights):
            x, y = examples
            weighted = x * weights[:, None]
            return jnp.linalg.solve(weighted.T @ x, weighted.T @ y)

        real = lambda key, num: sample(key, jnp.ones(DIM), num)
        error = lambda key, w: jnp.sum((w - 1) ** 2)
        return generalization.self_consuming(
            key, real, fit, sample, GENERATIONS, COUNT, mix=mix, measure=error
        )

    keys = jax.random.split(jax.random.key(0), REPEATS)
    first = generalization.linear_collapse(1, COUNT, DIM)[0]
    return np.asarray(jax.jit(jax.vmap(errors))(keys) / first)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replaced_regression_loses_one_unit_per_generation(shared):
    """related_systems 7.2: proportional to g within 5 %."""
    error = regression("replace", shared=shared)
    theory = generalization.linear_collapse(GENERATIONS, COUNT, DIM, mix="replace")
    theory = np.asarray(theory / theory[0])
    np.testing.assert_allclose(theory, np.arange(1, GENERATIONS + 1), rtol=1e-6)
    within = 0.05 * theory if not shared else 4 * error.std(0) / REPEATS**0.5
    assert (np.abs(error.mean(0) - theory) < within).all()


@pytest.mark.slow
def test_accumulated_regression_stays_bounded():
    """related_systems 7.2: the figures measured there, and below pi^2 / 6."""
    error = regression("accumulate", shared=False).mean(0)
    before = [1.02, 1.23, 1.40, 1.46, 1.50]
    np.testing.assert_allclose(error[np.array([1, 2, 5, 10, 20]) - 1], before, rtol=0.05)
    assert (error < 1.645).all()


@pytest.mark.slow
def test_accumulation_with_shared_inputs_sums_inverse_squares():
    error = regression("accumulate", shared=True)
    theory = generalization.linear_collapse(GENERATIONS, COUNT, DIM, mix="accumulate")
    theory = np.asarray(theory / theory[0])
    np.testing.assert_allclose(theory[2], 1 + 1 / 4 + 1 / 9, rtol=1e-6)
    assert theory[-1] < np.pi**2 / 6
    within = 4 * error.std(0) / REPEATS**0.5
    assert (np.abs(error.mean(0) - theory) < within).all()


def gaussians(num_generations=60, repeats=200, **options):
    """Rank-4 Gaussians in R^16 with eigenvalues 4, 2, 1, 1/2, refitted to 50 of their samples."""
    scales = jnp.sqrt(jnp.array([4.0, 2.0, 1.0, 0.5]))
    factor = jnp.pad(jnp.diag(scales), ((0, 12), (0, 0)))

    def sample(key, factor, num):
        return jax.random.normal(key, (num, factor.shape[1])) @ factor.T

    def fit(key, x, weights):  # the mean is known to be 0
        x = x * jnp.sqrt(weights / weights.sum())[:, None]
        _, s, vt = jnp.linalg.svd(x, full_matrices=False)
        return vt[:4].T * s[None, :4]

    run = lambda key: generalization.self_consuming(
        *(key, lambda key, num: sample(key, factor, num), fit, sample, num_generations, 50),
        measure=lambda key, f: generalization.spread(f, jnp.eye(16)[:, :4]),
        **options,
    )
    keys = jax.random.split(jax.random.key(1), repeats)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(keys))


@pytest.mark.slow
def test_gaussians_lose_their_directions_but_not_their_trace():
    """related_systems 7.2, and the exact drift of the log determinant of a Wishart matrix."""
    found = gaussians()
    mean = lambda a: a.mean(0)[[0, -1]]
    np.testing.assert_allclose(mean(found.effective_rank), [3.02, 1.43], rtol=0.05)
    np.testing.assert_allclose(mean(found.geometric_variance)[0], 1.38, rtol=0.05)
    assert 0.05 < mean(found.geometric_variance)[1] < 0.13  # 0.089 before; a heavy tail
    drift = np.mean([digamma((50 - i) / 2) - np.log(25) for i in range(4)])
    log = np.log(found.geometric_variance)
    expected = np.log(2) / 2 + drift * np.arange(1, 61)  # the truth is 4^(1/4)
    assert (np.abs(log.mean(0) - expected) < 4 * log.std(0) / 200**0.5).all()
    within = 4 * found.trace.std(0) / 200**0.5
    assert (np.abs(found.trace.mean(0) - 7.5) < within).all()  # a martingale
    assert found.largest_angle.max() < 0.01


@pytest.mark.slow
def test_accumulation_and_real_data_keep_the_directions():
    kept, fresh = gaussians(mix="accumulate"), gaussians(real_share=0.1)
    last = lambda found: (
        found.effective_rank[:, -1].mean(),
        found.geometric_variance[:, -1].mean(),
    )
    np.testing.assert_allclose(last(kept), [2.97, 1.29], rtol=0.05)
    np.testing.assert_allclose(last(fresh), [2.67, 1.12], rtol=0.05)


def test_loop_keeps_its_books():
    """Real ones are counted, weights say what is there, and K = 1 of 2 by reward is the better."""
    sample = lambda key, model, num: jnp.full(num, model) + 0.25 * jnp.arange(num)
    real = lambda key, num: jnp.full(num, -1.0)
    fit = lambda key, x, w: jnp.stack([w.sum(), (w * (x == -1)).sum(), (w * x).max()])
    run = lambda **options: generalization.self_consuming(
        *(jax.random.key(0), real, fit, lambda key, m, num: sample(key, m[2] + 2, num), 3, 8),
        **options,
    )
    replaced = run(real_share=0.25)
    np.testing.assert_array_equal(replaced[:, 0], [8, 8, 8])
    np.testing.assert_array_equal(replaced[:, 1], [8, 2, 2])
    np.testing.assert_array_equal(run(mix="accumulate", real_share=0.25)[:, 0], [8, 16, 24])
    np.testing.assert_array_equal(run(mix="accumulate", real_share=0.25)[:, 1], [8, 10, 12])
    np.testing.assert_array_equal(run(real_share=1.0)[:, 1], [8, 8, 8])
    chosen = run(reward=lambda x: 1e4 * x)  # of pairs (0, .25), (.5, .75) ... the second
    best = generalization.self_consuming(
        *(jax.random.key(0), real, lambda key, x, w: x, lambda key, m, num: sample(key, 1.0, num)),
        *(2, 4),
        reward=lambda x: 1e4 * x,
    )
    np.testing.assert_allclose(best[1], 1 + 0.25 * np.array([1, 3, 5, 7]))
    assert chosen[1, 2] == pytest.approx(1 + 0.25 * 15)


def test_spread_of_known_covariances():
    turned = jnp.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    found = generalization.spread(turned * jnp.array([[2.0, 1e-3]]), jnp.eye(2)[:, :1])
    assert float(found.largest_angle) == pytest.approx(0.3, abs=1e-5)
    assert float(found.geometric_variance) == pytest.approx(4, rel=1e-5)
    assert float(found.effective_rank) == pytest.approx(1, abs=1e-4)
    assert float(generalization.spread(jnp.eye(5), jnp.eye(5)).effective_rank) == pytest.approx(5)


# ---- curation -----------------------------------------------------------------------------------


def states(num=8):
    draw = np.random.default_rng(0)
    p = draw.dirichlet(np.ones(num))
    return jnp.asarray(p), jnp.asarray(draw.normal(size=num))


@pytest.mark.parametrize("num_candidates", [2, 3, 4])
def test_curation_is_that_of_enumeration(num_candidates, x64):
    p, r = (np.asarray(a) for a in states(5))
    gain, expected = np.exp(r), np.zeros(5)
    for rows in itertools.product(range(5), repeat=num_candidates):
        group = list(rows)
        chance = np.prod(p[group]) / gain[group].sum()
        np.add.at(expected, group, chance * gain[group])
    run = generalization.curate(jnp.asarray(p), jnp.asarray(r), 1, num_candidates=num_candidates)
    np.testing.assert_allclose(run.probabilities[1], expected, rtol=1e-13)


@pytest.mark.parametrize("num_candidates", [2, 5, None])
def test_curation_improves_as_promised_and_ends_on_the_best(num_candidates, x64):
    """related_systems 7.3: no violation in 2000 generations."""
    p, r = states()
    run = generalization.curate(p, r, 2000, num_candidates=num_candidates)
    rounding = 1e-13 * np.exp(r).max()
    assert (np.diff(run.utility) >= -rounding).all()
    assert (run.utility[1:] >= run.guaranteed[:-1] - rounding).all()
    assert np.argmax(run.probabilities[-1]) == np.argmax(r)
    assert run.probabilities[-1].max() > 1 - 1e-9
    if num_candidates is None:
        np.testing.assert_allclose(run.probabilities[3], p * np.exp(3 * r) / (p @ np.exp(3 * r)))


def test_real_data_hold_the_law(x64):
    p, r = states()
    entropy = lambda q: float(jnp.sum(q * jnp.log(q / p)))
    away = []
    for weight in (0.25, 0.5, 1.0, 4.0):
        last = generalization.curate(p, r, 5000, made_weight=weight).probabilities[-1]
        away.append(entropy(last))
        assert (last >= p / (1 + weight)).all()
        one = generalization.curate(last, r, 1).probabilities[1]  # the law is a fixed point
        np.testing.assert_allclose(last, (p + weight * one) / (1 + weight), rtol=1e-6)
    assert away == sorted(away) and away[0] > 0


def test_curated_samples_follow_the_exact_law():
    p, r = (a.astype(jnp.float32) for a in states(4))
    made = generalization.self_consuming(
        jax.random.key(3),
        lambda key, num: jax.random.categorical(key, jnp.log(p), shape=(num,)),
        lambda key, x, w: jnp.bincount(x, w, length=4) / w.sum(),
        lambda key, q, num: jax.random.categorical(key, jnp.log(q), shape=(num,)),
        *(4, 50_000),
        reward=lambda x: r[x],
    )
    np.testing.assert_allclose(made, generalization.curate(p, r, 3).probabilities, atol=0.01)


def test_errors(unchecked):
    p = jnp.ones(2) / 2
    with pytest.raises(ValueError, match="mix"):
        generalization.linear_collapse(2, 10, 2, mix="keep")
    with pytest.raises(ValueError, match=r"at least 4.*the mean error is infinite"):
        generalization.linear_collapse(2, 3, 2)
    with pytest.raises(ValueError, match="num_candidates too small"):
        generalization.curate(p, p, 2, num_candidates=1)
    with pytest.raises(ValueError, match="rewards"):
        generalization.curate(p, jnp.ones(3), 2)
    with pytest.raises(ValueError, match="factor"):
        generalization.spread(jnp.ones((3, 1)), jnp.eye(3)[:, :2])
    with pytest.raises(ValueError, match=r"real_share.*\[0, 1\]"):
        generalization.self_consuming(
            jax.random.key(0), jnp.ones, jnp.ones, jnp.ones, 2, 2, real_share=2.0
        )
