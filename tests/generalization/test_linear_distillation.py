"""Linear distillation against numpy and the Wiener filter; linearity in closed form.

Sources of the formulas: Li, Dai, Qu 2024, arXiv 2410.24060 (theorem 1, scores).
"""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from lowdim_diffusion import data, generalization, linalg, sampling, schedules, solvers
from lowdim_diffusion.distributions import Empirical, Gaussian, MoLRG

VE = schedules.VE()
FLOW = schedules.RectifiedFlow()

distil = jax.jit(
    generalization.distill_linear, static_argnames=("denoise_fn", "ts", "num_draws", "block")
)
score = jax.jit(
    generalization.linearity_score, static_argnames=("denoise_fn", "coefficients", "num_tuples")
)
rmse = jax.jit(
    generalization.denoiser_rmse, static_argnames=("denoise_a", "denoise_b", "num_draws", "block")
)
wiener_filter = jax.jit(generalization.wiener_filter)


def points(num, dim, rank, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, rank)) @ rng.normal(size=(rank, dim)) + 1


def test_equals_numpys_least_squares_on_the_same_noisy_examples(x64, key):
    """Check 12: the streamed fit is the solution of the whole problem, whatever the blocks."""
    x = points(23, 5, 3)
    curved = lambda x_t, t: jnp.tanh(x_t) + 0.3 * x_t[:, ::-1] ** 2 - t
    whole = distil(key, curved, VE, (0.7,), x, num_draws=4)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, jnp.arange(4)), jnp.arange(23))
    eps = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (5,), jnp.float64)))(keys)
    noisy = (x[None, None] + 0.7 * np.stack([eps, -eps])).reshape(-1, 5)
    design = np.concatenate([noisy, np.ones((len(noisy), 1))], axis=1)
    solution = np.linalg.lstsq(design, np.asarray(curved(noisy, 0.7)), rcond=None)[0]
    np.testing.assert_allclose(whole.weight[0], solution[:-1].T, atol=1e-11)
    np.testing.assert_allclose(whole.bias[0], solution[-1], atol=1e-11)
    blocks = distil(key, curved, VE, (0.7,), x, num_draws=4, block=5)
    np.testing.assert_allclose(blocks.weight, whole.weight, atol=1e-12)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("schedule", "ts", "kind"),
    [
        pytest.param(VE, (80.0, 1.5, 0.117, 0.002), "images", id="VE"),
        pytest.param(schedules.VPLinear(), (1.0, 0.4, 0.02), "few and equal", id="VP", marks=slow),
        pytest.param(FLOW, (1.0, 0.5, 0.002), "one point", id="flow", marks=slow),
    ],
)
def test_affine_denoisers_are_found_to_rounding(schedule, ts, kind, key):
    """A Gaussian's denoiser, in float32, from images, rank-deficient data, fewer points than n."""
    few = points(6, 16, 2, seed=1)[[0, 1, 1, 2, 3, 3]]
    x = {"images": points(40, 16, 8, seed=1), "few and equal": few, "one point": few[:1]}[kind]
    p = Gaussian.fit(points(60, 16, 12).astype(np.float32))
    x = x.astype(np.float32).reshape(-1, 4, 4, 1)
    found = distil(key, p.denoiser(schedule), schedule, ts, x, num_draws=-(-80 // len(x)))
    expected = wiener_filter(p, schedule, jnp.array(ts))
    for i in range(len(ts)):
        size = np.linalg.norm(expected.weight[i]) + 1e-3  # at alpha = 0 there is no weight
        assert np.linalg.norm(found.weight[i] - expected.weight[i]) < 2e-4 * size
        np.testing.assert_allclose(found.bias[i], expected.bias[i], atol=1e-3)


@pytest.mark.slow
def test_posterior_means_of_images_have_the_wiener_filter_as_their_linear_part(key):
    """Theorem 1 on digits: the memorizing optimum is not linear, its best linear fit is D_G."""
    num, dim, ts = 64, 64, (4.07, 1.5, 0.117)
    x = data.load("digits", num_examples=num, seed=0).floats().reshape(num, dim)
    denoise_fn = Empirical(x).denoiser(VE)
    expected = wiener_filter(Gaussian.fit(x), VE, jnp.array(ts))
    errors = []
    for num_draws in (4, 64):
        found = distil(key, denoise_fn, VE, ts, x, num_draws=num_draws)
        squared = jnp.sum((found.weight - expected.weight) ** 2, axis=(1, 2))
        errors.append(np.sqrt(squared / jnp.sum(expected.weight**2, axis=(1, 2))))
        assert (errors[-1] < 1.5 * (dim / (2 * num * num_draws)) ** 0.5).all()
    assert (errors[0] / errors[1] > 2.5).all()  # Monte Carlo: 4 with 16 times the noise
    apart = rmse(key, denoise_fn, found, VE, jnp.array(ts), x)
    assert (apart[:2] > 0.02).all()


@pytest.mark.slow
def test_weights_agree_with_the_formula(x64):
    """``alpha C (alpha^2 C + sigma^2 I)^{-1}`` and ``b = (I - alpha W) m``, dense."""
    x, ts = points(9, 4, 3), (0.1, 0.9)
    schedule = schedules.VPLinear()
    found = wiener_filter(Gaussian.fit(x), schedule, jnp.array(ts))
    c = np.cov(x.T, ddof=0)
    for i, t in enumerate(ts):
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        w = a * c @ np.linalg.inv(a**2 * c + s**2 * np.eye(4))
        np.testing.assert_allclose(found.weight[i], w, atol=1e-12)
        np.testing.assert_allclose(found.bias[i], x.mean(0) - a * w @ x.mean(0), atol=1e-12)


@pytest.mark.parametrize(
    "schedule", [schedules.VPCosine(), pytest.param(FLOW, marks=slow)], ids=["VP", "flow"]
)
def test_is_a_denoiser_at_and_between_its_levels(x64, schedule):
    p = Gaussian.fit(points(50, 6, 4))
    ts = schedules.times_from_sigmas(schedule, np.geomspace(80, 0.002, 41))
    if schedule is FLOW:
        ts = ts.at[0].set(1.0)  # no signal at all
    fn = jax.jit(wiener_filter(p, schedule, jnp.flip(ts)))
    exact = jax.jit(p.denoiser(schedule))
    middle = 0.5 * (ts[20] + ts[21])
    mixed = np.array([ts[0], middle, ts[7], middle, ts[40]])
    x = np.random.default_rng(1).normal(size=(5, 2, 3)) * 3
    found, expected = fn(x, mixed), exact(x, mixed)
    np.testing.assert_allclose(found[::2], expected[::2], atol=1e-9)
    np.testing.assert_allclose(found[1::2], expected[1::2], atol=0.05)
    for i in (1, 4):
        np.testing.assert_allclose(fn(x, mixed[i])[i], found[i], atol=1e-12)
    mean = np.tile(schedule.alpha(middle) * p.mean, (5, 1)).reshape(5, 2, 3)
    np.testing.assert_allclose(fn(mean, middle)[0].ravel(), p.mean, atol=1e-9)


@pytest.mark.slow
def test_samplers_take_it(x64):
    """Along the levels of the grid it samples as the Gaussian does."""
    p, ts = Gaussian.fit(points(50, 4, 3)), schedules.karras_grid(5)
    linear = wiener_filter(p, VE, ts[:-1])
    noise = 80.0 * np.random.default_rng(1).normal(size=(7, 4))
    draw = jax.jit(
        lambda fn: sampling.sample(jax.random.key(0), fn, VE, ts, noise, solver=solvers.heun()).x
    )
    np.testing.assert_allclose(draw(linear), draw(p.denoiser(VE)), atol=1e-9)


@pytest.mark.parametrize(
    "schedule", [pytest.param(VE, marks=slow), schedules.VPLinear()], ids=["VE", "VP"]
)
def test_linear_denoisers_score_one(schedule, key):
    x, ts = points(50, 4, 4).astype(np.float32).reshape(50, 2, 2), jnp.array([0.9, 0.1])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    linear = lambda x_t, t: (x_t.reshape(-1, 4) @ turn / (1 + t)).reshape(x_t.shape)
    affine = lambda x_t, t: linear(x_t, t) + 3
    three = {"coefficients": (2 / 3, 2 / 3, -1 / 3), "about": x.mean(0)}
    for found in (
        score(key, linear, schedule, ts, x),
        score(key, affine, schedule, ts, x, **three),
    ):
        np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
        np.testing.assert_allclose(found.error, 0, atol=1e-5)
    # As published, the bias of an affine one comes in sqrt(2) times.
    assert (score(key, affine, schedule, ts, x).error > 0.2).all()


@pytest.mark.slow
def test_linearity_of_a_mixture_at_both_ends_and_between(key):
    """Linear at high noise; at low noise the sum of two subspaces is taken for one of them.

    There the score is 1 for parts of one component, and ``E sqrt(max(B, 1 - B))`` with B of the
    law Beta(d/2, d/2) for parts of two.
    """
    rank = 6
    p = MoLRG(linalg.random_frames(key, 2, 48, rank, orthogonal=True))
    x = jax.jit(p.sample, static_argnums=1)(key, 500)[0]
    found = score(key, p.denoiser(VE), VE, jnp.array([50.0, 1.0, 1e-3]), x, num_tuples=3000)
    beta = stats.beta(rank / 2, rank / 2)
    apart, _ = integrate.quad(lambda b: 2 * np.sqrt(b) * beta.pdf(b), 0.5, 1)
    assert found.cosine[0] > 0.999
    assert abs(found.cosine[2] - (1 + apart) / 2) < 0.01
    assert found.cosine[1] < 0.99


@pytest.mark.slow
def test_a_mixture_is_not_near_its_gaussian(key):
    """The two differ, over sigma, by the noise in the other subspaces: a chi variable of d (K - 1).

    So the Gaussian structure of trained networks is a property of images.
    """
    p = MoLRG(linalg.random_frames(key, 3, 48, 4, orthogonal=True))
    gaussian = Gaussian(jnp.zeros(48), jnp.concatenate(list(p.bases), axis=1) / 3**0.5)
    x = jax.jit(p.sample, static_argnums=1)(key, 2000)[0]
    apart = rmse(key, p.denoiser(VE), gaussian.denoiser(VE), VE, 0.01, x)
    chi = np.sqrt(2) * special.gamma(4.5) / special.gamma(4.0)
    np.testing.assert_allclose(apart / 0.01, chi / np.sqrt(48), rtol=0.02)


def test_rmse_is_the_mean_of_norms_at_every_level(key):
    """Between the identity and zero at x_0 = 0 it is ``sigma E[chi_n] / sqrt(n)``."""
    same, zero = lambda x_t, t: x_t, lambda x_t, t: 0 * x_t
    ts, x = jnp.array([0.1, 10.0]), np.zeros((400, 3, 1))
    found = rmse(key, same, zero, VE, ts, x, num_draws=20)
    chi = np.sqrt(2) * special.gamma(2.0) / special.gamma(1.5)
    np.testing.assert_allclose(found, np.array([0.1, 10.0]) * chi / 3**0.5, rtol=0.02)
    by_blocks = rmse(key, same, zero, VE, ts, x, num_draws=20, block=33)
    np.testing.assert_allclose(by_blocks, found, rtol=1e-5)


def test_compares_weights(key):
    """An error of a tenth, and principal subspaces that share one direction of two."""
    ts = jnp.ones(1)
    make = lambda d: generalization.LinearDenoiser(VE, ts, jnp.diag(d)[None], jnp.zeros((1, 4)))
    a, b = make(jnp.array([3.0, 2.0, 1.0, 0.0])), make(jnp.array([3.0, 1.0, 2.0, 0.0]))
    found = generalization.compare_weights(a, b, rank=2)
    np.testing.assert_allclose(found.nmse, 2 / 14, rtol=1e-6)
    np.testing.assert_allclose(found.affinity, 0.5**0.5, rtol=1e-6)


@pytest.mark.slow
def test_diverged_denoisers_show(key):
    same, broken = lambda x_t, t: x_t, lambda x_t, t: jnp.where(t > 1, jnp.nan, x_t)
    x = np.eye(4, dtype=np.float32)
    apart = rmse(key, broken, same, VE, jnp.array([0.5, 2.0]), x)
    cosine = score(key, broken, VE, jnp.array([0.5, 2.0]), x).cosine
    bias = distil(key, broken, VE, (0.5, 2.0), x).bias[:, 0]
    assert np.isnan(np.stack([apart, cosine, bias])).tolist() == [[False, True]] * 3


@pytest.mark.slow
def test_one_program_for_many_denoisers(key):
    """vmap over the parameters of a denoiser, under jit; a scalar time gives scalars."""
    x = points(30, 3, 3).astype(np.float32)

    def study(scale):
        fn = lambda x_t, t: scale * x_t
        linear = generalization.distill_linear(key, fn, VE, 1.0, x)
        return linear.weight[0, 0, 0], generalization.denoiser_rmse(key, fn, linear, VE, 1.0, x)

    scales = np.array([0.5, 2.0], np.float32)
    weight, apart = jax.jit(jax.vmap(study))(scales)
    np.testing.assert_allclose(weight, scales, rtol=1e-4)
    np.testing.assert_allclose(apart, 0, atol=1e-4)


same = lambda x_t, t: x_t
CALLS = {
    "distill_linear": lambda key, fn, t, x, **o: generalization.distill_linear(
        key, fn, VE, t, x, **o
    ),
    "linearity_score": lambda key, fn, t, x, **o: generalization.linearity_score(
        key, fn, VE, t, x, **o
    ),
    "denoiser_rmse": lambda key, fn, t, x, **o: generalization.denoiser_rmse(
        key, same, fn, VE, t, x, **o
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bad_input_is_refused(call, key):
    x = np.ones((20, 3), np.float32)
    for bad, message in {
        "nan": r"x is not finite: expected finite entries",
        "empty": r"wrong shape of x: expected \(N, \*data\)",
        "flat": r"wrong shape of x: expected \(N, \*data\)",
    }.items():
        examples = {"nan": np.where(np.eye(20, 3) > 0, np.nan, 1), "empty": x[:0], "flat": x[0]}
        with pytest.raises(ValueError, match=message):
            call(key, same, 1.0, examples[bad])
    for ts, message in (
        (schedules.karras_grid(4), r"ts out of range.*leave out t = 0"),
        ([1.0, 90.0], r"ts out of range: expected \(0, 80"),
        (np.ones((2, 2)), "wrong shape of ts"),
    ):
        with pytest.raises(ValueError, match=message):
            call(key, same, ts, x)
    with pytest.raises(ValueError, match="wrong shape of what denoise_fn returned"):
        jax.eval_shape(lambda x: call(key, lambda x_t, t: x_t[:, :2], 1.0, x), x)
    with pytest.raises(ValueError, match="block too small"):
        call(key, same, 1.0, x, block=0)


def test_unfit_settings_are_refused(key):
    x = np.ones((20, 3))
    with pytest.raises(ValueError, match=r"at least 2 n = 6, got 2 examples.*num_draws of 2"):
        generalization.distill_linear(key, same, VE, 1.0, x[:2], num_draws=1)
    with pytest.raises(ValueError, match="squares that add up to 1"):
        generalization.linearity_score(key, same, VE, 1.0, x, coefficients=(0.5, 0.5))
    with pytest.raises(ValueError, match="wrong shape of about"):
        generalization.linearity_score(key, same, VE, 1.0, x, about=np.ones(2))
    with pytest.raises(ValueError, match=r"N >= 2"):
        generalization.linearity_score(key, same, VE, 1.0, x[:1])
    make = lambda num: generalization.LinearDenoiser(
        VE, jnp.ones(num), jnp.ones((num, 3, 3)), jnp.ones((num, 3))
    )
    with pytest.raises(ValueError, match="size of an example: expected 3"):
        make(2)(jnp.ones((2, 4)), 1.0)
    with pytest.raises(ValueError, match="distil both at the same ts"):
        generalization.compare_weights(make(1), make(2))


# metrics reference: mmse of the Gaussian with the covariance of the first 10000 training images.
MMSE = {
    "mnist": [0.057058, 2.638879, 9.532371, 26.923188, 45.051757],
    "fashion-mnist": [0.074033, 3.338566, 10.179855, 23.492998, 43.436743],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MMSE)
def test_weights_of_real_images_give_the_published_errors(data_root, name):
    """``E ||D - x_0||^2 = sigma^2 tr W`` for a posterior mean."""
    path = data_root / name / "train-images-idx3-ubyte.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} of {name}")
    with gzip.open(path) as file:
        pixels = np.frombuffer(file.read(16 + 10_000 * 784), np.uint8)[16:]
    p = Gaussian.fit(pixels.reshape(10_000, 784).astype(np.float32) / 255)
    sigmas = np.array([0.01, 0.1, 0.3, 1, 3])
    found = generalization.wiener_filter(p, VE, sigmas)
    trace = np.trace(np.asarray(found.weight, np.float64), axis1=1, axis2=2)
    np.testing.assert_allclose(sigmas**2 * trace, MMSE[name], rtol=1e-4)
