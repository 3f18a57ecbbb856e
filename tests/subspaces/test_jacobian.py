"""Jacobian triplets, norm and asymmetry against dense linear algebra and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import molrg_data, molrg_jacobian, molrg_mean

from lowdim_diffusion import denoisers, linalg, networks, schedules, subspaces

random_frames = jax.jit(
    linalg.random_frames, static_argnums=(1, 2, 3), static_argnames=("orthogonal", "dtype")
)


def jacobian_svd(fn, x, rank, **options):
    """Compiled whole: op by op costs several times as much."""
    return jax.jit(lambda x: subspaces.jacobian_svd(fn, x, rank, **options))(x)


def jacobian_spectrum(fn, x, **options):
    return jax.jit(lambda x: subspaces.jacobian_spectrum(fn, x, **options))(x)


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
    assert float(info.change[0]) <= 1e-4 and float(info.residual.max()) < 1e-3
    (_, got, _), info = jacobian_svd(fn, x, 10, key=key, max_iters=2, return_info=True)
    assert float(info.change[0]) > 1e-2 and int(info.num_iters) == 2
    off = jnp.abs(got[0] / s[:10] - 1).max()
    assert off > 1e-3 and float(info.residual.max()) > 1e-2  # and it is said


def test_by_default_large_passes_run_in_parts():
    """One vector's hidden layer takes 16 MiB: all eighteen together 288 MiB."""

    def peak(chunk):
        def find(x, wide, back):
            fn = lambda x: jnp.tanh(x @ wide) @ back
            return subspaces.jacobian_svd(fn, x, 10, key=jax.random.key(0), chunk=chunk)

        size = 2**22
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 32), (32, size), (size, 32))]
        return jax.jit(find).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert peak(None) <= peak(4) < peak(18) / 2


@pytest.mark.slow
def test_ten_triplets_of_an_image_of_64_by_64_fit_into_four_gib():
    """A U-Net that attends at 32x32: 32 MiB of attention per vector, pushed two at a time."""
    options = dict(channels=64, channel_mult=(1, 2, 2), num_blocks=1, attention=(32,))
    net = networks.make("unet", data_shape=(64, 64, 3), **options)
    params = jax.eval_shape(net.init, jax.random.key(0))

    def find(params, x):
        denoise_fn = denoisers.from_network(net, params, schedules.VE())
        return subspaces.jacobian_svd(lambda x: denoise_fn(x, 1.0), x, 10, key=jax.random.key(0))

    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    made = jax.jit(find).lower(params, x).compile().memory_analysis()
    assert made.temp_size_in_bytes + made.argument_size_in_bytes < 4 * 2**30


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


def test_masked_jacobian_is_that_of_the_masked_output(key):
    fn = mlp(key, [12, 24, 12])
    x = jax.random.normal(key, (3, 12))
    dense = dense_jacobian(fn, x)
    mask = jnp.arange(12) < 5
    (u, s, vt), info = jacobian_svd(
        fn, x, 4, key=key, mask=mask, tol=1e-5, max_iters=200, return_info=True
    )
    _, want, right = np.linalg.svd(dense * np.asarray(mask)[None, :, None])
    np.testing.assert_allclose(s, want[:, :4], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(u)[:, 5:], 0, atol=1e-6)
    overlap = np.abs(np.einsum("bkn,bkn->bk", vt, right[:, :4]))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    assert float(info.residual.max()) < 1e-4
    by_threes = jacobian_svd(fn, x, 4, key=key, mask=mask, tol=1e-5, max_iters=200, chunk=3)[1]
    np.testing.assert_allclose(by_threes, s, rtol=1e-5)
    np.testing.assert_allclose(jacobian_spectrum(fn, x, mask=mask)[:, :5], want[:, :5], atol=1e-5)
    one_each = jnp.stack([mask, ~mask, jnp.ones(12, bool)])
    each = jacobian_svd(fn, x, 3, key=key, mask=one_each, tol=1e-5, max_iters=200)[1]
    want = np.linalg.svd(dense * np.asarray(one_each)[:, :, None], compute_uv=False)
    np.testing.assert_allclose(each, want[:, :3], rtol=1e-5)


def test_residual_is_the_distance_to_a_singular_pair(x64, key):
    matrix = jax.random.normal(key, (20, 20), jnp.float64)
    fn = lambda x: x @ matrix.T
    x = jnp.ones((1, 20))
    for max_iters in (1, 3, 200):
        (u, s, vt), info = jacobian_svd(
            fn, x, 3, key=key, max_iters=max_iters, tol=1e-9, return_info=True
        )
        missed = matrix @ vt[0].T - u[0] * s[0][None]
        want = jnp.linalg.norm(missed, axis=0) / s[0, 0]
        np.testing.assert_allclose(info.residual[0], want, atol=1e-12)
        true = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        off = np.abs(true[:, None] - np.asarray(s[0])[None]).min(0) / float(s[0, 0])
        assert (off <= np.asarray(info.residual[0]) + 1e-12).all()  # Weyl
    assert float(info.residual.max()) < 1e-7


def test_warm_start_saves_iterations_and_changes_nothing(key):
    """A neighbouring matrix with a spectrum that decays slowly."""
    u, v = (random_frames(jax.random.fold_in(key, i), 1, 96, 96)[0] for i in range(2))
    matrix = jnp.matmul(u * 0.95 ** jnp.arange(96.0)[None], v.T, precision="highest")
    change = 1e-4 * jax.random.normal(jax.random.fold_in(key, 2), (96, 96))
    fn = lambda a: lambda x: jnp.matmul(x, a.T, precision="highest")
    x = jnp.ones((2, 96))
    run = lambda fn, start: jacobian_svd(
        fn, x, 4, key=key, start=start, tol=1e-3, return_info=True, oversample=2
    )
    (_, _, vt), _ = run(fn(matrix), None)
    (_, cold, _), cold_info = run(fn(matrix + change), None)
    (_, warm, _), warm_info = run(fn(matrix + change), vt)
    np.testing.assert_allclose(warm, cold, rtol=1e-4)
    assert 2 * int(warm_info.num_iters) <= int(cold_info.num_iters)
    broken = run(fn(matrix + change), vt * jnp.nan)
    np.testing.assert_array_equal(broken[0][1], cold)  # as if none had been given
    with pytest.raises(ValueError, match=r"wrong shape of start: expected \[b, r, n\]"):
        subspaces.jacobian_svd(fn(matrix), x, 4, key=key, start=vt[..., :5])


def test_tolerance_is_a_positive_sine(key):
    """What is called converged is: the change bounds what an iteration still turns."""
    with pytest.raises(ValueError, match="tol out of range"):
        subspaces.jacobian_svd(lambda x: x, jnp.ones((1, 4)), 1, key=key, tol=0.0)


def test_noise_levels_are_a_batch_too(key):
    """One call for several levels: the denoiser takes a time per example."""
    bases = random_frames(key, 2, 24, 3, orthogonal=True)
    sigmas = jnp.asarray([0.3, 1.0, 5.0])
    x = molrg_data(key, bases, 3) + sigmas[:, None] * jax.random.normal(key, (3, 24))
    mean = lambda x, t: jax.vmap(lambda x, t: molrg_mean(bases, x[None], t)[0])(x, t)
    together = jacobian_svd(lambda x: mean(x, sigmas), x, 3, key=key, tol=1e-5)[1]
    for i in range(3):
        want = np.linalg.svd(molrg_jacobian(bases, x[i : i + 1], float(sigmas[i])))[1]
        np.testing.assert_allclose(together[i], want[0, :3], rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_frobenius_is_unbiased_exact_with_a_basis_and_precise_with_the_leading_part(x64, masked):
    key = jax.random.key(3)
    matrix = jax.random.normal(key, (30, 30), jnp.float64) * jnp.arange(1, 31)[:, None] ** -1.0
    mask = jnp.arange(30) % 3 != 0 if masked else None
    fn = lambda x: x @ matrix.T
    x = jnp.ones((2, 30))
    dense = np.asarray(matrix) * (np.asarray(mask)[:, None] if masked else 1)
    want = np.linalg.norm(dense)
    norm = lambda key, **options: subspaces.jacobian_frobenius(key, fn, x, mask=mask, **options)
    np.testing.assert_allclose(norm(key, num_probes=30), want, rtol=1e-12)
    np.testing.assert_allclose(norm(key, num_probes=99), want, rtol=1e-12)
    keys = jax.random.split(key, 4000)
    draws = jax.jit(jax.vmap(lambda k: norm(k, num_probes=3)[0] ** 2))(keys)
    np.testing.assert_allclose(draws.mean(), want**2, atol=4 * draws.std() / 4000**0.5)
    vt = np.linalg.svd(dense)[2][None, :5].repeat(2, 0)
    tail = norm(key, num_probes=30, without=jnp.asarray(vt))
    np.testing.assert_allclose(tail, np.linalg.norm(dense @ (np.eye(30) - vt[0].T @ vt[0])))


def test_mean_square_response_to_a_random_direction(key):
    """Check 18: E ||J dx||^2 = ||J||_F^2 / n, to 5 % with 300 draws, on the exact posterior."""
    bases = random_frames(key, 3, 40, 5)
    x = molrg_data(key, bases, 1) + 0.7 * jax.random.normal(key, (1, 40))
    want = np.linalg.norm(molrg_jacobian(bases, x, 0.7)[0])
    estimate = lambda k: subspaces.jacobian_frobenius(
        k, lambda x: molrg_mean(bases, x, 0.7), x, num_probes=1
    )
    draws = jax.jit(jax.vmap(estimate))(jax.random.split(key, 300))
    np.testing.assert_allclose((draws**2).mean(), want**2, rtol=0.05)


def test_asymmetry_follows_a_gauge_added_to_a_symmetric_jacobian(x64, key):
    """Exact posterior means are symmetric; c A x with A antisymmetric adds a known amount."""
    bases = random_frames(key, 2, 16, 3, dtype=jnp.float64)
    x = molrg_data(key, bases, 2) + jax.random.normal(key, (2, 16))
    exact = lambda x: molrg_mean(bases, x, 1.0)
    run = lambda fn, count: jax.jit(
        lambda x: subspaces.jacobian_asymmetry(key, fn, x, num_probes=count)
    )(x)
    assert float(run(exact, 4).max()) < 1e-12
    square = jax.random.normal(key, (16, 16), jnp.float64)
    anti = 0.1 * (square - square.T)
    got = run(lambda x: exact(x) + x @ anti.T, 16)
    j = molrg_jacobian(bases, x, 1.0)
    want = np.linalg.norm(2 * np.asarray(anti)) / np.linalg.norm(2 * j, axis=(1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    with pytest.raises(ValueError, match="the Jacobian is not square"):
        subspaces.jacobian_asymmetry(key, lambda x: x[:, :3], x)


def test_mask_errors(key):
    x = jnp.ones((2, 4))
    svd = lambda **options: subspaces.jacobian_svd(lambda x: x, x, key=key, **options)
    with pytest.raises(ValueError, match=r"wrong shape of mask: expected \(4,\), or \(2, 4\)"):
        svd(rank=1, mask=jnp.ones(3))
    with pytest.raises(ValueError, match="at most 2, the entries inside the mask, got 3"):
        svd(rank=3, mask=jnp.array([1, 0, 1, 0]))
    with pytest.raises(ValueError, match="at most 0, the entries inside the mask"):
        svd(rank=1, mask=jnp.array([[1, 0, 1, 0], [0, 0, 0, 0]]))
