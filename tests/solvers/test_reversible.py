"""BDIA and EDICT: their published steps, and that undoing them returns what was there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from g8 import starts

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.linalg import random_frames

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()


def bent(y):
    np_ = jnp if isinstance(y, jax.Array) else np
    return np_.tanh(y) * 0.8 + 0.1 * y


def run(solver, schedule, ts, x_T):
    denoise_fn = lambda x, t: bent(x / schedule.alpha(t))
    key = jax.random.key(0)
    draw = lambda: sampling.sample(key, denoise_fn, schedule, ts, x_T, solver=solver)
    return jax.jit(draw)()


def test_bdia_is_the_papers_recursion(x64):
    """``z' = z_prev - (1 - g)(z_prev - z) - g D(t -> t_prev) + D(t -> t')``, D Euler's move."""
    ts, gamma = np.linspace(0.9, 0.2, 7), 0.8
    x_T = np.random.default_rng(0).standard_normal((4, 3))
    alpha, sigma = (np.asarray(f(ts), np.float64) for f in (VP.alpha, VP.sigma))

    def move(z, i, j):
        x0 = bent(z / alpha[i])
        return alpha[j] * x0 + sigma[j] * (z - alpha[i] * x0) / sigma[i] - z

    z_prev, z = x_T, x_T + move(x_T, 0, 1)
    for i in range(1, 6):
        new = z_prev - (1 - gamma) * (z_prev - z) - gamma * move(z, i, i - 1) + move(z, i, i + 1)
        z_prev, z = z, new
    made = run(solvers.bdia(gamma), VP, ts, x_T)
    np.testing.assert_allclose(made.x, z, rtol=1e-9)
    np.testing.assert_allclose(made.state.history[0], z_prev, rtol=1e-9)


def test_edict_is_the_papers_pair_of_copies(x64):
    ts, mixing = np.linspace(0.9, 0.2, 7), 0.93
    x = y = np.random.default_rng(0).standard_normal((4, 3))
    alpha, sigma = (np.asarray(f(ts), np.float64) for f in (VP.alpha, VP.sigma))
    made = run(solvers.edict(mixing), VP, ts, x)
    for i in range(6):
        a = alpha[i + 1] / alpha[i]
        b = sigma[i + 1] - a * sigma[i]
        eps = lambda z, i=i: (z - alpha[i] * bent(z / alpha[i])) / sigma[i]
        x = a * x + b * eps(y)
        y = a * y + b * eps(x)
        x = mixing * x + (1 - mixing) * y
        y = mixing * y + (1 - mixing) * x
    np.testing.assert_allclose(made.x, x, rtol=1e-9)
    np.testing.assert_allclose(made.state.history[0], y, rtol=1e-9)


@pytest.fixture(scope="module")
def g8():
    """Fixture G8 and its starts, in float64."""
    with jax.enable_x64(True):
        return starts(VP, 256)


@functools.partial(jax.jit, static_argnames=("solver", "num_steps", "num_iters"))
def round_trip(p, x_T, *, solver, num_steps, num_iters=0):
    """RMS over examples of the distance between a start and what its sample is inverted to."""
    ts = np.linspace(1.0, 1e-3**0.5, num_steps + 1) ** 2
    denoise_fn = p.denoiser(VP)
    made = sampling.sample(jax.random.key(0), denoise_fn, VP, ts, x_T, solver=solver)
    end = made.x if made.state is None else made.state
    back = sampling.invert(denoise_fn, VP, ts, end, solver=solver, num_iters=num_iters)
    back = back.x if isinstance(back, solvers.State) else back
    # From noise back to noise, in the units of the data, as the published figures are.
    return jnp.sqrt(jnp.mean(jnp.sum((back - x_T) ** 2, axis=-1)))


@pytest.mark.parametrize(
    ("solver", "bound64", "bound32"),
    [(solvers.bdia(), 1e-12, 2e-5), (solvers.edict(), 1e-11, 2e-4)],
    ids=["bdia", "edict"],
)
def test_round_trip_is_exact_to_rounding(solver, bound64, bound32, g8, x64):
    p, x_T = g8
    error = float(round_trip(p, x_T, solver=solver, num_steps=50))
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x_T))
    error32 = float(round_trip(*low, solver=solver, num_steps=50))
    print(f"{solver.name}: float64 {error:.1e}, float32 {error32:.1e}")
    assert error < bound64 and error32 < bound32


def test_rounding_grows_as_gamma_to_the_steps(g8, x64):
    """The published 1e-13 (10 steps) and 1e-10 (20) at gamma = 1/2."""
    p, x_T = g8
    few, many = (float(round_trip(p, x_T, solver=solvers.bdia(0.5), num_steps=n)) for n in (10, 20))
    print(f"gamma .5: {few:.1e}, {many:.1e}")
    assert few < 1e-11 and 1e2 < many / few < 1e5


@pytest.mark.slow
@pytest.mark.parametrize("solver", [solvers.euler(), solvers.heun()], ids=["ddim", "heun"])
def test_fixed_point_iterations_invert_a_step(solver, g8, x64):
    p, x_T = g8
    errors = [
        float(round_trip(p, x_T, solver=solver, num_steps=20, num_iters=k)) for k in (0, 3, 30)
    ]
    print(solver.name, [f"{e:.1e}" for e in errors])
    assert errors[0] > 5e-3 and errors[1] < errors[0] / 5 and errors[2] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("solver", [solvers.bdia(), solvers.edict()], ids=["bdia", "edict"])
@pytest.mark.parametrize("schedule", [VE, FLOW], ids=["ve", "flow"])
def test_images_return_from_pure_noise_and_clean_ends(solver, schedule, key):
    """From data up to t_max (alpha = 0 for rectified flow) and back to the clean example."""
    p = MoLRG(random_frames(key, 3, 12, 3, orthogonal=True))
    x_0, _ = p.sample(jax.random.key(1), 32)
    ts = schedules.times_from_sigmas(schedule, jnp.append(jnp.geomspace(60.0, 1e-2, 40), 0.0))
    ts = ts.at[0].set(schedule.t_max)

    @jax.jit
    def there_and_back(x_0):
        denoise_fn = p.denoiser(schedule)
        state = sampling.invert(denoise_fn, schedule, ts, x_0, solver=solver)
        made = sampling.sample(key, denoise_fn, schedule, ts, state, solver=solver)
        return state, made.x

    state, back = there_and_back(x_0)
    error = float(jnp.linalg.norm(back - x_0) / jnp.linalg.norm(x_0))
    spread = float(jnp.std(state.x)) / float(schedule.sigma(ts[0]))
    print(f"{solver.name} {type(schedule).__name__}: round trip {error:.1e}, noise {spread:.2f}")
    assert error < 2e-3


def test_errors(key):
    white = lambda x, t: x / (1 + t**2)
    x_0, ts = jnp.ones((2, 3)), np.asarray(schedules.karras_grid(5))
    invert = functools.partial(sampling.invert, white, VE, ts)
    with pytest.raises(ValueError, match="a solver that remembers: expected a one-step solver"):
        invert(x_0, solver=solvers.dpmpp_2m(), num_iters=2)
    with pytest.raises(ValueError, match=r"x_0 is a state: expected solvers.bdia"):
        invert(solvers.State(x_0, (x_0,)), solver=solvers.heun())
    with pytest.raises(ValueError, match="num_iters too small"):
        invert(x_0, solver=solvers.heun(), num_iters=-1)
    with pytest.raises(ValueError, match="bdia: gamma out of range"):
        solvers.bdia(0.0)
    with pytest.raises(ValueError, match="edict: mixing out of range"):
        solvers.edict(1.5)
