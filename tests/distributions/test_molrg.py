import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.stats import chisquare

from lowdim_diffusion.distributions import MoLRG
from lowdim_diffusion.linalg import random_frames

NUM_DRAWS = 200_000  # one compiled sampler for all tests
LEVELS = [(1.0, 0.05), (1.0, 0.7), (0.6, 0.8), (0.1, 0.995), (1.0, 30.0)]


@functools.partial(jax.jit, static_argnames="num")
def draw(p, key, num):
    return p.sample(key, num)


def points(p, num, seed=0):
    """Samples as a numpy array."""
    return np.array(draw(p, jax.random.key(seed), num)[0])


def frames(num_components, dim, rank, seed=0, dtype=np.float64):
    normal = np.random.default_rng(seed).normal(size=(num_components, dim, rank))
    return np.linalg.qr(normal)[0].astype(dtype)


def noise(shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape)


def axes(dtype=None):
    return MoLRG(jnp.eye(2, dtype=dtype)[:, :, None])


# Reference values: the closed forms in float64, kept with the definitions of the metrics.
HAND_CHECK = [
    # x, sigma, log p, w_1, D, score, J
    ((1, 1), 1, -2.934450656689318, 0.5, (0.25, 0.25), (-0.75, -0.75),
     [[0.3125, -0.0625], [-0.0625, 0.3125]]),
    ((1, 0), 1, -2.551658417370420, 0.5621765008857981, (0.2810882504428991, 0),
     (-0.718911749557101, 0), [[0.342621771127, 0], [0, 0.218911749557]]),
    ((1, 0.5), 0.5, -2.586166374728419, 0.7685247834990178, (0.614819826799214, 0.092590086600393),
     (-1.540720692803, -1.629639653598),
     [[1.070229594855, -0.227704884028], [-0.227704884028, 0.299032615215]]),
    ((1, 0.5), 1e-3, -124996.1232689680, 1, (0.9999990000010, 0), (-0.999999000001, -500000),
     [[0.999999000001, 0], [0, 0]]),
    ((1, 0.5), 100, -11.04832993276101, 0.5000000009374, (4.99950005937e-5, 2.49975002031e-5),
     (-9.99950005e-5, -4.99975002e-5), None),
    ((0, 0), 1, -2.184450656689318, 0.5, (0, 0), (0, 0), [[0.25, 0], [0, 0.25]]),
]  # fmt: skip


@pytest.mark.parametrize("row", HAND_CHECK, ids=lambda row: f"x={row[0]},sigma={row[1]}")
def test_hand_check(x64, evaluate, row):
    point, sigma, log_p, w_1, mean, score, jacobian = row
    got = evaluate(axes(), jnp.array([point], jnp.float64), 1.0, float(sigma))
    np.testing.assert_allclose(got["log_prob"][0], log_p, rtol=1e-15, atol=2e-15)
    np.testing.assert_allclose(got["posterior_weights"][0, 0], w_1, rtol=1e-13)
    np.testing.assert_allclose(got["posterior_mean"][0], mean, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(got["score"][0], score, rtol=3e-9, atol=1e-15)
    if jacobian is not None:
        np.testing.assert_allclose(got["posterior_jacobian"][0], jacobian, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha, sigma", LEVELS)
@pytest.mark.parametrize("noise_std", [0.2, 0.0])
def test_agrees_with_dense_covariances(
    x64, evaluate, dense_mixture, mixture_arguments, alpha, sigma, noise_std
):
    arguments = mixture_arguments() | {"noise_std": np.float64(noise_std)}
    gram = arguments["bases"][0].T @ arguments["bases"][2]
    assert np.abs(gram).max() > 0.3  # oblique, or the test would show less than it says
    p, dense = MoLRG(**arguments), dense_mixture.of(**arguments)
    rng = np.random.default_rng(1)
    x = alpha * points(p, 4) + sigma * rng.normal(size=(4, 9))
    for name, value in evaluate(p, x, alpha, sigma).items():
        reference = getattr(dense, name)(x, alpha, sigma)
        np.testing.assert_allclose(value, reference, rtol=1e-8, atol=1e-9, err_msg=name)


def test_levels_per_example_equal_one_level_for_all(x64, evaluate, mixture_arguments):
    p, x = MoLRG(**mixture_arguments()), 2 * noise((4, 9))
    alpha, sigma = np.array([1.0, 0.5, 0.2, 1.0]), np.array([0.1, 0.7, 5.0, 40.0])
    shared = [evaluate(p, x, float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]
    for name, value in evaluate(p, x, alpha, sigma).items():
        expected = np.stack([one[name][i] for i, one in enumerate(shared)])
        np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-13, err_msg=name)


@functools.partial(jax.jit, static_argnames="mode")
def autodiff_jacobian(p, x, alpha, sigma, mode):
    return jax.vmap(mode(lambda x: p.posterior_mean(x[None], alpha, sigma)[0]))(x)


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.3), (0.7, 1.1), (0.0, 1.0)])
@pytest.mark.parametrize("noise_std", [0.2, 0.0])
def test_jacobian_is_the_derivative(
    x64, evaluate, mixture_arguments, finite_differences, alpha, sigma, noise_std
):
    p = MoLRG(**(mixture_arguments() | {"noise_std": np.float64(noise_std)}))
    x = alpha * points(p, 4) + sigma * noise((4, 9))
    jacobian = np.asarray(evaluate(p, x, alpha, sigma)["posterior_jacobian"])
    mean = lambda x: evaluate(p, x, alpha, sigma)["posterior_mean"]
    np.testing.assert_allclose(jacobian, finite_differences(mean, x), atol=1e-6)
    for mode in (jax.jacfwd, jax.jacrev):
        automatic = autodiff_jacobian(p, x, alpha, sigma, mode)
        np.testing.assert_allclose(jacobian, automatic, atol=1e-11)
    np.testing.assert_allclose(jacobian, jacobian.transpose(0, 2, 1), atol=1e-15)
    assert np.linalg.eigvalsh(jacobian).min() > -1e-12


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_jacobian_of_the_plain_model_is_lemma_2(x64, evaluate, sigma):
    """LOCO Edit, arXiv 2409.02374, lemma 2 (zero means, unit scales, variance exploding)."""
    bases = frames(3, 9, 4)
    p = MoLRG(bases)
    x = points(p, 4) + sigma * noise((4, 9))
    projectors = np.einsum("knd,kmd->knm", bases, bases)
    projected = np.einsum("knm,bm->bkn", projectors, x)
    energy = np.sum(projected**2, axis=-1) / (2 * sigma**2 * (1 + sigma**2))
    w = np.exp(energy - energy.max(-1, keepdims=True))
    w = w / w.sum(-1, keepdims=True)
    got = evaluate(p, x, 1.0, sigma)
    np.testing.assert_allclose(got["posterior_weights"], w, atol=1e-12)
    mean = np.einsum("bk,bkn->bn", w, projected)
    np.testing.assert_allclose(got["posterior_mean"], mean / (1 + sigma**2), atol=1e-12)
    c = 1 / (sigma**2 * (1 + sigma**2))
    outer = np.einsum("bk,bkn,bkm->bnm", w, projected, projected)
    inner = outer - np.einsum("bn,bm->bnm", mean, mean)
    expected = (np.einsum("bk,knm->bnm", w, projectors) + c * inner) / (1 + sigma**2)
    np.testing.assert_allclose(got["posterior_jacobian"], expected, atol=1e-11)


def test_rank_of_the_exact_denoiser_against_noise(x64, evaluate, key):
    """n = 48, K = 2, d = 6: the ratio grows from d/n to 2d/n (arXiv 2409.02426, rank figure)."""
    p = MoLRG(random_frames(key, 2, 48, 6, orthogonal=True, dtype=jnp.float64))
    x0, eps = points(p, 200), noise((200, 48))
    inverse_sigma = [500, 125, 50, 10, 1.67, 0.91, 0.3, 0.12, 0.08, 0.04, 0.02, 0.01]
    expected = [0.125] * 4 + [0.134, 0.193] + [0.25] * 6
    for inverse, ratio in zip(inverse_sigma, expected, strict=True):
        got = evaluate(p, x0 + eps / inverse, 1.0, 1 / inverse, names=("posterior_jacobian",))
        singular = np.linalg.svd(got["posterior_jacobian"], compute_uv=False)
        assert np.all(singular[:, 12:] < 1e-10 * singular[:, :1])  # rank <= K d, always
        energy = np.cumsum(singular**2, axis=-1)
        ranks = 1 + np.sum(np.sqrt(energy / energy[:, -1:]) <= 0.99, axis=-1)
        tolerance = 0.015 if inverse in (1.67, 0.91) else 1e-12
        assert abs(ranks.mean() / 48 - ratio) <= tolerance, (inverse, ranks.mean() / 48)


def test_unequal_ranks_carry_the_determinant_factor(x64, evaluate):
    """Unit-variance subspaces of ranks 1 and 2: lemma 1 times (s^2/(1+s^2))^(d_k/2)."""
    bases = jnp.stack([jnp.eye(5)[:, :2], jnp.eye(5)[:, 2:4]])
    p = MoLRG(bases, scales=jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    x, sigma = jnp.array([[0.9, 0.4, 0.3, -0.5, 0.2]]), 0.8
    phi = 1 / (2 * sigma**2 * (1 + sigma**2))
    ratio = sigma**2 / (1 + sigma**2)
    unnormalised = np.exp([phi * 0.9**2, phi * (0.3**2 + 0.5**2)]) * [ratio**0.5, ratio]
    expected = unnormalised / unnormalised.sum()
    weights = evaluate(p, x, 1.0, sigma, names=("posterior_weights",))["posterior_weights"]
    np.testing.assert_allclose(weights[0], expected, rtol=1e-12)


def test_a_zero_scale_is_the_same_as_a_missing_column(x64, evaluate, mixture_arguments):
    arguments = mixture_arguments(num_components=1)
    names = ("log_prob", "score", "posterior_jacobian")
    wide = arguments | {"scales": np.array([[1.5, 0.7, 0, 0]])}
    narrow = arguments | {"bases": arguments["bases"][:, :, :2], "scales": np.array([[1.5, 0.7]])}
    x = noise((4, 9))
    padded = wide | {"bases": wide["bases"] * (wide["scales"][:, None, :] > 0)}
    expected = evaluate(MoLRG(**narrow), x, 0.8, 0.6, names)
    for arguments in (wide, padded):
        for name, value in evaluate(MoLRG(**arguments), x, 0.8, 0.6, names).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-13)


def test_invariances(x64, evaluate, mixture_arguments):
    """Relabelling permutes the weights; rotating a basis of equal scales does nothing."""
    arguments, x = mixture_arguments(), noise((4, 9))
    order = np.array([2, 0, 1])
    permuted = arguments | {k: arguments[k][order] for k in ("bases", "weights", "means", "scales")}
    np.testing.assert_allclose(
        evaluate(MoLRG(**permuted), x, 1.0, 0.5)["posterior_weights"],
        evaluate(MoLRG(**arguments), x, 1.0, 0.5)["posterior_weights"][:, order],
        rtol=1e-12,
    )
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    np.testing.assert_allclose(
        evaluate(MoLRG(arguments["bases"] @ turn), x, 1.0, 0.5)["score"],
        evaluate(MoLRG(arguments["bases"]), x, 1.0, 0.5)["score"],
        rtol=1e-10,
    )


@pytest.mark.parametrize("noise_std", [0.0, 0.05])
def test_float32_follows_float64(x64, evaluate, mixture_arguments, noise_std):
    """Bounds: rounding of x is eps |x| / sigma relative to the noise, and it enters twice."""
    double = mixture_arguments(dim=48, rank=6) | {"noise_std": np.float64(noise_std)}
    # Parameters that both precisions represent, or the two would be different distributions.
    rounded = {name: np.float32(value) for name, value in double.items()}
    single = MoLRG(**rounded)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single)
    x0, eps = points(exact, 64), noise((64, 48))
    for sigma in np.geomspace(1e-4, 1e3, 15):
        sigma = float(np.float32(sigma))
        x = (x0 + sigma * eps).astype(np.float32)
        exactly = evaluate(exact, x.astype(np.float64), 1.0, sigma)
        for name, low in evaluate(single, x, 1.0, sigma).items():
            high = np.asarray(exactly[name])
            assert low.dtype == jnp.float32
            assert np.isfinite(low).all(), (name, sigma)
            error = np.abs(low - high).max() / np.abs(high).max()
            allowed = 2e-5 + 6e-7 / np.hypot(sigma, noise_std) * (name in ("score", "log_prob"))
            assert error < allowed, (name, sigma, error)


def test_moments_and_samples(x64, mixture_arguments):
    """Monte-Carlo bounds: 5 standard errors, those of the covariance estimated from the samples."""
    p, num = MoLRG(**mixture_arguments()), NUM_DRAWS
    x, labels = map(np.asarray, draw(p, jax.random.key(0), num))
    mean, covariance = p.moments()
    assert np.all(np.abs(x.mean(0) - mean) < 5 * np.sqrt(np.diag(covariance) / num))
    centred = x - np.asarray(mean)
    products = centred[:, :, None] * centred[:, None, :]
    bound = 5 * products.reshape(num, -1).std(0).reshape(9, 9) / np.sqrt(num)
    assert np.all(np.abs(products.mean(0) - covariance) < bound)
    counts = np.bincount(labels, minlength=3)
    assert chisquare(counts, num * np.asarray(p.weights)).pvalue > 1e-4
    for k in range(3):
        members = x[labels == k]
        factor = np.asarray(p.bases[k]) * np.asarray(p.scales[k])
        expected = factor @ factor.T + 0.04 * np.eye(9)
        np.testing.assert_allclose(np.cov(members.T), expected, atol=0.06)
        np.testing.assert_allclose(members.mean(0), p.means[k], atol=0.03)


def test_noise_lies_in_the_subspaces_of_the_others(x64, key):
    """Covariance U_k U_k^T + delta^2 of the others; a zero column stays out of all of them."""
    bases = np.array(random_frames(key, 3, 8, 2, orthogonal=True, dtype=jnp.float64))
    bases[1, :, 1] = 0
    p = MoLRG.noisy(bases, 0.3, [0.5, 0.3, 0.2])
    projectors = bases @ bases.transpose(0, 2, 1)
    others = projectors.sum(0)[None] - projectors
    shares = p.bases * p.scales[:, None, :]
    np.testing.assert_allclose(
        shares @ shares.transpose(0, 2, 1), projectors + 0.09 * others, atol=1e-12
    )
    np.testing.assert_allclose(p.weights, [0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match=r"MoLRG.noisy: \[U_1 .. U_K\] is no frame"):
        MoLRG.noisy(frames(2, 8, 2), 0.3)


def test_samples_without_floor_lie_on_their_subspace(x64, key):
    p = MoLRG(frames(3, 9, 4))
    x, labels = (np.asarray(value)[:300] for value in draw(p, key, NUM_DRAWS))
    for k in range(3):
        span = np.linalg.svd(x[labels == k].T, full_matrices=False)[0][:, :4]
        assert subspace_angles(span, np.asarray(p.bases[k])).max() < 1e-7


def test_zero_noise_limit(x64, evaluate, mixture_arguments):
    arguments, x = mixture_arguments(), noise((4, 9))
    floor = evaluate(MoLRG(**arguments), x, 0.5, 0.0)
    np.testing.assert_allclose(floor["posterior_mean"], x / 0.5, rtol=1e-12)
    sharp = MoLRG(**(arguments | {"noise_std": np.float64(0)}))
    x0, labels = map(np.asarray, draw(sharp, jax.random.key(1), 4))
    on = evaluate(sharp, 0.5 * x0, 0.5, 0.0)
    np.testing.assert_allclose(on["posterior_mean"], x0, atol=1e-12)
    np.testing.assert_array_equal(np.argmax(on["posterior_weights"], axis=-1), labels)
    # Off the support: the projection onto the nearest affine subspace, as for tiny noise.
    limit, near = evaluate(sharp, x, 1.0, 0.0), evaluate(sharp, x, 1.0, 1e-5)
    for name in ("posterior_mean", "posterior_weights", "posterior_jacobian"):
        np.testing.assert_allclose(limit[name], near[name], atol=1e-8)
    assert np.abs(limit["posterior_mean"] - x).max() > 0.1


@pytest.mark.parametrize("double", [False, True])
def test_log_prob_without_a_density(evaluate, double):
    """The limits of sigma -> 0: plus infinity on the support, minus infinity off it."""
    with jax.enable_x64(double):
        p = MoLRG(frames(2, 48, 6, dtype=np.float64 if double else np.float32))
        coefficients = noise((2, 50, 6), seed=1)
        on = np.concatenate(np.einsum("knd,kbd->kbn", p.bases, coefficients)).astype(p.means.dtype)
        off = on + 1e-3 * noise(on.shape).astype(on.dtype)
        log_prob = lambda *args: evaluate(p, *args, names=("log_prob",))["log_prob"]
        np.testing.assert_array_equal(log_prob(on), np.inf)
        np.testing.assert_array_equal(log_prob(off), -np.inf)
        np.testing.assert_array_equal(log_prob(0.3 * on, 0.3, 0.0), np.inf)
        assert np.isfinite(log_prob(off, 1.0, 1e-4)).all()
        same = MoLRG(p.bases, means=np.ones((2, 48)))
        np.testing.assert_array_equal(evaluate(same, on, names=("log_prob",))["log_prob"], -np.inf)


def test_a_full_rank_component_has_a_density_without_noise(
    x64, evaluate, dense_mixture, mixture_arguments
):
    arguments = mixture_arguments(num_components=1, dim=4, rank=4) | {"noise_std": np.float64(0)}
    p, dense = MoLRG(**arguments), dense_mixture.of(**arguments)
    x = np.random.default_rng(0).normal(size=(5, 4))
    got = evaluate(p, x, names=("log_prob",))["log_prob"]
    np.testing.assert_allclose(got, dense.log_prob(x, 1.0, 0.0), rtol=1e-10)


def test_a_component_of_zero_weight_is_ignored(x64, evaluate, mixture_arguments):
    arguments = mixture_arguments()
    p = MoLRG(**(arguments | {"weights": np.array([2.0, 0.0, 6.0])}))
    np.testing.assert_allclose(p.weights, [0.25, 0, 0.75])
    kept = {k: arguments[k][[0, 2]] for k in ("bases", "means", "scales")}
    rest = MoLRG(**kept, weights=np.array([0.25, 0.75]), noise_std=arguments["noise_std"])
    x = noise((4, 9))
    got, expected = evaluate(p, x, 1.0, 0.5), evaluate(rest, x, 1.0, 0.5)
    np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-11)
    gradient = jax.jit(jax.grad(lambda p: p.log_prob(x, 1.0, 0.5).sum()))(p)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(np.asarray(draw(p, jax.random.key(0), NUM_DRAWS)[1]) == 1)


def test_gradients_in_the_parameters(x64, mixture_arguments):
    """Against central differences of the log-likelihood, leaf by leaf, in a random direction."""
    p = MoLRG(**mixture_arguments())
    x = noise((4, 9))
    loss = jax.jit(lambda p: p.log_prob(x, 0.8, 0.4).sum())
    gradient = jax.jit(jax.grad(loss))(p)
    for field in ("weights", "means", "scales", "noise_std"):
        value = getattr(p, field)
        direction = noise(value.shape) * np.where(value == 0, 0, 1)
        moved = [jax.tree.map(lambda leaf: leaf, p) for _ in range(2)]
        for q, step in zip(moved, (1e-6, -1e-6), strict=True):
            object.__setattr__(q, field, np.asarray(value) + step * direction)
        numerical = (loss(moved[0]) - loss(moved[1])) / 2e-6
        analytic = np.sum(np.asarray(getattr(gradient, field)) * direction)
        np.testing.assert_allclose(analytic, numerical, rtol=1e-6)


def test_defaults_and_replace():
    p = MoLRG(frames(3, 7, 2))
    np.testing.assert_allclose(p.weights, np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(p.means, np.zeros((3, 7)))
    np.testing.assert_array_equal(p.scales, np.ones((3, 2)))
    q = dataclasses.replace(p, noise_std=0.5)
    np.testing.assert_array_equal(q.bases, p.bases)
    assert float(q.noise_std) == 0.5


def test_construction_inside_transformations(x64):
    bases, x = frames(2, 5, 2), noise((3, 5))
    build = lambda s: MoLRG(bases, scales=s * np.ones((2, 2)), noise_std=0.1 * s).log_prob(x)
    several = jax.jit(jax.vmap(build))(jnp.array([0.5, 0.7]))
    np.testing.assert_allclose(several[1], jax.jit(build)(0.7), rtol=1e-12)
    slope = jax.jit(jax.grad(lambda s: build(s).sum()))(0.7)
    numerical = (jax.jit(build)(0.7 + 1e-6) - jax.jit(build)(0.7 - 1e-6)).sum() / 2e-6
    np.testing.assert_allclose(slope, numerical, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bases": np.eye(3)}, r"wrong shape of bases: expected \(any, any, any\), got \(3, 3\)"),
        ({"bases": np.ones((1, 2, 3))}, "1 <= rank <= dim"),
        ({"bases": 2 * np.eye(4)[None, :, :2]}, r"not orthonormal.*linalg\.orthonormalize"),
        ({"weights": np.ones(3)}, r"wrong shape of weights: expected \(1,\), got \(3,\)"),
        ({"weights": np.zeros(1)}, "all zero"),
        ({"weights": -np.ones(1)}, "weights out of range"),
        ({"scales": np.ones(2)}, "wrong shape of scales.*one per column"),
        ({"scales": -np.ones((1, 2))}, "scales out of range"),
        ({"scales": np.full((1, 2), np.nan)}, "scales out of range"),
        ({"means": np.zeros(4)}, "wrong shape of means"),
        ({"noise_std": -0.1}, "noise_std out of range"),
        ({"noise_std": np.ones(2)}, "wrong shape of noise_std"),
    ],
)
def test_refused_parameters(change, message):
    arguments = {"bases": np.eye(4)[None, :, :2]} | change
    with pytest.raises(ValueError, match=message):
        MoLRG(**arguments)


@given(
    num_components=st.integers(1, 4),
    dim=st.integers(1, 8),
    rank=st.integers(1, 8),
    batch=st.integers(1, 3),
    log_sigma=st.floats(-9, 7),
    noise_std=st.sampled_from([0.0, 0.3]),
    single=st.booleans(),
)
@settings(
    deadline=None,
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a pure function
)
def test_identities_hold_for_all_shapes(
    evaluate, num_components, dim, rank, batch, log_sigma, noise_std, single
):
    rank = min(rank, dim)
    with jax.enable_x64(not single):
        dtype = np.float32 if single else np.float64
        p = MoLRG(frames(num_components, dim, rank, dtype=dtype), noise_std=noise_std)
        sigma = float(np.exp(log_sigma))
        x0 = np.asarray(p.bases[0]).sum(axis=-1)
        x = (x0 + sigma * noise((batch, dim))).astype(dtype)
        got = evaluate(p, x, 1.0, sigma)
        score, mean, log_prob = got["score"], got["posterior_mean"], got["log_prob"]
        weights, jacobian = got["posterior_weights"], got["posterior_jacobian"]
        assert weights.shape == (batch, num_components) and log_prob.shape == (batch,)
        assert score.shape == mean.shape == x.shape and jacobian.shape == (batch, dim, dim)
        for value in (score, mean, jacobian, log_prob):
            assert value.dtype == dtype and np.isfinite(value).all()
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=10 * eps)
        # Tweedie's formula, to the rounding of x
        size = 1 + float(np.abs(x).max())
        np.testing.assert_allclose(mean, x + sigma**2 * score, atol=100 * eps * size, rtol=0)
        atol = 10 * eps * float(np.abs(jacobian).max())
        np.testing.assert_allclose(jacobian, np.swapaxes(jacobian, 1, 2), rtol=0, atol=atol)
