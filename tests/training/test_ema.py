"""Power averages made after a training against those tracked during it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion.training import ema

NARROW, WIDE = ema.gamma_from_std(0.05), ema.gamma_from_std(0.1)


def tracked(gammas, num_steps=600):
    """Averages ``[gammas, num_steps, 3]`` along a training whose parameters wander, float64."""
    moves = np.random.default_rng(0).normal(size=(num_steps, 3)).cumsum(0)
    path = jnp.asarray(np.sqrt(np.arange(1.0, num_steps + 1))[:, None] + 0.1 * moves)
    decays = [ema.power(gamma) for gamma in gammas]

    def step(averages, at):
        t, params = at
        moved = [ema.update(a, params, d(t)) for a, d in zip(averages, decays, strict=True)]
        return moved, jnp.stack(moved)

    start = [jnp.zeros(3)] * len(gammas)
    steps = jnp.arange(1.0, num_steps + 1)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, (steps, path))[1])()).swapaxes(0, 1)


def test_every_width_follows_from_snapshots_of_two(x64):
    """Far nearer than any average that was kept; between two snapshots it says that it is not."""
    stds = (0.05, 0.1, 0.07, 0.15, 0.2)
    averages = tracked([ema.gamma_from_std(std) for std in stds])
    steps = np.arange(30, 601, 30)
    snapshots = [{"w": averages[i, step - 1]} for i in (0, 1) for step in steps]
    gammas = np.repeat([NARROW, WIDE], len(steps))
    for i, std in enumerate(stds):
        for step in (600, 450):
            found = ema.combination(
                gammas, np.tile(steps, 2), gamma=ema.gamma_from_std(std), step=step
            )
            made = ema.reconstruct(iter(snapshots), found)["w"]
            kept = min(
                np.linalg.norm(averages[j, step - 1] - averages[i, step - 1]) for j in (0, 1)
            )
            error = np.linalg.norm(made - averages[i, step - 1])
            assert found.error < 0.03 and abs(found.coefficients.sum() - 1) < 1e-12
            if i < 2:
                assert error < 1e-6  # it is one of them
            else:
                assert error < 0.1 * kept
    assert ema.combination(gammas, np.tile(steps, 2), gamma=NARROW, step=465).error > 0.2


def test_error_is_the_distance_of_the_weights_over_the_training():
    """Per update a power average weighs by the integral of its density, as eq. (2) says."""
    last, steps = 2000, np.arange(250, 2001, 250)
    gammas = np.repeat([NARROW, WIDE], len(steps))
    s = np.arange(1.0, last + 1)
    weigh = lambda g, t: np.where(s <= t, (s ** (g + 1) - (s - 1) ** (g + 1)) / t ** (g + 1), 0)
    wanted = weigh(ema.gamma_from_std(0.2), 2000.0)
    found = ema.combination(gammas, np.tile(steps, 2), gamma=ema.gamma_from_std(0.2))
    each = np.stack([weigh(*pair) for pair in zip(gammas, np.tile(steps, 2) * 1.0, strict=True)])
    missed = np.linalg.norm(found.coefficients @ each - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(found.error, missed, rtol=1e-3)
    best = np.linalg.lstsq(each.T, wanted)[0]  # without the condition on the sum
    assert missed < 1.1 * np.linalg.norm(best @ each - wanted) / np.linalg.norm(wanted)


def test_constant_parameters_stay_and_dtypes_too():
    steps = np.arange(10, 101, 10)
    found = ema.combination(NARROW, steps, gamma=WIDE)
    tree = {"w": np.full(3, 0.7, np.float32), "b": jnp.ones((), jnp.bfloat16)}
    made = ema.reconstruct([tree] * 10, found)
    np.testing.assert_allclose(made["w"], 0.7, rtol=1e-6)
    assert made["w"].dtype == np.float32 and made["b"].dtype == jnp.bfloat16


def test_bad_input_is_named(unchecked):
    with pytest.raises(ValueError, match=r"gamma out of range: expected \(-0.5, inf\]"):
        ema.combination(7.0, [10], gamma=-0.5)
    with pytest.raises(ValueError, match=r"step out of range.*only what is past is averaged"):
        ema.combination(7.0, [10, 20], gamma=7.0, step=30)
    with pytest.raises(ValueError, match=r"steps out of range.*after the first update"):
        ema.combination(7.0, [0, 20], gamma=7.0)
    with pytest.raises(ValueError, match="no snapshots"):
        ema.combination(7.0, [], gamma=7.0)
    with pytest.raises(ValueError, match="wrong shape of gammas"):
        ema.combination([7.0], [10, 20], gamma=7.0)
    with pytest.raises(ValueError, match="too few snapshots: expected 2, got 1"):
        ema.reconstruct([{"w": 1.0}], ema.combination(7.0, [10, 20], gamma=8.0))
