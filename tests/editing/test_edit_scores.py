"""Scores of edits against scikit-image's numbers, scipy's filters and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from lowdim_diffusion import data, editing

RNG = np.random.default_rng(0)
DIGITS = np.asarray(data.load("digits").images[:6], np.float64) / 127.5 - 1  # 8x8x1


def waves(height, width, channels):
    """Pictures in [-1, 1] that need no random generator."""
    i, j, c = np.meshgrid(*map(np.arange, (height, width, channels)), indexing="ij")
    a = np.sin(0.31 * i + 0.17 * j + c) * np.cos(0.05 * i * j + 0.5 * c)
    b = np.clip(0.8 * a + 0.3 * np.sin(1.7 * i + 0.9 * j - c), -1, 1)
    return a, b


def ssim_by_scipy(a, b, data_range, radius, sigma=1.5, sample=False):
    """Wang et al. 2004 with scipy's own Gaussian filter, cropped to whole windows."""
    values = []
    for c in range(a.shape[-1]):
        x, y = a[..., c], b[..., c]
        blur = lambda z: scipy.ndimage.gaussian_filter(z, sigma, radius=radius)[
            radius : z.shape[0] - radius, radius : z.shape[1] - radius
        ]
        mx, my = blur(x), blur(y)
        count = (2 * radius + 1) ** 2
        norm = count / (count - 1) if sample else 1
        vx, vy = norm * (blur(x * x) - mx * mx), norm * (blur(y * y) - my * my)
        vxy = norm * (blur(x * y) - mx * my)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


# ---- change inside and outside ----------------------------------------------------------------


def test_change_is_the_root_mean_square_on_either_side(x64):
    before, after = RNG.normal(size=(2, 5, 6, 7, 3))
    mask = RNG.random((6, 7)) < 0.3
    inside, outside = editing.inside_outside_change(before, after, mask)
    for i in range(5):
        d = after[i] - before[i]
        np.testing.assert_allclose(inside[i], np.sqrt(np.mean(d[mask] ** 2)), rtol=1e-12)
        np.testing.assert_allclose(outside[i], np.sqrt(np.mean(d[~mask] ** 2)), rtol=1e-12)
    channels = RNG.random((6, 7, 3)) < 0.5
    found = editing.inside_outside_change(before, after, channels)
    d = (after - before)[:, channels]
    np.testing.assert_allclose(found.inside, np.sqrt(np.mean(d**2, axis=1)), rtol=1e-12)


def test_change_with_one_side_empty_or_lost():
    before = np.zeros((2, 4, 4, 1), np.float32)
    after = before + np.float32(0.5)
    full = editing.inside_outside_change(before, after, np.ones((4, 4)))
    assert full.inside.tolist() == [0.5, 0.5] and full.outside.tolist() == [0.0, 0.0]
    after[1, 0, 0] = np.nan  # a diverged pixel outside must show there and only there
    mask = np.zeros((4, 4), bool)
    mask[2:] = True
    change = editing.inside_outside_change(before, after, mask)
    assert change.inside.tolist() == [0.5, 0.5]
    assert float(change.outside[0]) == 0.5 and np.isnan(change.outside[1])
    loss = lambda y: editing.inside_outside_change(before, y, mask).inside.sum()
    grad = jax.jit(jax.grad(loss))(before)
    assert np.all(np.asarray(grad) == 0)  # finite where nothing changed


def test_bytes_do_not_wrap_around():
    before, after = np.uint8([[[[200]]]]), np.uint8([[[[10]]]])
    change = editing.inside_outside_change(before, after, [[1]])
    assert change.inside.tolist() == [190.0]
    assert editing.round_trip_error(before, after, data_range=255).rmse.tolist() == [190.0]


# ---- structural similarity --------------------------------------------------------------------

# skimage.metrics.structural_similarity(a, b, data_range=2, gaussian_weights=True, channel_axis=-1,
# use_sample_covariance=False and True), scikit-image 0.26.0, on `waves`
SKIMAGE = {
    (11, 11, 1): (0.6867634633984798, 0.6867159080248478),
    (24, 20, 3): (0.7824966633965462, 0.7824706225360499),
    (32, 32, 3): (0.8104594879071358, 0.8104405673461387),
}


@pytest.mark.parametrize("size", list(SKIMAGE))
def test_ssim_is_scikit_images(size, x64):
    a, b = waves(*size)
    population, sample = SKIMAGE[size]
    np.testing.assert_allclose(editing.ssim(a[None], b[None])[0], population, rtol=1e-12)
    found = editing.ssim(a[None], b[None], sample_covariance=True)
    np.testing.assert_allclose(found[0], sample, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "window", "sigma"),
    [((8, 8, 1), 7, 1.5), ((8, 9, 3), 3, 0.8), ((17, 12, 3), 11, 1.5), ((5, 5, 1), 5, 2.0)],
)
def test_ssim_is_the_formula_with_scipys_filter(shape, window, sigma, x64):
    a, b = RNG.uniform(-1, 1, (2, 3, *shape))
    b = 0.7 * a + 0.3 * b
    for sample in (False, True):
        found = editing.ssim(a, b, window=window, sigma=sigma, sample_covariance=sample)
        for i in range(3):
            wanted = ssim_by_scipy(a[i], b[i], 2.0, window // 2, sigma, sample)
            np.testing.assert_allclose(found[i], wanted, rtol=1e-10)


def test_ssim_properties():
    a, b = (x[None].astype(np.float32) for x in waves(24, 20, 3))
    same = editing.ssim(a, a)
    np.testing.assert_allclose(same, 1, atol=2e-6)
    np.testing.assert_allclose(editing.ssim(a, b), editing.ssim(b, a), rtol=1e-6)
    one, two = np.rint((a + 1) * 127.5), np.rint((b + 1) * 127.5)
    in_bytes = editing.ssim(one.astype(np.uint8), two.astype(np.uint8), data_range=255)
    np.testing.assert_allclose(in_bytes, ssim_by_scipy(one[0], two[0], 255, 5), rtol=1e-4)
    noise = RNG.normal(size=a.shape).astype(np.float32)
    falling = [float(editing.ssim(a, a + s * noise)[0]) for s in (0, 0.05, 0.2, 1.0)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.5
    flat = np.zeros((1, 11, 11, 1))
    np.testing.assert_allclose(editing.ssim(flat, flat), 1)


def test_ssim_refuses():
    x = np.zeros((1, 8, 8, 1))
    with pytest.raises(
        ValueError, match="window larger than the pictures: expected 8x8, got 11; pass window=7"
    ):
        editing.ssim(x, x)
    with pytest.raises(ValueError, match="window has no middle"):
        editing.ssim(x, x, window=4)
    with pytest.raises(ValueError, match="window too small"):
        editing.ssim(x, x, window=1)
    with pytest.raises(ValueError, match="the pictures are too small for it"):
        editing.ssim(x[:, :2], x[:, :2], window=3)
    with pytest.raises(ValueError, match=r"shape of the pictures: expected \[b, h, w, c\]"):
        editing.ssim(x[..., 0], x[..., 0])
    with pytest.raises(ValueError, match="the two sets differ in shape"):
        editing.ssim(x, np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="data_range out of range"):
        editing.ssim(x, x, window=7, data_range=0.0)


# ---- features ---------------------------------------------------------------------------------


def test_feature_distance_is_equation_1(x64):
    """Against loops over layers and positions, with weights per channel."""
    layers = [RNG.normal(size=(c, 3)) for c in (4, 6)]

    def features(x):
        return [
            jnp.einsum("bijk,ck->bijc", x[:, ::step, ::step], jnp.asarray(kernel))
            for step, kernel in zip((1, 2), layers, strict=True)
        ]

    a, b = RNG.normal(size=(2, 2, 4, 6, 3))
    weights = [RNG.random(4), 0.5]
    found = editing.feature_distance(a, b, features, weights=weights)
    for n in range(2):
        total = 0.0
        for step, kernel, w in zip((1, 2), layers, weights, strict=True):
            here = []
            for i in range(0, 4, step):
                for j in range(0, 6, step):
                    f, g = kernel @ a[n, i, j], kernel @ b[n, i, j]
                    gap = w * (f / np.linalg.norm(f) - g / np.linalg.norm(g))
                    here.append(gap @ gap)
            total += np.mean(here)
        np.testing.assert_allclose(found[n], total, rtol=1e-8)


def test_feature_distance_of_vectors_and_of_nothing():
    flat = lambda x: [x.reshape(x.shape[0], -1)]
    a = np.float32([[3.0, 0.0], [0.0, 0.0]]).reshape(2, 1, 2, 1)
    b = np.float32([[0.0, 5.0], [0.0, 1.0]]).reshape(2, 1, 2, 1)
    np.testing.assert_allclose(editing.feature_distance(a, b, flat), [2.0, 1.0], rtol=1e-6)
    grad = jax.jit(jax.grad(lambda y: editing.feature_distance(a, y, flat).sum()))(jnp.asarray(a))
    assert np.isfinite(grad).all()


def test_feature_distance_of_a_region():
    a = DIGITS[:3]
    b = DIGITS[3:]
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    pasted = np.where(mask[None, :, :, None], b, a)
    distance = jax.jit(editing.feature_distance)
    found = distance(a, b, mask=mask)
    np.testing.assert_allclose(found, distance(a, pasted), rtol=1e-6)
    assert np.all(np.asarray(distance(a, pasted, mask=~mask)) == 0)
    assert np.all(np.asarray(found) > 0)


def test_default_features_rank_changes_as_an_eye_does():
    x = DIGITS
    noise = RNG.normal(size=x.shape)
    moved = np.roll(x, 1, axis=2)
    mean = jax.jit(lambda y: jnp.mean(editing.feature_distance(x, y)))
    distance = lambda y: float(mean(np.clip(y, -1, 1)))
    assert distance(x) < 1e-12 < distance(x + 0.05 * noise) < distance(x + 0.3 * noise)
    assert distance(x + 0.05) < distance(moved)
    assert distance(np.full_like(x, -1.0) + 1e-3 * noise) > distance(x + 1e-3 * noise)
    # flat pictures with a little noise are nearly equal: unit length does not blow it up
    flat = jnp.zeros(x.shape)
    small = jax.jit(editing.feature_distance)(flat, flat + 1e-3 * noise)
    assert float(small.max()) < 1e-5


def test_pyramid_features():
    x = jnp.asarray(RNG.normal(size=(2, 9, 6, 3)), jnp.float32)
    levels = jax.jit(lambda x: editing.pyramid_features(x, num_levels=5))(x)
    assert [level.shape for level in levels] == [(2, 9, 6, 10), (2, 4, 3, 10)]
    np.testing.assert_array_equal(levels[0][..., :3], x)
    np.testing.assert_allclose(levels[0][:, 4, 2, 3:6], (x[:, 4, 3] - x[:, 4, 1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(levels[0][:, 4, 2, 6:9], (x[:, 5, 2] - x[:, 3, 2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(levels[0][:, 0, 0, 3:6], (x[:, 0, 1] - x[:, 0, 0]) / 2, rtol=1e-6)
    assert np.all(np.asarray(levels[0][..., 9]) == 1)
    np.testing.assert_allclose(
        levels[1][:, 1, 2, :3], x[:, 2:4, 4:6].mean((1, 2)), rtol=1e-5, atol=1e-6
    )
    assert len(editing.pyramid_features(jnp.zeros((1, 1, 1, 1)))) == 1


def test_feature_distance_refuses():
    x = np.zeros((2, 8, 8, 1))
    three = lambda x: [x, x, x]
    with pytest.raises(ValueError, match="number of weights: expected one for each of 3 layers"):
        editing.feature_distance(x, x, three, weights=[1.0])
    with pytest.raises(ValueError, match=r"weights of layer 0: expected \(\) or \(1,\)"):
        editing.feature_distance(x, x, three, weights=[np.ones(2), 1.0, 1.0])
    with pytest.raises(ValueError, match=r"shape of layer 0: expected \[2, \.\.\., c\]"):
        editing.feature_distance(x, x, lambda x: [x.sum()])
    with pytest.raises(ValueError, match="mask has no pixel inside"):
        editing.feature_distance(x, x, mask=np.zeros((8, 8)))


# ---- round trip, success ----------------------------------------------------------------------


def test_round_trip_error(x64):
    a = RNG.uniform(-1, 1, (3, 5, 4, 1))
    b = a.copy()
    b[0] += 0.02
    b[1] += RNG.normal(size=a[1].shape)
    rmse, psnr = editing.round_trip_error(a, b)
    mse = np.mean((a - b) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(rmse, np.sqrt(mse), rtol=1e-12)
    np.testing.assert_allclose(psnr[:2], 10 * np.log10(4 / mse[:2]), rtol=1e-12)
    assert psnr[2] == np.inf
    np.testing.assert_allclose(psnr[0], 40, rtol=1e-10)
    assert np.isnan(editing.round_trip_error(a, a * np.nan).psnr).all()


def test_success_needs_both_sides():
    inside = np.array([0.3, 0.31, 0.9, np.nan, np.inf, 0.9])
    outside = np.array([0.0, 0.19, 0.2, 0.0, 0.0, np.nan])
    found = editing.edit_success(inside, outside, min_inside=0.3, max_outside=0.2)
    assert found.tolist() == [False, True, False, False, False, False]
    with pytest.raises(ValueError, match="max_outside out of range"):
        editing.edit_success(inside, outside, min_inside=0.1, max_outside=0.0)
    with pytest.raises(ValueError, match="shape of outside"):
        editing.edit_success(inside, outside[:2], min_inside=0.1, max_outside=0.1)


def test_rates_count():
    success = RNG.random((7, 5, 2)) < 0.6
    assert float(editing.success_rate(success)) == pytest.approx(success.sum() / 70)
    by_direction = editing.success_rate(success, axis=(0, 2))
    np.testing.assert_allclose(by_direction, [success[:, d].mean() for d in range(5)], rtol=1e-6)
    transferred, own = RNG.random((7, 5, 2, 3)) < 0.5, success
    hits = [t for t, s in zip(transferred.reshape(-1, 3), own.ravel(), strict=True) if s]
    assert float(editing.transfer_rate(transferred, own)) == pytest.approx(np.mean(hits))
    assert float(editing.transfer_rate(transferred)) == pytest.approx(transferred.mean())
    assert np.isnan(editing.transfer_rate(transferred, np.zeros_like(own)))
    with pytest.raises(ValueError, match="shape of own"):
        editing.transfer_rate(transferred, own[:3])
    with pytest.raises(ValueError, match="no targets"):
        editing.transfer_rate(transferred[..., :0])
    with pytest.raises(ValueError, match="no edits"):
        editing.success_rate(success[:0])


# ---- one battery for all ----------------------------------------------------------------------

MASK = np.arange(64).reshape(8, 8) % 3 == 0
one_level = functools.partial(editing.pyramid_features, num_levels=1)
SCORES = {
    "change": lambda a, b: editing.inside_outside_change(a, b, MASK),
    "ssim": lambda a, b: editing.ssim(a, b, window=7),
    "features": lambda a, b: editing.feature_distance(a, b, one_level, mask=MASK),
    "round trip": editing.round_trip_error,
}


@pytest.mark.parametrize("name", list(SCORES))
def test_jit_vmap_grad_dtype_and_one_trace(name):
    score, traces = SCORES[name], []

    def counted(a, b):
        traces.append(1)
        return score(a, b)

    a, b = (jnp.asarray(x, jnp.float32) for x in (DIGITS, DIGITS[::-1]))
    plain = score(a, b)
    jitted = jax.jit(counted)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, jitted(a, b), plain)
    jitted(b, a)
    assert len(traces) == 1
    alone = jax.jit(jax.vmap(lambda x, y: score(x[None], y[None])))(a, b)
    jax.tree.map(lambda x, y: close(x[:, 0], y), alone, plain)
    leaves = jax.tree.leaves(plain)
    assert all(x.dtype == jnp.float32 and x.shape == (6,) for x in leaves)
    loss = lambda y: sum(jnp.sum(x) for x in jax.tree.leaves(score(a, y)))
    grad = jax.jit(jax.grad(loss))(b)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0
    half = jax.eval_shape(score, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half))
    with jax.enable_x64(True):
        double = jax.jit(score)(jnp.asarray(DIGITS), jnp.asarray(DIGITS[::-1]))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(double))
        jax.tree.map(close, plain, jax.tree.map(np.asarray, double))
