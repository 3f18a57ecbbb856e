"""Operators against dense matrices: adjoints, pseudo-inverses, shapes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from lowdim_diffusion import guidance, linalg

SHAPE = (6, 4, 2)


def operators():
    rng = np.random.default_rng(0)
    mask = rng.random(SHAPE) < 0.4
    wide = rng.normal(size=(10, 48))
    deficient = wide[:, :3] @ wide[:3]  # rank 3
    return {
        "mask": guidance.inpainting(mask),
        "random mask": guidance.random_inpainting(jax.random.key(1), SHAPE, 9),
        "block mean": guidance.downsampling(SHAPE, (3, 2)),
        "circular blur": guidance.blur(SHAPE, 0.6),
        "box blur": guidance.blur(SHAPE, np.full((3, 3), 1 / 9)),
        "reflecting blur": guidance.blur(SHAPE, 0.6, boundary="reflect"),
        "matrix": guidance.matrix(wide, SHAPE),
        "deficient matrix": guidance.matrix(deficient, SHAPE),
        "own": guidance.LinearOperator(lambda values, x: x[1:] - x[:-1], SHAPE),
    }


NAMES = ("mask", "random mask", "block mean", "circular blur", "box blur", "reflecting blur")
NAMES += ("matrix", "deficient matrix", "own")


@pytest.mark.parametrize("name", NAMES)
def test_adjoint_and_pseudo_inverse_equal_those_of_the_matrix(name, x64):
    a, rng = operators()[name], np.random.default_rng(1)
    dense = np.asarray(a.matrix())
    x, y = rng.normal(size=(3, *SHAPE)), rng.normal(size=(3, *a.measurement_shape))
    forth, back = (np.asarray(v).reshape(3, -1) for v in (a.apply(x), a.transpose(y)))
    x, y_flat = x.reshape(3, -1), y.reshape(3, -1)
    np.testing.assert_allclose(np.sum(forth * y_flat, 1), np.sum(x * back, 1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(forth, x @ dense.T, atol=1e-12)
    for ridge in (0.0, np.array([0.1, 1.0, 0.0])):
        found = np.asarray(a.solve(y, ridge)).reshape(3, -1)
        for i, c in enumerate(np.broadcast_to(ridge, 3)):
            rows = np.vstack([dense, c**0.5 * np.eye(dense.shape[1])]) if c else dense
            expected = np.linalg.pinv(rows, rcond=1e-9)[:, : len(dense)] @ y_flat[i]
            np.testing.assert_allclose(found[i], expected, atol=1e-7)


def test_blurs_are_those_of_scipy(x64):
    x = np.random.default_rng(0).normal(size=(8, 9, 1))
    for boundary, mode in (("circular", "wrap"), ("reflect", "reflect")):
        a = guidance.blur(x.shape, 1.1, boundary=boundary)
        expected = scipy.ndimage.gaussian_filter(x[..., 0], 1.1, mode=mode, radius=(3, 4))
        np.testing.assert_allclose(a.apply(x[None])[0, ..., 0], expected, atol=1e-12)
    kernel = np.random.default_rng(1).normal(size=(3, 5))
    found = guidance.blur(x.shape, kernel).apply(x[None])[0, ..., 0]
    expected = scipy.ndimage.convolve(x[..., 0], kernel, mode="wrap")
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_random_masks_share_one_program_and_keep_whole_pixels(key):
    traces = []

    @jax.jit
    def show(key, x):
        traces.append(1)
        a = guidance.random_inpainting(key, SHAPE, 5)
        return a.transpose(a.apply(x))

    shown = np.asarray([show(k, jnp.ones((1, *SHAPE)))[0] for k in jax.random.split(key, 3)])
    assert len(traces) == 1 and (shown.sum((1, 2)) == 5).all() and (shown[0] != shown[1]).any()


def test_operators_pass_through_jit_as_arguments():
    traces = []

    @jax.jit
    def apply(a, x):
        traces.append(1)
        return a.apply(x)

    for std in (0.5, 0.6):
        apply(guidance.blur(SHAPE, np.full((3, 3), std)), jnp.ones((1, *SHAPE)))
    assert len(traces) == 1


def test_measure_adds_noise_of_the_given_size(key):
    a = guidance.inpainting(np.ones(2000))
    y = guidance.measure(key, a, jnp.zeros((2, 2000)), 0.3)
    assert y.std() == pytest.approx(0.3, rel=0.05)
    np.testing.assert_array_equal(guidance.measure(key, a, jnp.ones((2, 2000))), 1)


def test_conjugate_gradients_survive_more_steps_than_rank(x64):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 8))
    m = half.T @ half
    b = np.stack([m @ rng.normal(size=8), rng.normal(size=8), np.zeros(8)])
    matvec = lambda x: x @ m
    found = linalg.conjugate_gradient(matvec, jnp.asarray(b), jnp.zeros((3, 8)), num_iters=40)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], np.linalg.pinv(m) @ b[0], atol=1e-9)
    np.testing.assert_array_equal(found[2], 0)
    # Beside the range the right side is not reached, but neither is the rest spoiled.
    assert np.linalg.norm(found[1]) < 1e3 * np.linalg.norm(np.linalg.pinv(m) @ b[1])
    solve = lambda b: linalg.conjugate_gradient(matvec, b, 0 * b, num_iters=10)
    gradient = jax.grad(lambda b: jnp.sum(solve(b)))(jnp.asarray(b[:1]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.inpainting(np.zeros(SHAPE)), "mask is empty.*did you mean ~mask"),
        (lambda: guidance.inpainting(np.full(SHAPE, 0.5)), "booleans, or 0 and 1, got 0.5"),
        (lambda: guidance.random_inpainting(jax.random.key(0), SHAPE, 25), "at most 24, got 25"),
        (lambda: guidance.downsampling(SHAPE, 4), "a divisor, got height 6 and factor 4"),
        (lambda: guidance.downsampling((64,), 4), "not the shape of a picture"),
        (lambda: guidance.blur(SHAPE, -1.0), "std out of range"),
        (lambda: guidance.blur(SHAPE, np.ones((2, 2))), "wrong shape of the kernel"),
        (lambda: guidance.blur(SHAPE, 1.0, boundary="zero"), "unknown boundary"),
        (lambda: guidance.matrix(np.ones((3, 5)), SHAPE), "5 numbers each"),
        (lambda: operators()["mask"].apply(jnp.ones((2, 5))), r"wrong shape of x.*\(b, 6, 4, 2\)"),
        (lambda: operators()["mask"].transpose(jnp.ones((2, 5))), "wrong shape of y"),
        (lambda: operators()["own"].spectral(jnp.ones((2, *SHAPE)), jnp.sqrt), "no spectral_fn"),
        (
            lambda: guidance.measure(
                jax.random.key(0), operators()["mask"], jnp.ones((1, *SHAPE)), -0.1
            ),
            "noise_std out of range",
        ),
    ],
)
def test_bad_input(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
