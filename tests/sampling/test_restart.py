"""Restarts: the law of a Gaussian after each of them in closed form, and how they are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.sampling import Restart, sample_restart

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()
VAR = 0.25
LEVEL = float(schedules.karras_grid(8)[4])


def narrow(schedule):
    """Denoiser of N(0, VAR I)."""

    def denoise_fn(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * VAR / (alpha**2 * VAR + sigma**2) * x

    return denoise_fn


@pytest.mark.parametrize("schedule", [VE, VP, FLOW], ids=["ve", "vp", "flow"])
def test_each_restart_shrinks_an_error_by_the_flow(schedule, key):
    """Started with four times the variance: ``v <- r^2 (v + high^2 - low^2)``, r the flow's."""
    low, high, last, repeats = 0.2, 1.0, 0.1, 3
    levels = np.append(np.geomspace(high, low, 17), np.geomspace(low, last, 7)[1:])
    ts = np.asarray(schedules.times_from_sigmas(schedule, levels))
    wrong = 4 * (VAR + high**2)
    x_T = jnp.sqrt(wrong) * schedule.alpha(ts[0]) * jax.random.normal(key, (4000, 8))

    @jax.jit
    def run(key):
        restarts = [Restart(low, high, 16, repeats)]
        options = {"solver": solvers.heun(), "restarts": restarts}
        return sample_restart(key, narrow(schedule), schedule, ts, x_T, **options)

    shrink = lambda a, b: (VAR + b**2) / (VAR + a**2)
    variance = wrong * shrink(high, low)
    for _ in range(repeats):
        variance = shrink(high, low) * (variance + high**2 - low**2)
    variance *= shrink(low, last)
    made = run(jax.random.key(1))
    assert made.nfe == 2 * (16 + 6 + repeats * 16)
    found = float(jnp.var(made.x)) / float(schedule.alpha(ts[-1])) ** 2
    print(f"variance {found:.4f}, expected {variance:.4f}, right {VAR + last**2:.4f}")
    assert abs(found / variance - 1) < 5 * np.sqrt(2 / x_T.size) + 0.01
    assert abs(variance / (VAR + last**2) - 1) < 0.05  # of the error of 300 %


def test_without_restarts_it_is_sample(key):
    ts = np.asarray(schedules.karras_grid(6))
    again = sample_restart(key, narrow(VE), VE, ts, (4, 3), solver=solvers.heun(), restarts=[])
    folded = jax.random.fold_in(key, 0)
    plain = sampling.sample(folded, narrow(VE), VE, ts, (4, 3), solver=solvers.heun())
    np.testing.assert_allclose(again.x, plain.x)
    assert again.nfe == plain.nfe


def test_samples_do_not_depend_on_the_split(key):
    ts, restarts = np.asarray(schedules.karras_grid(6)), [Restart(0.5, 3.0, 2, 2)]
    options = {"solver": solvers.ancestral(), "restarts": restarts}
    run = jax.jit(
        lambda index: (
            sample_restart(key, narrow(VE), VE, ts, (len(index), 3), index=index, **options).x
        )
    )
    whole, part = run(jnp.arange(4)), run(jnp.arange(2, 4))
    np.testing.assert_allclose(whole[2:], part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("restarts", "match"),
    [
        ([Restart(0.3, 0.2, 2)], "levels of a restart: expected 0 < low < high <= 80"),
        ([Restart(0.1, 90.0, 2)], "levels of a restart"),
        ([Restart(0.9 * LEVEL, 0.95 * LEVEL, 2)], r"an empty restart: .*nearest to low is"),
        ([Restart(0.1, 1.0, 2), Restart(0.5, 3.0, 2)], "order of the restarts"),
        ([Restart(0.1, 1.0, 0)], "num_steps too small"),
    ],
)
def test_errors(restarts, match, key):
    ts = np.asarray(schedules.karras_grid(8))
    with pytest.raises(ValueError, match=match):
        options = {"solver": solvers.heun(), "restarts": restarts}
        sample_restart(key, narrow(VE), VE, ts, (4, 3), **options)
