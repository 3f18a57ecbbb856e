"""Every solver, with an exact denoiser, gives samples of the right law, on every schedule."""

import itertools

import jax
import numpy as np
import pytest
from every_solver import ALL, STOCHASTIC

from lowdim_diffusion import sampling, schedules
from lowdim_diffusion.distributions import Empirical, Gaussian, MoLRG

SCHEDULES = {
    "vp": schedules.VPLinear(),
    "cosine": schedules.VPCosine(),
    "ve": schedules.VE(),
    "flow": schedules.RectifiedFlow(),
}
SOLVERS = STOCHASTIC | {name: ALL[name] for name in ("euler", "heun", "dpmpp_2m", "unipc_3")}


def make_gaussian():
    factor = np.random.default_rng(3).standard_normal((6, 2)).astype(np.float32)
    return Gaussian(np.linspace(-0.5, 0.5, 6, dtype=np.float32), factor, 0.1)


def make_molrg():
    bases = np.stack([np.eye(6)[:, :2], np.eye(6)[:, 2:4]]).astype(np.float32)
    means = np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, -1, 0.5]], np.float32)
    return MoLRG(bases, [0.3, 0.7], means, np.array([[1.0, 0.5], [0.7, 0.7]], np.float32))


BY_DEFAULT = {
    (make_molrg, "euler", "cosine"),
    (make_molrg, "ddim_half", "flow"),
    (make_molrg, "ancestral", "vp"),
    (make_molrg, "ancestral_large", "ve"),
    (make_molrg, "heun", "flow"),
    (make_molrg, "heun_churn", "ve"),
    (make_molrg, "dpmpp_2m", "vp"),
    (make_molrg, "langevin", "flow"),
    (make_gaussian, "heun", "cosine"),
}


@pytest.mark.parametrize(
    ("make", "solver_name", "schedule_name"),
    [
        pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow)
        for case in itertools.product((make_molrg, make_gaussian), SOLVERS, SCHEDULES)
    ],
)
def test_mean_and_covariance(make, solver_name, schedule_name, key):
    p, schedule = make(), SCHEDULES[schedule_name]
    solver = SOLVERS[solver_name]
    num_samples = 4096
    ts = schedules.log_snr_grid(schedule, 200, t_min=schedules.times_from_sigmas(schedule, 0.002))
    run = jax.jit(
        lambda key, denoise_fn: (
            sampling.sample(key, denoise_fn, schedule, ts, (num_samples, 6), solver=solver).x
        )
    )
    x = np.asarray(run(key, p.denoiser(schedule)), np.float64)
    mean, cov = (np.asarray(m, np.float64) for m in p.moments())
    # Monte-Carlo error, five standard deviations, plus 3 % for the steps and the centred start.
    std = np.sqrt(np.diag(cov))
    assert np.all(np.abs(x.mean(0) - mean) < (5 / np.sqrt(num_samples) + 0.03) * (std + 0.05))
    # Entry (i, j) of a sample covariance has variance of at most about (E x_i^2 x_j^2) / N.
    centred = x - x.mean(0)
    fourth = np.sqrt(np.mean((centred[:, :, None] * centred[:, None, :]) ** 2, axis=0))
    allowed = 5 / np.sqrt(num_samples) * fourth + 0.03 * np.outer(std, std) + 1e-3
    assert np.all(np.abs(np.cov(x.T) - cov) < allowed)


@pytest.mark.slow
def test_mixture_weights_survive(key):
    p, schedule = make_molrg(), schedules.VE()
    ts = schedules.karras_grid(40)
    run = lambda key: sampling.sample(
        key, p.denoiser(schedule), schedule, ts, (4096, 6), solver=ALL["heun"]
    )
    x = jax.jit(run)(key).x
    shares = np.mean(np.asarray(p.posterior_weights(x, 1.0, 0.05)), axis=0)
    assert np.all(np.abs(shares - [0.3, 0.7]) < 5 * np.sqrt(0.21 / 4096) + 0.005)


@pytest.mark.parametrize(
    "solver_name",
    ["heun", "ancestral"]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ("euler", "dpmpp_2m", "heun_churn")],
)
def test_the_memorising_denoiser_returns_training_points(solver_name, key):
    data = jax.random.normal(jax.random.key(7), (64, 12))
    schedule = schedules.VE()
    ts = schedules.karras_grid(72)
    x = jax.jit(
        lambda key: sampling.sample(
            key, Empirical(data).denoiser(schedule), schedule, ts, (256, 12),
            solver=SOLVERS[solver_name],
        ).x
    )(key)  # fmt: skip
    distance = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(data)[None], axis=-1)
    assert distance.min(axis=1).max() < 1e-2
    assert len(np.unique(distance.argmin(axis=1))) > 50  # and not always the same ones
