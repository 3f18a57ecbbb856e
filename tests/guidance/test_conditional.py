"""Classifier-free guidance and autoguidance against Gaussian closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian

from lowdim_diffusion import (
    denoisers,
    distributions,
    guidance,
    linalg,
    sampling,
    schedules,
    solvers,
)

VE, RF = schedules.VE(), schedules.RectifiedFlow()


COND, UNCOND = ([1.0, -1.0], [0.25, 1.0]), ([0.0, 0.5], [4.0, 1.0])  # means and variances


def pair(schedule):
    return gaussian(schedule, *COND)[0], gaussian(schedule, *UNCOND)[0]


@pytest.fixture
def x(key):
    return jax.random.normal(key, (6, 2))


def test_score_is_that_of_the_powers(x, x64):
    """grad log p_c^w p_u^(1 - w), from the densities; one w per example."""
    x, t, scale = x.astype(float), 0.6, jnp.array([0.0, 1.0, 2.5, -1.0, 0.5, 7.0])
    (cond, log_p), (uncond, log_q) = gaussian(RF, *COND), gaussian(RF, *UNCOND)
    log_prob = lambda x: jnp.sum(scale * log_p(x, t) + (1 - scale) * log_q(x, t))
    found = denoisers.score_fn(guidance.classifier_free(cond, uncond, scale), RF)(x, t)
    np.testing.assert_allclose(found, jax.grad(log_prob)(x), rtol=1e-9, atol=1e-12)


def test_pure_noise(x):
    """At alpha = 0 both denoisers are their means."""
    guided = guidance.classifier_free(*pair(RF), 3.0, rescale=0.7)
    out = jax.jit(guided)(x, 1.0)
    plain = jnp.array([3.0, -4.0])
    np.testing.assert_allclose(
        out, jnp.broadcast_to(plain * (0.7 * 1 / 3.5 + 0.3), (6, 2)), rtol=1e-6
    )
    same = guidance.classifier_free(lambda x, t: 0 * x, lambda x, t: 0 * x, 3.0, rescale=1.0)
    assert np.all(np.isfinite(jax.grad(lambda x: same(x, 1.0).sum())(x)))


@pytest.mark.parametrize("schedule", [VE, RF], ids=["VE", "RectifiedFlow"])
def test_interval_is_of_noise_levels(schedule, x):
    """low < sigma / alpha <= high, whatever the schedule's t; outside the conditional alone."""
    fns = pair(schedule)
    part = guidance.classifier_free(*fns, 2.0, schedule=schedule, interval=(0.3, 2.0))
    whole = guidance.classifier_free(*fns, 2.0)
    ts = schedules.times_from_sigmas(schedule, jnp.array([0.2, 0.29, 0.31, 1.0, 1.99, 2.01]))
    inside = jnp.array([False, False, True, True, True, False])[:, None]
    expected = jnp.where(inside, whole(x, ts), fns[0](x, ts))
    np.testing.assert_allclose(part(x, ts), expected, rtol=1e-6)
    alone = jax.lax.map(lambda xt: part(xt[0][None], xt[1])[0], (x, ts))  # scalar times
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
    part = guidance.classifier_free(*fns, 2.0, schedule=schedule, interval=(1.0, np.inf))
    t_max = jnp.full(6, schedule.t_max)
    np.testing.assert_array_equal(part(x, t_max), whole(x, t_max))


def test_unconditional_is_skipped_outside_the_interval(x):
    """At run time, for a scalar time: counted by a callback."""
    calls = []

    def uncond(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0 * x

    guided = guidance.autoguidance(pair(VE)[0], uncond, 2.0, schedule=VE, interval=(1.0, 4.0))
    run = jax.jit(lambda x: jax.lax.map(lambda t: guided(x, t), jnp.array([8.0, 4.0, 2.0, 1.0])))
    run(x).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 2


def test_autoguidance_is_the_same_formula(x):
    fns = pair(VE)
    np.testing.assert_array_equal(
        guidance.autoguidance(*fns, 1.7)(x, 0.5), guidance.classifier_free(*fns, 1.7)(x, 0.5)
    )


def test_rescale_restores_the_spread(key):
    """With phi = 1 every guided example has the standard deviation of the conditional one."""
    x = jax.random.normal(key, (5, 4, 4, 1))
    cond, uncond = lambda x, t: x + 1, lambda x, t: 0.1 * x**2
    full = guidance.classifier_free(cond, uncond, 4.0, rescale=1.0)(x, 1.0)
    np.testing.assert_allclose(jnp.std(full, axis=(1, 2, 3)), jnp.std(x, axis=(1, 2, 3)), rtol=1e-5)
    half = guidance.classifier_free(cond, uncond, 4.0, rescale=0.5)(x, 1.0)
    plain = guidance.classifier_free(cond, uncond, 4.0)(x, 1.0)
    np.testing.assert_allclose(half, (full + plain) / 2, rtol=1e-5, atol=1e-5)


def test_batched_equals_two_calls(key):
    centers = jnp.array([[1.0, 0.0, 2.0], [0.0, -1.0, 0.5], [0.3, 0.2, 0.1]])  # last: no label
    fn = lambda x, t, c: centers[c] + jnp.tanh(x / linalg.expand_right(1 + t, 2))
    x, labels = jax.random.normal(key, (5, 3)), jnp.array([0, 1, 1, 0, 1])
    cond, uncond = lambda x, t: fn(x, t, labels), lambda x, t: fn(x, t, jnp.full(5, 2))
    for interval in (None, (0.5, 2.0)):
        options = dict(schedule=VE, interval=interval)
        batched = guidance.classifier_free_batched(fn, 2, 2.0, **options)
        two = guidance.classifier_free(cond, uncond, 2.0, **options)
        for t in (1.0, 4.0, jnp.linspace(0.1, 3, 5)):
            np.testing.assert_allclose(batched(x, t, labels), two(x, t), rtol=1e-6)
    tree = lambda label, shift: {"label": label, "shift": shift}
    moved = lambda x, t, c: fn(x, t, c["label"]) + c["shift"]
    same = guidance.classifier_free_batched(moved, tree(2, jnp.zeros(3)), 2.0)
    cond = tree(labels, jnp.ones((5, 3)))
    np.testing.assert_allclose(same(x, 1.0, cond), two(x, 1.0) + 2, rtol=1e-5, atol=1e-6)
    run = dict(solver=solvers.euler(), shape_or_x_T=(5, 3), schedule=VE, ts=[2.0, 1.0, 0.0])
    blocks = sampling.sample_batched(key, batched, **run, batch_size=2, cond=labels)
    np.testing.assert_allclose(blocks.x, sampling.sample(key, two, **run).x, rtol=1e-5, atol=1e-6)


def test_min_steps_pass_on(x):
    stiff = distributions.Empirical(x).denoiser(VE)
    assert guidance.classifier_free(stiff, pair(VE)[0], 2.0).min_steps == stiff.min_steps
    assert not hasattr(guidance.autoguidance(lambda x, t: x, lambda x, t: x, 2.0), "min_steps")


def test_bad_input(x, unchecked):
    d = lambda x, t: x
    for options, message in (
        (dict(scale=float("nan")), "scale"),
        (dict(scale=jnp.ones((2, 2))), "shape of scale"),
        (dict(scale=1.0, rescale=1.5), "rescale"),
        (dict(scale=1.0, interval=(0.1, 1.0)), "schedule"),
        (dict(scale=1.0, schedule=VE, interval=(-0.1, 1.0)), "0 <= low < high"),
        (dict(scale=1.0, schedule=VE, interval=(2.0, 1.0)), "0 <= low < high"),
        (dict(scale=1.0, schedule=VE, interval=(2.0,)), "low, high"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.classifier_free(d, d, **options)
    with pytest.raises(ValueError, match="cond_fn: x_t has shape"):
        guidance.classifier_free(lambda x, t: x[:, :1], d, 2.0)(x, 1.0)
    with pytest.raises(ValueError, match=r"expected \(\) or \(6,\)"):
        guidance.classifier_free(d, d, jnp.ones(4))(x, 1.0)
    for null, cond, message in (
        (4, jnp.ones(3, int), "shape of cond"),
        (4, None, "nothing to guide by"),
        (jnp.ones(2, int), jnp.ones(6, int), "shape of null"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.classifier_free_batched(lambda x, t, c: x, null, 2.0)(x, 1.0, cond)
