"""Precision, recall, density, coverage and the Frechet distance against other ways to get them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from lowdim_diffusion import data, generalization


def balls(samples, real, k):
    """The definition on all distances, by scipy in float64; whole numbers are exact."""
    cdist = functools.partial(scipy.spatial.distance.cdist, metric="sqeuclidean")
    r = np.sort(cdist(real, real), axis=1)[:, k]
    q = np.sort(cdist(samples, samples), axis=1)[:, k]
    between = cdist(samples, real)
    inside = between < r[None]
    recall = (between < q[:, None]).any(0).mean()
    return inside.any(1).mean(), recall, inside.sum(1).mean() / k, inside.any(0).mean()


def test_digits_against_the_definition():
    """Distances between digits are roots of whole numbers: many points lie just on a surface."""
    images = data.load("digits").images.reshape(1797, 64).astype(np.float64)
    assert (images % 1 == 0).all()
    real, samples = images[:250], np.concatenate([images[500:600], images[:30]])
    score = functools.partial(generalization.precision_recall, k=3, block=100, query_block=60)
    found = jax.jit(score)(
        samples.astype(np.uint8).reshape(-1, 8, 8, 1), images[:250].reshape(-1, 8, 8, 1)
    )
    expected = balls(samples, real, 3)
    assert 0.1 < min(expected) < max(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_equal_distributions_and_far_ones():
    """For equal distributions density is 1 and coverage 1 - 2^-k; constants are in no ball."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12, 200, 3)).astype(np.float32) + 30
    x[10] += 100
    x[11] = y[11] = 1
    score = jax.jit(jax.vmap(functools.partial(generalization.precision_recall, k=3)))
    quality = score(x, y)
    assert float(quality.density[:10].mean()) == pytest.approx(1, abs=0.06)
    assert float(quality.coverage[:10].mean()) == pytest.approx(7 / 8, abs=0.03)
    np.testing.assert_array_equal(np.stack(quality)[:, 10:], 0)


def root_distance(a, b):
    """The formula with a matrix square root, in float64."""
    c, d = (np.cov(x.T) for x in (a, b))
    root = scipy.linalg.sqrtm(c)
    cross = scipy.linalg.sqrtm(root @ d @ root)
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c + d - 2 * np.real(cross))


def test_frechet_against_the_matrix_root():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 12, 12))
    a, b = rng.standard_normal((80, 12)) @ mix[0] + 50, rng.standard_normal((60, 12)) @ mix[1] + 49
    distance = functools.partial(generalization.frechet_distance, embed=lambda x: x[:, :9])
    expected = root_distance(a[:, :9], b[:, :9])
    np.testing.assert_allclose(jax.jit(distance)(a, b), expected, rtol=1e-5)


def test_frechet_closed_forms_of_singular_sets(x64):
    """N(m, a^2 I) and N(0, b^2 I): |m|^2 + n (a - b)^2; equal sets 0, in whatever rank."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.standard_normal((30, 6)))[0]
    x = np.concatenate([np.eye(6), -np.eye(6)]) * np.sqrt(11 / 2)  # covariance I, mean 0
    a, b = 2 * x @ frame.T + 1, 0.5 * x @ frame.T
    distance = jax.jit(generalization.frechet_distance)
    np.testing.assert_allclose(distance(a, b), 30 + 6 * 1.5**2)
    other = np.linalg.qr(np.concatenate([frame, rng.standard_normal((30, 6))], 1))[0][:, 6:]
    apart = distance(x @ frame.T, x @ other.T)  # orthogonal: tr C1 + tr C2
    np.testing.assert_allclose(apart, 12)
    assert 0 <= float(distance(a, a[::-1])) < 1e-24


@pytest.mark.slow
def test_frechet_has_a_gradient(x64):
    rng = np.random.default_rng(0)
    a, b, step = rng.standard_normal((3, 20, 4))
    distance = lambda s: generalization.frechet_distance(a + s * step, b)
    slope = (distance(1e-5) - distance(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(distance)(0.0), slope, rtol=1e-7)


def test_unfit_sets_are_refused(unchecked):
    g, x = generalization, np.ones((6, 3))
    with pytest.raises(ValueError, match="too few samples: expected more than k = 5, got 5"):
        g.precision_recall(x[:5], x)
    with pytest.raises(ValueError, match="too few real"):
        g.precision_recall(x, x[:2], k=3)
    with pytest.raises(ValueError, match="k too small"):
        g.precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match="too few examples in b: expected at least 2"):
        g.frechet_distance(x, x[:1])
    uneven = lambda e: e[:, : 2 + (len(e) > 5)]
    for score in (functools.partial(g.precision_recall, k=2), g.frechet_distance):
        with pytest.raises(ValueError, match="no examples in"):
            score(x[:0], x)
        with pytest.raises(ValueError, match="1 of 6 with NaN or inf"):
            score(x, np.where(np.arange(18).reshape(6, 3) == 7, np.nan, 1))
        with pytest.raises(ValueError, match="wrong shape of an example"):
            score(x, x[:, :2])
        with pytest.raises(ValueError, match="width of the embedding"):
            score(x[:5], x, embed=uneven)
    assert jnp.isnan(jax.jit(g.frechet_distance)(x * np.nan, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quality", "distance"),
    [
        ("mnist", (0.9203, 0.9146, 0.9334, 0.9217), 0.58936),
        ("fashion-mnist", (0.8205, 0.8206, 0.9998, 0.9670), 0.41510),
    ],
)
def test_held_out_images_score_as_published(name, quality, distance, data_root):
    """10,000 held-out images against the first 10,000 training images, by prdc and FID."""
    real = data.load(data_root / name, split="train").images[:10000].astype(np.float32) / 255
    held_out = data.load(data_root / name, split="test").images.astype(np.float32) / 255
    np.testing.assert_allclose(
        jax.jit(generalization.precision_recall)(held_out, real), quality, atol=1.01e-4
    )
    found = jax.jit(generalization.frechet_distance)(real, held_out)
    np.testing.assert_allclose(found, distance, atol=2e-5)
