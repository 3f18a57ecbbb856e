"""Searched grids beat the usual ones on starts that they were not searched with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from g8 import starts

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion.sampling.search import usual_grids

VE, VP, FLOW = schedules.VE(), schedules.VPLinear(), schedules.RectifiedFlow()


@pytest.fixture(scope="module")
def g8():
    """Fixture G8, with starts made of its own noised examples."""
    p, x_T = starts(VP, 256)
    return p.denoiser(VP), x_T


@pytest.mark.parametrize(
    ("name", "ratio"), [("dpmpp_2m", 0.6), pytest.param("euler", 0.93, marks=pytest.mark.slow)]
)
def test_four_steps_on_the_mixture_g8(name, ratio, g8, key):
    """Published: .092 against .183 for DPM-Solver++(2M), .366 against .426 for DDIM."""
    found = sampling.search_sampler(
        key,
        *(g8[0], VP, g8[1]),
        nfe=4,
        solvers={name: getattr(solvers, name)()},
        t_min=1e-3,
        clean=False,
        num_generations=25,
    )
    (row,) = found.table
    print(row, found.ts)
    assert row["num_steps"] == row["nfe"] == 4
    assert row["error"] < ratio * row["given_error"]
    np.testing.assert_allclose(found.ts[[0, -1]], [1.0, 1e-3], rtol=1e-6)
    assert np.all(np.diff(found.ts) < 0)


def test_the_search_is_a_function_of_its_key_and_never_worse(key):
    denoise_fn = lambda x, t: 0.3 * jnp.tanh(x / (0.3 + t))
    ts = schedules.karras_grid(6)
    x_T = sampling.initial_noise(key, VE, ts[0], (16, 2))
    search = jax.jit(
        lambda key: sampling.search_grid(
            key, denoise_fn, VE, ts, x_T, solver=solvers.heun(), num_generations=6, population=8
        )
    )
    one, again, other = search(key), search(key), search(jax.random.key(5))
    np.testing.assert_array_equal(one.ts, again.ts)
    assert not np.array_equal(one.ts, other.ts)
    assert np.all(np.diff(one.errors) <= 0) and one.errors[-1] < one.errors[0]
    assert one.ts[-1] == 0 and one.ts[0] == ts[0] and np.all(np.diff(one.ts) < 0)


def test_usual_grids_share_their_ends():
    for schedule, clean in ((VP, True), (FLOW, True), (VE, False)):
        grids = usual_grids(schedule, 5, clean=clean)
        assert set(grids) == {"uniform", "quadratic", "log-snr", "karras"}
        for name, ts in grids.items():
            assert ts.shape == (6,) and ts[0] == np.float32(schedule.t_max), name
            np.testing.assert_allclose(ts[-2 if clean else -1], schedule.t_min, rtol=1e-3)
            assert np.all(np.diff(ts) < 0)
    quadratic = schedules.quadratic_grid(VP, 5, t_min=0.04, t_max=0.64)
    np.testing.assert_allclose(quadratic, [0.64, 0.4225, 0.25, 0.1225, 0.04, 0.0], rtol=1e-5)


def test_errors(key, unchecked):
    white = lambda x, t: x / (1 + t**2)
    ts, x_T = np.asarray(schedules.karras_grid(3)), jnp.ones((4, 2))

    def search(ts=ts, x_T=x_T, **options):
        options = {"solver": solvers.euler()} | options
        return sampling.search_grid(key, white, VE, ts, x_T, **options)

    with pytest.raises(ValueError, match="nothing to search: expected 2 steps or more, got 1"):
        search(ts[-2:])
    with pytest.raises(ValueError, match="too few starts"):
        search(x_T=x_T[:1])
    with pytest.raises(ValueError, match="wrong shape of reference"):
        search(reference=x_T[:2])
    with pytest.raises(ValueError, match=r"samples of a random solver .* give a distance_fn"):
        search(solver=solvers.ancestral())
    run = {"nfe": 4, "solvers": {"rk4": solvers.rk4()}}
    with pytest.raises(ValueError, match="steps of rk4: expected 2 or more, got 1"):
        sampling.search_sampler(key, white, VE, x_T, **run)
