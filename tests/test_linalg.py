"""Frames, projections and the polar factor against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from lowdim_diffusion import linalg


def gaussian(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_orthonormalize_spans_the_same_space(x64):
    a = gaussian(0, 3, 9, 4)
    q = linalg.orthonormalize(a)
    np.testing.assert_allclose(
        jnp.einsum("kni,knj->kij", q, q), np.tile(np.eye(4), (3, 1, 1)), atol=1e-14
    )
    for k in range(3):
        r = np.asarray(q[k].T @ a[k])
        np.testing.assert_allclose(q[k] @ r, a[k], atol=1e-13)
        assert np.all(np.diag(r) > 0)
        np.testing.assert_allclose(r, np.triu(r), atol=1e-13)


def test_orthonormalize_refuses_wide():
    with pytest.raises(ValueError, match="too many columns: expected at most 2, got 3"):
        linalg.orthonormalize(jnp.ones((2, 3)))


def test_random_frames(key):
    frames = linalg.random_frames(key, 3, 20, 4, orthogonal=True)
    joint = np.concatenate(list(np.asarray(frames)), axis=1)
    np.testing.assert_allclose(joint.T @ joint, np.eye(12), atol=2e-6)
    free = linalg.random_frames(key, 3, 5, 4)
    np.testing.assert_allclose(
        jnp.einsum("kni,knj->kij", free, free), np.tile(np.eye(4), (3, 1, 1)), atol=2e-6
    )


def test_random_frames_are_uniform(key):
    """For a uniform frame E[U U^T] = (d/n) I."""
    frames = linalg.random_frames(key, 20_000, 4, 2)
    mean = jnp.einsum("kni,kmi->nm", frames, frames) / frames.shape[0]
    np.testing.assert_allclose(mean, 0.5 * np.eye(4), atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 5, 6, False), "rank too large"), ((3, 5, 2, True), "no room for mutually orthogonal")],
)
def test_random_frames_errors(key, arguments, message):
    *sizes, orthogonal = arguments
    with pytest.raises(ValueError, match=message):
        linalg.random_frames(key, *sizes, orthogonal=orthogonal)


def test_project_broadcasts(x64):
    u, x = linalg.orthonormalize(gaussian(1, 3, 6, 2)), gaussian(2, 5, 6)
    out = linalg.project(u[:, None], x[None])
    expected = np.einsum("kni,kmi,bm->kbn", u, u, x)
    np.testing.assert_allclose(out, expected, atol=1e-13)


def test_polar_against_scipy(x64):
    a = gaussian(3, 7, 3)
    np.testing.assert_allclose(linalg.polar(a), scipy.linalg.polar(np.asarray(a))[0], atol=1e-13)


@pytest.mark.parametrize("function", [linalg.polar, linalg.orthonormalize])
def test_gradients(function, x64):
    a = gaussian(4, 2, 7, 3)
    of_array = lambda a: function(jnp.asarray(a))
    check_grads(of_array, (a,), order=1)
    # At an orthonormal point all singular values coincide, where the SVD's own derivative fails.
    check_grads(of_array, (linalg.orthonormalize(a),), order=1)


def test_safe_sqrt_gradient():
    x = jnp.array([0.0, -1.0, 4.0])
    np.testing.assert_allclose(linalg.safe_sqrt(x), [0, 0, 2])
    np.testing.assert_allclose(jax.grad(lambda x: linalg.safe_sqrt(x).sum())(x), [0, 0, 0.25])


def test_expand_right():
    assert linalg.expand_right(jnp.ones(3), 4).shape == (3, 1, 1, 1)
    assert linalg.expand_right(2.0, 4).shape == ()


def krylov(a, width, rank, **options):
    start = jax.random.normal(jax.random.key(9), (*a.shape[:-2], a.shape[-1], width), a.dtype)
    products = lambda v: a @ v, lambda v: jnp.swapaxes(a, -1, -2) @ v
    return linalg.block_krylov(*products, start, rank=rank, max_iters=200, **options)


@pytest.mark.parametrize(
    ("rows", "width"), [(8, 11), (8, 5), (20, 11), (20, 5), (64, 18), (50, 40)]
)
def test_krylov_space_of_a_map_with_few_rows(rows, width, x64):
    """The space is full before, in, or after its first block; nothing beside it counts."""
    a = gaussian(5, 2, 64, 48) * (jnp.arange(64) < rows)[None, :, None]
    found = krylov(a, width, 3, tol=1e-8)
    s, vt = np.linalg.svd(np.asarray(a), full_matrices=False)[1:]
    np.testing.assert_allclose(found.s, s[:, :3], rtol=1e-13)
    np.testing.assert_allclose(
        np.abs(vt[:, :3] @ found.v), np.eye(3) + np.zeros((2, 3, 3)), atol=1e-8
    )
    np.testing.assert_allclose(
        found.u * found.s[:, None], np.asarray(a) @ found.v, atol=1e-8 * s.max()
    )
    assert int(found.num_iters) <= 12


def test_krylov_space_needs_no_gap(x64):
    """A spectrum that falls by a percent per value: subspace iteration takes 88 steps to 1e-3."""
    n = 600
    u, v = (linalg.orthonormalize(gaussian(i, n, n)) for i in (6, 7))
    s = 1 - 0.9 * np.arange(n) / n
    found = krylov((u * s[None]) @ v.T, 18, 10, tol=5e-3)
    np.testing.assert_allclose(found.s, s[:10], rtol=1e-4)
    assert int(found.num_iters) <= 30


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_krylov_space_of_low_rank_has_whole_frames(rank):
    """Values of zero have vectors too, in float32, where rounding looks like a direction."""
    a = gaussian(8, 40, rank) @ gaussian(9, rank, 30) if rank else jnp.zeros((40, 30))
    found = krylov(a.astype(jnp.float32), 9, 6)
    s = np.linalg.svd(np.asarray(a, np.float64))[1][:6]
    np.testing.assert_allclose(found.s, s, atol=2e-6 * s.max(initial=1))
    for frame in (found.u, found.v):
        np.testing.assert_allclose(frame.T @ frame, np.eye(6), atol=2e-6)
    assert int(found.num_iters) <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gmres_is_least_squares_in_the_krylov_space(dtype, x64):
    rng = np.random.default_rng(0)
    m, b = rng.normal(size=(3, 6, 6)).astype(dtype), rng.normal(size=(3, 2, 3)).astype(dtype)
    m[2] = np.outer(m[2, 0], m[2, 1])  # rank one: the Krylov space ends at once
    flat = b.reshape(3, 6)
    matvec = lambda x: jnp.einsum("bij,bj->bi", m, x.reshape(3, 6)).reshape(x.shape)
    for k in (1, 3, 6, 8):
        found = np.asarray(linalg.gmres(matvec, jnp.asarray(b), num_iters=k)).reshape(3, 6)
        assert found.dtype == dtype
        for i in range(3):
            space = [flat[i].astype(np.float64)]
            while len(space) < min(k, 6):
                space.append(m[i] @ space[-1])
                space[-1] = space[-1] / np.linalg.norm(space[-1])
            q = np.linalg.qr(np.stack(space[: 2 if i == 2 else None], axis=1))[0]
            rcond = 1e-5 if dtype == np.float32 else 1e-10
            y = np.linalg.lstsq(m[i].astype(np.float64) @ q, flat[i], rcond=rcond)[0]
            best = np.linalg.norm(flat[i] - m[i] @ (q @ y))
            tolerance = 2e-4 if dtype == np.float32 else 1e-8
            reached = np.linalg.norm(flat[i] - m[i] @ found[i])
            assert reached < best + tolerance * np.linalg.norm(flat[i])
            assert np.all(np.abs(found) < 1e4)


@pytest.mark.slow
def test_gmres_is_differentiable_and_leaves_zero_alone():
    m = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    solve = lambda b: linalg.gmres(lambda x: x @ m.T, b, num_iters=2)
    b = jnp.array([[1.0, 2.0]])
    slope = jax.jacobian(lambda b: solve(b)[0])(b)[:, 0]
    np.testing.assert_allclose(slope, np.linalg.inv(m), atol=1e-5)
    np.testing.assert_array_equal(solve(0 * b), 0 * b)
