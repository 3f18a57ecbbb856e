"""Nearest neighbours against brute force and scikit-learn; scores on cases counted by hand."""

import functools
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.neighbors

from lowdim_diffusion import generalization


def brute(x, reference, k):
    x, reference = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, reference))
    d = np.sqrt(((x[:, None] - reference[None]) ** 2).sum(-1))
    index = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, index, 1), index


@pytest.mark.parametrize(
    ("num", "total", "dim", "k", "block"),
    [(1, 1, 1, 1, 4096), (5, 7, 3, 3, 1), (9, 30, 2, 1, 4), (4, 23, 6, 20, 8)],
)
def test_agrees_with_brute_force(num, total, dim, k, block):
    rng = np.random.default_rng(total)
    search = jax.jit(lambda x, y: generalization.nearest(x, y, k, block=block, query_block=3))
    for _ in range(10):
        x = rng.standard_normal((num, dim)).astype(np.float32)
        reference = rng.standard_normal((total, dim)).astype(np.float32)
        found = search(x, reference)
        distance, index = brute(x, reference, k)
        np.testing.assert_array_equal(found.index, index)
        np.testing.assert_allclose(found.distance, distance, rtol=1e-5)


def test_real_digits_agree_with_scikit_learn():
    digits = sklearn.datasets.load_digits().images[..., None]  # float64, whole numbers 0 .. 16
    train, test = digits[:1400], digits[1400:]
    found = generalization.nearest(test.astype(np.uint8), train.astype(np.uint8), k=5, block=300)
    flat = lambda x: x.reshape(len(x), -1)
    reference = sklearn.neighbors.NearestNeighbors(n_neighbors=5, algorithm="brute")
    distance, _ = reference.fit(flat(train)).kneighbors(flat(test))
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6)
    again = np.linalg.norm(flat(test)[:, None] - flat(train)[np.asarray(found.index)], axis=-1)
    np.testing.assert_allclose(again, distance, rtol=1e-6)


def test_large_offsets_and_near_duplicates_lose_no_digits():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 20)).astype(np.float32)
    reference = np.concatenate([base, base + np.float32(1e-3)]) + np.float32(1e4)
    x = reference[:40] + (rng.standard_normal((40, 20)) * 0.01).astype(np.float32)
    found = generalization.nearest(x, reference, k=2)
    distance, index = brute(x, reference, 2)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-5)


def test_ties_duplicates_and_itself():
    reference = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0]])
    found = generalization.nearest(reference, reference, k=3, block=2)
    assert found.index[:, 0].tolist() == [0, 1, 1, 3]
    assert found.index[1].tolist() == [1, 2, 0]
    assert found.distance[:, 0].tolist() == [0, 0, 0, 0]
    empty = generalization.nearest(jnp.zeros((0, 2)), reference, k=2)
    assert empty.distance.shape == (0, 2)


def test_distance_is_differentiable(x64):
    rng = np.random.default_rng(0)
    x, reference = (
        jnp.asarray(rng.standard_normal((3, 4))),
        jnp.asarray(rng.standard_normal((9, 4))),
    )
    found = generalization.nearest(x, reference)
    grad = jax.grad(lambda x: generalization.nearest(x, reference).distance.sum())(x)
    expected = (x - reference[found.index[:, 0]]) / found.distance
    np.testing.assert_allclose(grad, expected, atol=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"k too large: expected at most the 3 reference points"):
        generalization.nearest(jnp.ones((2, 4)), jnp.ones((3, 4)), k=4)
    with pytest.raises(ValueError, match=r"shape of an example: expected the reference's \(5,\)"):
        generalization.nearest(jnp.ones((2, 4)), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="threshold out of range"):
        generalization.generalization_score(jnp.ones((2, 4)), jnp.ones((3, 4)), 15.0)
    with pytest.raises(ValueError, match="shape of b: expected that of a"):
        generalization.reproducibility_score(jnp.ones((2, 4)), jnp.ones((3, 4)), 0.5)
    with pytest.raises(ValueError, match="too few training examples"):
        generalization.memorized_fraction(jnp.ones((2, 4)), jnp.ones((1, 4)))


def test_generalization_score_counts_copies():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((50, 6, 6, 1))
    copies = 0.3 * train[:20] + 4  # another contrast and brightness: still copies
    novel = rng.standard_normal((60, 6, 6, 1))
    samples = np.concatenate([copies, novel])
    cosine = np.corrcoef(samples.reshape(80, -1), train.reshape(50, -1))[:80, 80:].max(1)
    blank = np.zeros((1, 6, 6, 1))  # resembles nothing, and hides nothing
    train = np.concatenate([train, blank])
    pixel = generalization.pixel_embedding
    score = jax.jit(functools.partial(generalization.generalization_score, embed=pixel))
    for threshold in (0.3, 0.6, 0.99):
        got = score(samples, train, threshold)
        np.testing.assert_allclose(got, np.mean(cosine <= threshold), atol=1e-6)
    assert float(score(np.ones((80, 6, 6, 1)), train, 0.2)) == 1


def test_reproducibility_score_counts_pairs_and_takes_an_embedding():
    a = jnp.eye(4)
    b = a.at[0].set(jnp.array([0.0, 1.0, 0.0, 0.0]))
    assert float(generalization.reproducibility_score(a, b, 0.9)) == 0.75
    constant = lambda x: 7 * jnp.ones((x.shape[0], 2))
    assert float(generalization.reproducibility_score(a, b, 0.9, embed=constant)) == 1
    score = lambda b: generalization.reproducibility_score(a, b, 0.9)
    assert jax.jit(jax.vmap(score))(jnp.stack([a, b])).tolist() == [1, 0.75]


def test_memorized_fraction():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((40, 30))
    near = train[:10] + 0.05 * rng.standard_normal((10, 30))
    samples = np.concatenate([near, train[:5], rng.standard_normal((25, 30))])
    assert float(generalization.memorized_fraction(samples, train)) == pytest.approx(15 / 40)
    near = generalization.nearest(samples, train, k=3)
    assert int(generalization.is_memorized(near).sum()) == 15
    with pytest.raises(ValueError, match="call nearest with k=2"):
        generalization.is_memorized(generalization.nearest(samples, train))
    twins = np.concatenate([train, train])
    assert float(generalization.memorized_fraction(train[:5], twins)) == 1  # equal, though d2 = 0


def idx_images(path):
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    return raw[16:].reshape(-1, 28, 28).astype(np.float32) / 255


@pytest.mark.slow
def test_ten_thousand_images_match_the_published_distances(data_root):
    """Held-out MNIST against the first 10,000 training images: mean d1 4.7285, no false alarm."""
    folder = data_root / "mnist"
    train = idx_images(next(folder.rglob("train-images*gz")))[:10000]
    test = idx_images(next(folder.rglob("t10k-images*gz")))
    distance, _ = jax.jit(lambda x, y: generalization.nearest(x, y, 2))(test, train)
    np.testing.assert_allclose(distance[:, 0].mean(), 4.7285, atol=1e-4)
    ratio = distance[:, 0] / distance[:, 1]
    np.testing.assert_allclose([ratio.min(), ratio.mean()], [0.506, 0.9357], atol=5e-4)
    assert float(generalization.memorized_fraction(test, train)) == 0
