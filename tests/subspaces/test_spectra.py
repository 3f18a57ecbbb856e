"""PCA, numerical rank and Jacobian spectra against dense linear algebra and closed forms."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lowdim_diffusion import distributions, linalg, schedules, subspaces

random_frames = jax.jit(
    linalg.random_frames, static_argnums=(1, 2, 3), static_argnames=("orthogonal", "dtype")
)


def jacobian_svd(fn, x, rank, **options):
    """Compiled whole: op by op costs several times as much."""
    return jax.jit(lambda x: subspaces.jacobian_svd(fn, x, rank, **options))(x)


def jacobian_spectrum(fn, x, **options):
    return jax.jit(lambda x: subspaces.jacobian_spectrum(fn, x, **options))(x)


def trajectory_spectra(fn, schedule, x, ts, **options):
    run = lambda x, ts: subspaces.trajectory_spectra(fn, schedule, x, ts, **options)
    return jax.jit(run)(x, ts)


def molrg_mean(bases, x, sigma):
    """Posterior mean of the equal-weight noise-free mixture, VE: papers' lemma 1."""
    coefficients = jnp.einsum("knd,bn->bkd", bases, x, precision="highest")
    w = jax.nn.softmax((coefficients**2).sum(-1) / (2 * sigma**2 * (1 + sigma**2)), axis=-1)
    mean = jnp.einsum("bk,knd,bkd->bn", w, bases, coefficients, precision="highest")
    return mean / (1 + sigma**2)


def molrg_jacobian(bases, x, sigma):
    """Its Jacobian in closed form (Chen et al. 2024, lemma 2, in EDM variables), float64 numpy."""
    bases, x = np.asarray(bases, np.float64), np.asarray(x, np.float64)
    out = []
    for xi in x:
        p = np.stack([u @ u.T @ xi for u in bases])
        logit = (p**2).sum(-1) / (2 * sigma**2 * (1 + sigma**2))
        w = np.exp(logit - logit.max())
        w /= w.sum()
        m = w @ p
        c = 1 / (sigma**2 * (1 + sigma**2))
        j = sum(wk * u @ u.T for wk, u in zip(w, bases, strict=True))
        j = j + c * sum(wk * np.outer(pk, pk) for wk, pk in zip(w, p, strict=True))
        out.append((j - c * np.outer(m, m)) / (1 + sigma**2))
    return np.stack(out)


def molrg_data(key, bases, num):
    label_key, key = jax.random.split(key)
    k, _, d = bases.shape
    labels = jax.random.randint(label_key, (num,), 0, k)
    return jnp.einsum("bnd,bd->bn", bases[labels], jax.random.normal(key, (num, d)))


def mlp(key, sizes):
    weights = [
        jax.random.normal(k, (a, b)) / np.sqrt(a)
        for k, a, b in zip(
            jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True
        )
    ]

    def fn(x):
        x = x.reshape(x.shape[0], -1)
        for w in weights[:-1]:
            x = jnp.tanh(jnp.matmul(x, w, precision="highest"))
        return jnp.matmul(x, weights[-1], precision="highest")

    return fn


def dense_jacobian(fn, x):
    j = jax.vmap(jax.jacrev(lambda xi: fn(xi[None])[0]))(x)
    return np.asarray(j, np.float64).reshape(x.shape[0], -1, x[0].size)


# --- PCA ---------------------------------------------------------------------------------------


def test_pca_spans_the_leading_right_singular_vectors(key):
    x = jax.random.normal(key, (40, 9)) * jnp.arange(9, 0, -1.0)[None] + 1
    basis = subspaces.pca(x, 3)
    reference = np.linalg.svd(np.asarray(x, np.float64))[2][:3].T
    np.testing.assert_allclose(np.abs(basis.T @ reference), np.eye(3), atol=1e-4)


@pytest.mark.parametrize("num", [1, 3, 4])
def test_pca_recovers_a_subspace_as_soon_as_samples_span_it(x64, key, num):
    true = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 4)))[0]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((num, 4)) @ true.T)
    basis = subspaces.pca(x, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    error = np.linalg.norm(basis @ basis.T - true @ true.T)
    assert error < 1e-10 if num >= 4 else 0.5 < error <= np.sqrt(2 * (4 - num)) + 1e-12


def test_pca_errors():
    with pytest.raises(ValueError, match="rank too large: expected at most the data's dimension 3"):
        subspaces.pca(jnp.ones((5, 3)), 4)
    with pytest.raises(ValueError, match="no samples"):
        subspaces.pca(jnp.ones((0, 3)), 1)
    with pytest.raises(ValueError, match="rank too small"):
        subspaces.pca(jnp.ones((5, 3)), 0)


# --- numerical rank ----------------------------------------------------------------------------


def test_numerical_rank_is_the_rooted_rule():
    s = jnp.array([3.0, 1.0, 0.1])
    # squared shares .8991, .9990; roots .9482, .9995: the rooted rule stops earlier at 0.94.
    assert int(subspaces.numerical_rank(s, 0.94)) == 1
    assert int(subspaces.numerical_rank(s, 0.99)) == 2
    assert int(subspaces.numerical_rank(s, 0.9999)) == 3


def test_numerical_rank_edges():
    assert int(subspaces.numerical_rank(jnp.zeros(5))) == 0
    assert int(subspaces.numerical_rank(jnp.array([1e-30, 0.0]))) == 1
    assert int(subspaces.numerical_rank(jnp.array([1e25, 1e25]))) == 2
    assert int(subspaces.numerical_rank(jnp.array([0.1, 3.0, 1.0]))) == 2  # any order
    assert int(subspaces.numerical_rank(jnp.ones(7), 0.9999999999)) == 7
    assert int(subspaces.numerical_rank(jnp.array([jnp.nan, 1.0, 1.0]))) == 3
    assert subspaces.numerical_rank(jnp.eye(4)[None]).tolist() == [[1, 1, 1, 1]]
    with pytest.raises(ValueError, match="energy out of range"):
        subspaces.numerical_rank(jnp.ones(3), 1.0)


@hypothesis.given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 0.999))
@hypothesis.settings(deadline=None, max_examples=40)
def test_numerical_rank_satisfies_its_definition(values, energy):
    with jax.enable_x64(True):
        rank = int(subspaces.numerical_rank(jnp.asarray(values, jnp.float64), energy))
    s = np.sort(np.asarray(values))[::-1]
    total = np.sqrt((s**2).sum())
    kept = lambda r: np.sqrt((s[:r] ** 2).sum())
    slack = 1e-9 * total
    if total < 1e-150:
        return  # squares underflow in this oracle
    assert kept(rank) > energy * total - slack
    assert kept(rank - 1) <= energy * total + slack


# --- Jacobians ---------------------------------------------------------------------------------


def test_exact_molrg_matches_the_closed_form(x64, key):
    bases = random_frames(key, 2, 48, 6, orthogonal=True, dtype=jnp.float64)
    noise = jax.random.normal(key, (5, 48))

    @jax.jit
    def run(x, sigma):
        fn = lambda x: molrg_mean(bases, x, sigma)
        top, info = subspaces.jacobian_svd(
            fn, x, 6, key=key, tol=1e-8, max_iters=300, return_info=True
        )
        return top, info, subspaces.jacobian_spectrum(fn, x)

    for sigma in (0.1, 1.0, 10.0):
        x = molrg_data(key, bases, 5) + sigma * noise
        jacobian = molrg_jacobian(bases, x, sigma)
        _, s, right = np.linalg.svd(jacobian)
        (u, got, vt), info, spectrum = run(x, sigma)
        np.testing.assert_allclose(spectrum, s, atol=1e-12)
        assert u.shape == (5, 48, 6) and got.shape == (5, 6) and vt.shape == (5, 6, 48)
        assert float(info.change.max()) <= 1e-8
        np.testing.assert_allclose(got, s[:, :6], rtol=1e-12)
        np.testing.assert_allclose(jacobian @ np.swapaxes(vt, 1, 2), u * got[:, None], atol=1e-8)
        np.testing.assert_allclose(vt @ vt.mT, np.tile(np.eye(6), (5, 1, 1)), atol=1e-12)
        apart = s[:, 5] > 1.01 * s[:, 6]  # then the leading subspace is determined
        inside = np.linalg.norm(np.asarray(vt) @ np.swapaxes(right[:, :6], 1, 2), axis=(1, 2))
        np.testing.assert_allclose(inside[apart], np.sqrt(6), atol=1e-9)
        assert sigma > 1 or apart.any()


def test_exact_distribution_of_the_package(x64, key):
    """Unequal scales, random bases, a noise floor: against its own closed-form Jacobian."""
    bases = random_frames(key, 3, 20, 4, dtype=jnp.float64)
    scales = jnp.asarray([[3.0, 2.0, 1.0, 0.5]] * 3)
    p = distributions.MoLRG(bases, scales=scales, noise_std=0.1)
    schedule = schedules.VPLinear()
    ts = jnp.asarray([0.9, 0.4, 0.1])
    alpha, sigma = schedule.alpha(ts), schedule.sigma(ts)
    x0, _ = jax.jit(lambda key: p.sample(key, 4))(key)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 20), jnp.float64)
    x = alpha[:, None, None] * x0[None] + sigma[:, None, None] * noise
    got = trajectory_spectra(p.denoiser(schedule), schedule, x, ts, chunk=7)
    for i in range(3):
        jacobian = jax.jit(p.posterior_jacobian)(x[i], alpha[i], sigma[i])
        s = np.linalg.svd(np.asarray(alpha[i] * jacobian), compute_uv=False)
        np.testing.assert_allclose(got[i], s, atol=1e-11)


def test_top_of_a_random_network_matches_dense_svd(key):
    x = jax.random.normal(key, (3, 4, 4, 2))  # images in, vectors of another size out
    fn = mlp(key, [32, 64, 20])
    left, s, right = np.linalg.svd(dense_jacobian(fn, x), full_matrices=False)
    u, got, vt = jacobian_svd(fn, x, 5, key=key, tol=1e-5, max_iters=200)
    assert u.shape == (3, 20, 5) and vt.shape == (3, 5, 32)
    np.testing.assert_allclose(got, s[:, :5], rtol=2e-6)
    overlap = np.einsum("bok,bok->bk", u, left[..., :5]) * np.einsum(
        "bkn,bkn->bk", vt, right[:, :5]
    )
    np.testing.assert_allclose(overlap, 1, atol=1e-4)  # signs of u and v belong together


def test_exactly_low_rank_jacobian_gives_zeros_not_nan(key):
    basis = random_frames(key, 1, 30, 3)[0]
    fn = lambda x: linalg.project(basis, x)
    (u, s, vt), info = jacobian_svd(fn, jnp.ones((2, 30)), 7, key=key, return_info=True)
    np.testing.assert_allclose(s, np.tile([1, 1, 1, 0, 0, 0, 0], (2, 1)), atol=2e-6)
    assert np.isfinite(u).all() and int(info.num_iters) <= 5
    np.testing.assert_allclose(vt @ vt.mT, np.tile(np.eye(7), (2, 1, 1)), atol=1e-5)
    _, zero, _ = jacobian_svd(lambda x: 0 * x, jnp.ones((1, 4)), 2, key=key)
    assert zero.tolist() == [[0, 0]]


def test_slow_decay_converges_or_says_so(key):
    s = jnp.arange(1, 193.0) ** -0.5
    u, v = (random_frames(jax.random.fold_in(key, i), 1, 192, 192)[0] for i in range(2))
    matrix = jnp.matmul(u * s[None], v.T, precision="highest")
    fn = lambda x: jnp.matmul(x, matrix.T, precision="highest")
    x = jnp.ones((1, 192))
    (_, got, _), info = jacobian_svd(fn, x, 10, key=key, return_info=True)
    np.testing.assert_allclose(got[0], s[:10], rtol=1e-3)
    assert float(info.change[0]) <= 1e-4
    _, info = jacobian_svd(fn, x, 10, key=key, max_iters=2, return_info=True)
    assert float(info.change[0]) > 1e-2 and int(info.num_iters) == 2


def test_spectrum_picks_the_shorter_side_and_chunks_agree(key):
    x = jax.random.normal(key, (2, 7))
    for sizes, chunks in (([7, 16, 11], (1, 3)), ([7, 16, 3], (64,))):
        fn = mlp(key, sizes)
        s = np.linalg.svd(dense_jacobian(fn, x), compute_uv=False)
        for chunk in chunks:
            got = jacobian_spectrum(fn, x, chunk=chunk)
            np.testing.assert_allclose(got, s, atol=1e-5)


def test_jit_vmap_and_shard_map(key):
    fn = mlp(key, [12, 24, 12])
    x = jax.random.normal(key, (8, 12))
    run = lambda x: subspaces.jacobian_svd(fn, x, 3, key=key, tol=1e-5, max_iters=100)[1]
    plain = run(x)  # eager
    np.testing.assert_allclose(jax.jit(run)(x), plain, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(run)(x.reshape(2, 4, 12)).reshape(8, 3), plain, rtol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(x), plain, rtol=1e-5)


def test_half_precision_input_is_analysed_in_single(key):
    fn = mlp(key, [12, 24, 12])
    x = jax.random.normal(key, (2, 12))
    half = lambda x: fn(x.astype(jnp.float32)).astype(x.dtype)
    _, s, _ = jacobian_svd(half, x.astype(jnp.bfloat16), 3, key=key)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, jacobian_spectrum(fn, x)[:, :3], rtol=0.05)


def test_jacobian_errors(key):
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"rank too large: expected at most 4"):
        subspaces.jacobian_svd(lambda x: x, x, 5, key=key)
    with pytest.raises(ValueError, match="fn must keep the batch axis"):
        subspaces.jacobian_svd(lambda x: x.sum(0), x, 1, key=key)
    with pytest.raises(ValueError, match="oversample too small"):
        subspaces.jacobian_svd(lambda x: x, x, 1, key=key, oversample=-1)


# --- along the noise level ---------------------------------------------------------------------


def test_rank_against_noise_reproduces_the_published_curve(key):
    """n = 48, K = 2, d = 6: one subspace at low noise, both at high, a mean in between."""
    bases = random_frames(key, 2, 48, 6, orthogonal=True)
    inverse_sigma = jnp.array([500, 125, 50, 10, 1.67, 0.91, 0.3, 0.12, 0.08, 0.04, 0.02, 0.01])
    published = [0.125, 0.125, 0.125, 0.125, 0.134, 0.193] + [0.25] * 6
    sigmas = 1 / inverse_sigma
    x0 = molrg_data(key, bases, 64)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (12, 64, 48))
    denoise_fn = lambda x, t: molrg_mean(bases, x, t)
    x = x0[None] + sigmas[:, None, None] * noise
    spectra = trajectory_spectra(denoise_fn, schedules.VE(), x, sigmas)
    assert spectra.shape == (12, 64, 48)
    ratio = np.asarray(subspaces.numerical_rank(spectra)).mean(1) / 48
    np.testing.assert_allclose(ratio, published, atol=0.02)
    np.testing.assert_allclose(
        ratio[[0, 1, 2, 3, -3, -2, -1]], np.take(published, [0, 1, 2, 3, -3, -2, -1])
    )


def test_schedules_share_one_spectrum_and_topk_agrees_with_full(key):
    bases = random_frames(key, 2, 16, 3, orthogonal=True)
    clean = lambda x, sigma: molrg_mean(bases, x, sigma)
    vp = schedules.VPLinear()
    ts = jnp.array([0.9, 0.5, 0.2])
    sigmas = schedules.noise_levels(vp, ts)
    x = molrg_data(key, bases, 4)[None] + sigmas[:, None, None] * jax.random.normal(key, (3, 4, 16))
    vp_fn = lambda x, t: clean(x / vp.alpha(t), schedules.noise_levels(vp, t))
    ve = trajectory_spectra(clean, schedules.VE(), x, sigmas)
    in_vp = trajectory_spectra(vp_fn, vp, x * vp.alpha(ts)[:, None, None], ts)
    np.testing.assert_allclose(in_vp, ve, atol=1e-5)
    top = trajectory_spectra(clean, schedules.VE(), x, sigmas, rank=4, key=key)
    np.testing.assert_allclose(top, ve[..., :4], atol=1e-4)
    with pytest.raises(ValueError, match="rank needs a key"):
        trajectory_spectra(clean, schedules.VE(), x, sigmas, rank=4)
    with pytest.raises(ValueError, match="one time per state"):
        trajectory_spectra(clean, schedules.VE(), x, sigmas[:2])


def test_traced_once(key):
    bases = random_frames(key, 2, 16, 3)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(x, ts):
        fn = lambda x, t: molrg_mean(bases, x, t)
        return subspaces.trajectory_spectra(fn, schedules.VE(), x, ts, rank=3, key=key)

    x = jax.random.normal(key, (2, 4, 16))
    run(x, jnp.array([1.0, 0.5]))
    run(x + 1, jnp.array([2.0, 0.1]))
