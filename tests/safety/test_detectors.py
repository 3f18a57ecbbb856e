"""Scores against their definition in numpy, and rates against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from lowdim_diffusion import safety, sampling, schedules, solvers

AREA, RATE = jax.jit(safety.auroc), jax.jit(safety.true_positive_rate)


def test_spread_is_the_standard_deviation_over_all_features():
    h = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)
    expected = h.reshape(5, -1).std(1)
    np.testing.assert_allclose(jax.jit(safety.representation_spread)(h), expected, rtol=1e-5)


def test_trajectory_variance_is_that_of_the_published_code():
    x = np.random.default_rng(0).normal(size=(9, 6, 2)).astype(np.float32)
    expected = np.mean(np.var(x[-4:], axis=0), axis=1)  # as released: last steps, over coordinates
    score = jax.jit(safety.trajectory_variance)
    np.testing.assert_allclose(score(x[-4:]), expected, rtol=1e-5)
    window = np.arange(9) >= 5
    np.testing.assert_allclose(score(x, window), expected, rtol=1e-5)
    images = x.reshape(9, 3, 2, 2, 1)
    expected = np.var(images, axis=0).mean((1, 2, 3))
    np.testing.assert_allclose(score(images), expected, rtol=1e-5)


def test_hallucination_score_without_training():
    """Tempered responsibilities, as a network smooths them, let samples end between the modes."""
    modes, std = jnp.array([1.0, 2.0, 3.0]), 0.05
    schedule, ts = schedules.VE(1e-3, 20.0), schedules.karras_grid(80, 0.02, 20.0)

    def run(key, temper):
        def denoise_fn(x, t):
            away, var = x - modes[None], std**2 + t**2
            weights = jax.nn.softmax(-(away**2) / (2 * (var + temper**2)), axis=-1)
            mean = weights * (modes[None] + std**2 / var * away)
            return jnp.sum(mean, axis=-1, keepdims=True)

        solver = solvers.ancestral()
        result = sampling.sample(
            key, denoise_fn, schedule, ts, (20_000, 1), solver=solver, save="denoised"
        )
        hallucinated = jnp.min(jnp.abs(result.x - modes[None]), axis=1) > 6 * std
        scores = (
            safety.trajectory_variance(result.trajectory, result.ts <= t) for t in (2 * std, 0.5)
        )
        return hallucinated.mean(), *(safety.auroc(score, hallucinated) for score in scores)

    run = jax.jit(run)
    fraction, narrow, wide = run(jax.random.key(0), 0.25)
    assert 0.001 < fraction < 0.01
    assert narrow > 0.95 and wide < 0.8
    assert run(jax.random.key(0), 0.0)[0] == 0


def test_filter_keeps_the_calmest_in_the_window():
    """Windows are levels sigma / alpha, not times; shares are rounded up."""
    schedule = schedules.VPLinear()
    ts = np.array([0.9, 0.2, 0.1, 0.05], np.float32)
    levels = np.asarray(schedules.noise_levels(schedule, jnp.asarray(ts)))
    late = np.array([3.0, 1.0, np.nan, 2.0, 0.0], np.float32)
    x0_hats = np.stack([9 * late[::-1], 9 * late[::-1], 0 * late, late])[..., None]
    result = lambda x: sampling.SampleResult(*map(jnp.asarray, (x[-1], x, ts)), None, 4)
    keep = lambda share: safety.keep_calmest(
        result(x0_hats), schedule, share, max_sigma=float(levels[2]) + 1e-6
    )
    with pytest.raises(ValueError, match="not finite"):
        keep(0.6)
    x0_hats[:, 2] = 100 * np.arange(4)[:, None]
    assert keep(0.6).rows.tolist() == [1, 3, 4]
    assert keep(0.61).rows.tolist() == [0, 1, 3, 4]
    assert keep(1).rows.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(keep(1).scores[[0, 1, 3, 4]], late[[0, 1, 3, 4]] ** 2 / 4)
    with pytest.raises(ValueError, match=r"2 steps or more.*the lowest are 0\."):
        safety.keep_calmest(result(x0_hats), schedule, 0.5, max_sigma=1e-3)
    with pytest.raises(ValueError, match='save="denoised"'):
        safety.keep_calmest(
            sampling.SampleResult(jnp.ones(5), None, None, None, 4), schedule, 0.5, max_sigma=1.0
        )
    with pytest.raises(ValueError, match=r"fraction.*\(0, 1\]"):
        safety.keep_calmest(result(x0_hats), schedule, 1.5, max_sigma=1.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_fpr", [0.01, 0.04, 0.5])
def test_rates_are_those_of_scikit_learn(tied, max_fpr):
    draw = np.random.default_rng(3)
    is_positive = draw.random(400) < 0.3
    scores = (draw.normal(size=400) + is_positive).astype(np.float32)
    scores = np.round(scores, 1) if tied else scores
    assert float(AREA(scores, is_positive)) == pytest.approx(
        metrics.roc_auc_score(is_positive, scores), abs=1e-6
    )
    fpr, tpr, _ = metrics.roc_curve(is_positive, scores, drop_intermediate=False)
    expected = tpr[fpr <= max_fpr].max()
    assert float(RATE(scores, is_positive, max_fpr)) == pytest.approx(expected)


def test_rates_at_the_edges():
    labels, separated = np.arange(200) >= 100, np.arange(200, dtype=np.float32)
    area = lambda scores, labels=labels: float(AREA(scores, labels))
    rate = lambda scores, limit=0.01: float(RATE(scores, labels, limit))
    assert area(separated) == rate(separated) == 1.0
    assert area(-separated) == rate(np.zeros_like(separated)) == 0.0
    assert area(np.zeros_like(separated)) == 0.5
    one_above = np.where(np.arange(200) == 0, np.float32(1e3), separated)
    assert rate(one_above) == 1.0  # 1 of 100 negatives: just allowed
    assert rate(one_above, 0.0099) == 0.0
    assert np.isnan(area(separated, np.zeros(200, bool)))


def test_bad_input():
    fails = lambda match, error=ValueError: pytest.raises(error, match=match)
    with fails("representation_spread: wrong shape of features"):
        safety.representation_spread(np.ones(3))
    with fails("representation_spread: too few features: expected at least 2 per example, got 1"):
        safety.representation_spread(np.ones((3, 1)))
    with fails("representation_spread: features are not finite"):
        safety.representation_spread(np.array([[1.0, np.nan]]))
    with fails('trajectory_variance: no trajectory.*save="denoised"'):
        safety.trajectory_variance(None)
    with fails(r"wrong shape of x0_hats: expected \[k, b, \*data\], got \(3, 4\)"):
        safety.trajectory_variance(np.ones((3, 4)))
    with fails(r"wrong shape of where: expected \(3,\), got \(2,\)"):
        safety.trajectory_variance(np.ones((3, 4, 1)), np.ones(2, bool))
    with fails("too few predictions in the window: expected at least 2, got 1; widen it"):
        safety.trajectory_variance(np.ones((3, 4, 1)), np.arange(3) == 1)
    with fails("where must be boolean", TypeError):
        safety.trajectory_variance(np.ones((3, 4, 1)), np.arange(3))
    with fails("x0_hats are not finite"):
        safety.trajectory_variance(np.full((3, 4, 1), np.inf))
    with fails(r"auroc: wrong shape of is_positive: expected \(3,\), got \(2,\)"):
        safety.auroc(np.ones(3), np.ones(2, bool))
    with fails("auroc: scores are not numbers: expected no NaN"):
        safety.auroc(np.array([1.0, np.nan]), np.array([True, False]))
    with fails("too few examples: expected one or more of either kind, got 2 positives among 2"):
        safety.true_positive_rate(np.ones(2), np.ones(2, bool))
    with fails("is_positive must be boolean", TypeError):
        safety.auroc(np.ones(2), np.array([0, 1]))
    with fails("max_fpr out of range"):
        safety.true_positive_rate(np.ones(2), np.array([True, False]), 1.5)
