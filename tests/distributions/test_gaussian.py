import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal

from lowdim_diffusion import schedules
from lowdim_diffusion.distributions import Gaussian, MoLRG


def arguments(dim=6, rank=3, noise_std=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=dim), rng.normal(size=(dim, rank)), noise_std


def covariance(factor, noise_std):
    return factor @ factor.T + noise_std**2 * np.eye(factor.shape[0])


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_log_prob_is_scipys(x64, evaluate, rank):
    mean, factor, noise_std = arguments(rank=rank)
    p, x = Gaussian(mean, factor, noise_std), np.random.default_rng(1).normal(size=(4, 6))
    log_prob = lambda *args: evaluate(p, x, *args, names=("log_prob",))["log_prob"]
    c = covariance(factor, noise_std)
    np.testing.assert_allclose(log_prob(), multivariate_normal(mean, c).logpdf(x), rtol=1e-11)
    noisy = multivariate_normal(0.6 * mean, 0.36 * c + 0.25 * np.eye(6))
    np.testing.assert_allclose(log_prob(0.6, 0.5), noisy.logpdf(x), rtol=1e-12)


@pytest.mark.parametrize("rank, noise_std", [(3, 0.3), (3, 0.0), (9, 0.0)])
def test_against_dense_covariance(x64, evaluate, dense_mixture, rank, noise_std):
    mean, factor, _ = arguments(rank=rank)
    p, x = Gaussian(mean, factor, noise_std), np.random.default_rng(1).normal(size=(4, 6))
    dense = dense_mixture([1.0], [mean], [covariance(factor, noise_std)])
    for alpha, sigma in [(1.0, 0.1), (0.6, 0.8), (1.0, 20.0)]:
        for name, value in evaluate(p, x, alpha, sigma).items():
            expected = getattr(dense, name)(x, alpha, sigma)
            np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    "factor",
    [
        np.random.default_rng(0).normal(size=(5, 2)),
        np.random.default_rng(0).normal(size=(5, 8)),
        np.outer(np.arange(1.0, 6.0), np.ones(4)),
        np.eye(5),
        np.zeros((5, 2)),
    ],
    ids=["tall", "wide", "rank 1", "equal", "zero"],
)
def test_canonical_factor_keeps_the_covariance(x64, factor):
    p = Gaussian(np.zeros(5), factor)
    stored, basis, scales = map(np.asarray, (p.cov_factor, p.basis, p.scales))
    np.testing.assert_allclose(stored @ stored.T, factor @ factor.T, atol=1e-13)
    np.testing.assert_allclose(basis * scales, stored, atol=1e-15)
    rank = np.linalg.matrix_rank(factor)
    assert np.sum(scales > 0) == rank
    np.testing.assert_allclose(basis.T @ basis, np.diag(np.arange(scales.size) < rank), atol=1e-14)
    np.testing.assert_allclose(p.moments()[1], factor @ factor.T, atol=1e-13)


def test_point_mass(x64, evaluate):
    """Covariance zero: the denoiser is the mean at every noise level and the score points to it."""
    mean = np.arange(4.0)
    p, x = Gaussian(mean, np.zeros((4, 1))), np.random.default_rng(0).normal(size=(3, 4))
    for sigma in (0.0, 1e-4, 1.0, 1e3):
        got = evaluate(p, x, 1.0, sigma)
        np.testing.assert_allclose(got["posterior_mean"], np.tile(mean, (3, 1)))
        np.testing.assert_array_equal(got["posterior_jacobian"], 0)
        if sigma:
            np.testing.assert_allclose(got["score"], (mean - x) / sigma**2, rtol=1e-12)


def test_without_a_density(evaluate):
    p = Gaussian(np.ones(5), np.eye(5)[:, :2])
    on = np.array([[3.0, -2, 1, 1, 1]])
    log_prob = lambda x: evaluate(p, x, names=("log_prob",))["log_prob"]
    assert log_prob(on) == np.inf
    assert log_prob(on + np.array([[0, 0, 1e-3, 0, 0]])) == -np.inf


def test_fit_is_the_empirical_mean_and_covariance(x64):
    rng = np.random.default_rng(0)
    for num, dim in ((50, 8), (8, 50)):
        data = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + 100
        p = Gaussian.fit(data)
        mean, cov = p.moments()
        np.testing.assert_allclose(mean, data.mean(0), rtol=1e-13)
        np.testing.assert_allclose(cov, np.cov(data.T, ddof=0), rtol=1e-9, atol=1e-9)
        assert p.cov_factor.shape == (dim, min(num, dim))
    truncated = Gaussian.fit(data, rank=3, noise_std=0.1)
    values, vectors = np.linalg.eigh(np.cov(data.T, ddof=0))
    expected = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T + 0.01 * np.eye(dim)
    np.testing.assert_allclose(truncated.moments()[1], expected, rtol=1e-9, atol=1e-9)


def test_fit_in_float32_with_a_large_offset():
    data = np.random.default_rng(0).normal(size=(20_000, 3)) + 300
    p = Gaussian.fit(data.astype(np.float32))
    np.testing.assert_allclose(p.moments()[1], np.cov(data.T, ddof=0), atol=2e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_wiener_theorem(x64, sigma):
    """Least squares over affine denoisers gives the Gaussian's (arXiv 2410.24060, theorem 1).

    The draws +- sigma sqrt(n) e_i have exactly the first two moments of the noise, and a quadratic
    loss sees no others: the fit has no Monte-Carlo error.
    """
    rng = np.random.default_rng(0)
    dim, num = 7, 40
    data = rng.exponential(size=(num, 3)) @ rng.normal(size=(3, dim))
    data = data + 0.1 * rng.uniform(size=data.shape) + 2
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    draws = sigma * np.sqrt(dim) * np.concatenate([turn, -turn])
    noisy = (data[:, None] + draws[None]).reshape(-1, dim)
    clean = np.repeat(data, 2 * dim, axis=0)
    design = np.concatenate([noisy, np.ones((len(noisy), 1))], axis=1)
    solution, _, _, _ = np.linalg.lstsq(design, clean, rcond=None)
    denoise = jax.jit(Gaussian.fit(data).denoiser(schedules.VE()))
    np.testing.assert_allclose(denoise(noisy, sigma), design @ solution, atol=1e-10)


def test_wiener_filter_beats_other_affine_denoisers_by_the_mmse(x64):
    """E ||D(x) - x_0||^2 by Monte Carlo equals the closed form within 5 standard errors."""
    mean, factor, noise_std = arguments()
    p = Gaussian(mean, factor, noise_std)
    x0, _ = jax.jit(p.sample, static_argnums=1)(jax.random.key(0), 20_000)
    eps = np.random.default_rng(0).normal(size=x0.shape)
    for alpha, sigma in ((1.0, 0.5), (0.6, 0.8)):
        error = jax.jit(p.posterior_mean)(alpha * x0 + sigma * eps, alpha, sigma) - x0
        squared = np.sum(np.asarray(error) ** 2, axis=-1)
        mmse = p.mmse(alpha, sigma)
        assert abs(squared.mean() - mmse) < 5 * squared.std() / np.sqrt(len(squared))
        eigenvalues = np.linalg.eigvalsh(covariance(factor, noise_std))
        expected = np.sum(eigenvalues * sigma**2 / (alpha**2 * eigenvalues + sigma**2))
        np.testing.assert_allclose(mmse, expected, rtol=1e-12)


def test_mmse_at_the_ends(x64):
    p = Gaussian(np.zeros(3), np.eye(3)[:, :2], 0.0)
    np.testing.assert_allclose(p.mmse(1.0, jnp.array([0.0, 1.0, 1e8])), [0, 1, 2])
    np.testing.assert_allclose(p.mmse(0.0, 1.0), 2)


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("noise_std", [0.3, 0.0])
def test_flow_solves_the_probability_flow_ode(x64, rank, noise_std):
    """dx/ds = -s score(x, s), integrated by scipy from the dense score."""
    mean, factor, _ = arguments(rank=rank)
    p, c = Gaussian(mean, factor, noise_std), covariance(factor, noise_std)
    x = np.random.default_rng(2).normal(size=(3, 6)) * 4
    flow = jax.jit(p.flow)

    def velocity(s, flat):
        centred = flat.reshape(3, 6) - mean
        return (s * np.linalg.solve(c + s**2 * np.eye(6), centred.T).T).ravel()

    end = solve_ivp(velocity, (4.0, 0.2), x.ravel(), rtol=1e-11, atol=1e-11).y[:, -1]
    np.testing.assert_allclose(flow(x, 1.0, 4.0, 1.0, 0.2), end.reshape(3, 6), atol=1e-8)


def test_flow_is_a_group_and_maps_the_law(x64):
    mean, factor, noise_std = arguments()
    p = Gaussian(mean, factor, noise_std)
    flow = jax.jit(p.flow)
    x = np.random.default_rng(2).normal(size=(4, 6))
    there = flow(x, 1.0, 0.0, 0.6, 0.8)
    np.testing.assert_allclose(flow(there, 0.6, 0.8, 1.0, 0.0), x, atol=1e-12)
    np.testing.assert_allclose(
        flow(flow(x, 1.0, 0.1, 0.9, 0.4), 0.9, 0.4, 0.6, 0.8), flow(x, 1.0, 0.1, 0.6, 0.8)
    )
    # The map is affine: its matrix A carries one covariance into the other.
    images = np.asarray(flow(np.concatenate([np.eye(6), np.zeros((1, 6))]), 1.0, 2.0, 0.6, 0.8))
    a = (images[:6] - images[6]).T
    c = covariance(factor, noise_std)
    np.testing.assert_allclose(
        a @ (c + 4 * np.eye(6)) @ a.T, 0.36 * c + 0.64 * np.eye(6), atol=1e-11
    )
    per_example = flow(x, 1.0, np.full(4, 2.0), np.full(4, 0.6), 0.8)
    np.testing.assert_allclose(per_example, flow(x, 1.0, 2.0, 0.6, 0.8))


def test_flow_to_zero_noise_projects_onto_the_support(x64):
    p = Gaussian(np.ones(4), np.eye(4)[:, :2])
    x = np.random.default_rng(0).normal(size=(3, 4))
    end = np.asarray(jax.jit(p.flow)(x, 1.0, 5.0, 1.0, 0.0))
    np.testing.assert_allclose(end[:, 2:], 1)
    np.testing.assert_allclose(end[:, :2], 1 + (x[:, :2] - 1) / np.sqrt(26))


def test_equals_one_component_of_a_mixture(x64, evaluate, mixture_arguments):
    a = mixture_arguments(num_components=1)
    mixture = MoLRG(**a)
    p = Gaussian(a["means"][0], a["bases"][0] * a["scales"][0], a["noise_std"])
    x = np.random.default_rng(0).normal(size=(4, 9))
    expected = evaluate(mixture, x, 0.9, 0.4)
    for name, value in evaluate(p, x, 0.9, 0.4).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-10, atol=1e-12)


def first_images(path, num):
    with gzip.open(path) as file:
        file.read(16)
        pixels = np.frombuffer(file.read(num * 784), np.uint8)
    return pixels.reshape(num, 28, 28).astype(np.float32) / 255


# metrics reference: mmse of the Gaussian with the covariance of the first 10000 training images.
MMSE = {
    "mnist": ([0.057058, 2.638879, 9.532371, 26.923188, 45.051757], 52.752157),
    "fashion-mnist": ([0.074033, 3.338566, 10.179855, 23.492998, 43.436743], 68.497627),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MMSE)
def test_mmse_of_real_images(data_root, name):
    path = data_root / name / "train-images-idx3-ubyte.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} of {name}")
    p = Gaussian.fit(first_images(path, 10_000))
    expected, total = MMSE[name]
    np.testing.assert_allclose(p.mmse(1.0, jnp.array([0.01, 0.1, 0.3, 1, 3])), expected, rtol=2e-5)
    np.testing.assert_allclose(np.sum(np.asarray(p.scales) ** 2), total, rtol=2e-5)
    images = first_images(path, 64)
    noisy = images + np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    denoised = jax.jit(p.denoiser(schedules.VE()))(noisy, 1.0)
    assert denoised.shape == images.shape
    error = np.sum((np.asarray(denoised) - images) ** 2, axis=(1, 2)).mean()
    assert abs(error / expected[3] - 1) < 0.15


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": np.zeros((2, 2))}, "wrong shape of mean.*flatten"),
        ({"cov_factor": np.zeros((4, 2))}, r"wrong shape of cov_factor: expected \(3, any\)"),
        ({"cov_factor": np.zeros((3, 0))}, "at least one column"),
        ({"noise_std": -1.0}, "noise_std out of range"),
    ],
)
def test_refused_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**({"mean": np.zeros(3), "cov_factor": np.eye(3)} | change))


def test_refused_fits():
    with pytest.raises(ValueError, match="wrong shape of data"):
        Gaussian.fit(np.zeros(3))
    with pytest.raises(ValueError, match="rank too large: expected at most 3, got 4"):
        Gaussian.fit(np.zeros((5, 3)), rank=4)
    with pytest.raises(TypeError, match="rank must be an int"):
        Gaussian.fit(np.zeros((5, 3)), rank=True)
