"""Scores of copying and agreement on cases counted by hand, and on real images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import sklearn.neighbors

from lowdim_diffusion import data, generalization


def unit(x):
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def digits():
    train, held_out = data.load("digits").split(1200)
    return train.floats(), held_out.floats()


# ---- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 40, 12, 3)])
def test_image_embedding_is_the_laplacian_of_a_gaussian(shape, x64):
    x = np.random.default_rng(0).standard_normal(shape)
    height, width = shape[1:3]
    e = scipy.fft.dctn(x.mean(-1), axes=(1, 2), norm="ortho")[:, :24, :24]
    side = np.sqrt(height * width)
    i, j = np.arange(e.shape[1])[:, None] / height, np.arange(e.shape[2])[None] / width
    k = side * np.hypot(i, j)
    e = unit(e * k**2 * np.exp(-((np.pi * k / 16) ** 2) / 2))
    np.testing.assert_allclose(generalization.image_embedding(x), e, atol=1e-12)


def test_image_embedding_is_blind_to_light_size_and_colour():
    embed = jax.jit(generalization.image_embedding)
    t = np.linspace(0, 1, 32, endpoint=False) + 1 / 64
    x = np.cos(3 * np.pi * t)[:, None] + np.cos(2 * np.pi * t)[None] * t[:, None]
    small = x.reshape(16, 2, 16, 2).mean((1, 3))[None, ..., None]
    x = x[None, ..., None] * np.ones(3)
    e = embed(x)
    np.testing.assert_allclose(embed(0.2 * x - 50), e, atol=1e-4)
    np.testing.assert_allclose(embed(x * np.array([2.0, 0.5, 0.5])), e, atol=1e-6)
    assert float(jnp.sum(embed(small).reshape(16, 16) * e.reshape(24, 24)[:16, :16])) > 0.99
    assert not embed(np.full((1, 32, 32, 3), 0.1, np.float32)).any()  # rounding is not a picture
    assert not generalization.pixel_embedding(np.full((1, 784), 0.1, np.float32)).any()
    grad = jax.grad(lambda x: embed(x).sum())
    assert jnp.isfinite(grad(jnp.ones((1, 32, 32, 3)))).all()


def test_features_computed_elsewhere(tmp_path):
    rng = np.random.default_rng(0)
    train = rng.standard_normal((30, 16)).astype(np.float16)
    samples = np.concatenate([5 * train[:4], rng.standard_normal((4, 16))])
    path = tmp_path / "sscd.npz"
    np.savez(path, samples=samples, train=train, more="ignored")
    f = generalization.load_features(path)
    cosine = (unit(samples) @ unit(train).T).max(1)
    search = functools.partial(generalization.most_similar, embed=generalization.no_embedding)
    found = jax.jit(search)(*f)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-3)
    assert found.index[:4].tolist() == [0, 1, 2, 3]


def test_unfit_feature_files_are_refused(tmp_path, unchecked):
    load, path = generalization.load_features, tmp_path / "f.npz"
    good = np.ones((2, 3))
    for arrays, match in [
        ({"samples": good}, "lacks train"),
        ({"samples": good, "train": np.array([[None]], object)}, "unreadable"),
        ({"samples": good, "train": np.ones((4, 2))}, "width of samples: expected that of train"),
        ({"samples": good, "train": np.ones(4)}, "unfit train"),
        ({"samples": good, "train": np.ones((0, 3))}, "unfit train"),
        ({"samples": good * 1j, "train": good}, "unreadable"),
        ({"samples": good * np.nan, "train": good}, "2 of 2 with NaN or inf"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=match):
            load(path)
    for content in (b"", b"not a zip", path.read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"unreadable: expected an \.npz"):
            load(path)
    np.save(path.with_suffix(".npy"), good)
    with pytest.raises(ValueError, match=r"expected an \.npz"):
        load(path.with_suffix(".npy"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


# ---- cosines ------------------------------------------------------------------------------------


def test_threshold_holds_its_false_positive_rate(digits):
    train, held_out = digits
    one, other = held_out[:298], held_out[-298:]
    search = jax.jit(generalization.most_similar)
    fresh, more = search(one, train).cosine, search(other, train).cosine
    calibrate = functools.partial(generalization.calibrate_threshold, false_positive_rate=0.05)
    threshold = jax.jit(calibrate)(one, train)
    assert float(threshold) == np.sort(fresh)[285 - 1]  # rank ceil(299 * .95)
    assert np.mean(more > threshold) < 0.09
    noise = 0.03 * np.random.default_rng(0).standard_normal(one.shape)
    copies = search((0.6 * train[:298] + 0.2 + noise).astype(np.float32), train)
    assert np.mean(copies.cosine > threshold) > 0.99
    assert np.mean(copies.index == np.arange(298)) > 0.99


def test_pairs_of_different_images_pass_the_pair_threshold_rarely(digits):
    train, held_out = digits
    calibrate = functools.partial(generalization.pair_threshold, false_positive_rate=0.05)
    threshold = float(jax.jit(calibrate)(held_out[:298], train[:500]))
    same = jax.jit(generalization.reproducibility_score)
    assert 0.01 < same(held_out[:298], train[500:798], threshold) < 0.09
    assert threshold < float(jax.jit(generalization.calibrate_threshold)(held_out, train))
    cosines = np.random.default_rng(0).permutation(np.linspace(0, 1, 12))
    one = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
    axis = np.array([[1.0, 0.0]])
    found = calibrate(one, axis, false_positive_rate=0.25, embed=generalization.no_embedding)
    np.testing.assert_allclose(found, np.linspace(0, 1, 12)[10 - 1], rtol=1e-6)  # ceil(13 * .75)


def test_threshold_is_the_conformal_rank():
    """At rate 1/4 of 7 fresh cosines the 6th: exceeded by an 8th one with probability 1/4."""
    angles = np.deg2rad([80, 70, 60, 50, 40, 30, 20])
    held_out = np.stack([np.cos(angles), np.sin(angles)], 1)
    calibrate = functools.partial(
        generalization.calibrate_threshold,
        train=np.array([[1.0, 0.0]]),
        embed=generalization.no_embedding,
    )
    found = jax.jit(functools.partial(calibrate, false_positive_rate=0.25))(held_out)
    assert float(found) == pytest.approx(np.cos(np.deg2rad(30)))
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((2000, 8))
    rate = np.mean([np.sort(d[:7])[5] < d[7] for d in draws])
    assert rate == pytest.approx(0.25, abs=0.03)


def test_scores_show_nan_where_they_cannot_raise():
    train = jnp.eye(4)
    bad = train.at[1, 2].set(jnp.nan)
    score = generalization
    assert jnp.isnan(jax.jit(score.generalization_score)(bad, train, 0.5))
    assert jnp.isnan(jax.jit(score.reproducibility_score)(bad, train, 0.5))
    mae = functools.partial(score.mae_score, pixel_range=(0, 1))
    assert jnp.isnan(jax.jit(mae)(bad, train))


# ---- distances ----------------------------------------------------------------------------------


def test_mae_score_counts_grey_levels():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (60, 8, 8, 3))
    b = np.clip(a + np.linspace(-40, 40, 60).round().astype(int)[:, None, None, None], 0, 255)
    error = np.abs(a - b).mean((1, 2, 3))
    assert 0.2 < np.mean(error < 15) < 0.5
    for scale, low in ((1 / 127.5, -1), (1 / 255, 0), (1, 0)):
        score = generalization.mae_score(
            a * scale + low, b * scale + low, pixel_range=(low, low + 255 * scale)
        )
        assert float(score) == pytest.approx(np.mean(error < 15))
    beyond = generalization.mae_score(
        np.full((1, 4), 3.0), np.full((1, 4), 9.0), pixel_range=(0, 1)
    )
    assert float(beyond) == 1  # both white in a picture file


def test_distance_scores_against_scikit_learn(digits):
    train, held_out = digits
    train = np.concatenate([train, train[:100]])  # twins: no sample lies nearer than they
    flat = lambda x: x.reshape(len(x), -1).astype(np.float64)
    near = sklearn.neighbors.NearestNeighbors(n_neighbors=2, algorithm="brute").fit(flat(train))
    rng = np.random.default_rng(0)
    samples = np.concatenate(
        [train[70:130] + 0.1 * rng.standard_normal((60, 8, 8, 1)), held_out[:80]]
    )
    distance, index = near.kneighbors(flat(samples))
    fresh, _ = near.kneighbors(flat(held_out[-140:]))
    between, _ = near.kneighbors(flat(train))
    authentic = np.mean(distance[:, 0] > between[index[:, 0], 1])
    assert 0.1 < authentic < 0.9

    @jax.jit
    def scores(samples, train, fresh):
        g = generalization
        return (
            g.distance_ratio_score(samples, train, fresh),
            g.pixel_novelty(samples, train),
            g.authentic_fraction(samples, train),
        )

    ratio = distance[:, 0].mean() / fresh[:, 0].mean()
    novelty = np.mean(distance[:, 0] / np.linalg.norm(flat(samples), axis=1))
    found = scores(samples.astype(np.float32), train, held_out[-140:])
    np.testing.assert_allclose(found, [ratio, novelty, authentic], rtol=1e-5)


# ---- bad input ----------------------------------------------------------------------------------


def test_unfit_sets_are_refused(unchecked):
    g = generalization
    x, empty, nan = np.ones((4, 3)), np.zeros((0, 3)), np.full((4, 3), np.nan)
    scores = {
        "generalization_score": lambda a, b: g.generalization_score(a, b, 0.5),
        "calibrate_threshold": lambda a, b: g.calibrate_threshold(a, b, false_positive_rate=0.5),
        "pair_threshold": lambda a, b: g.pair_threshold(a, b, false_positive_rate=0.5),
        "memorized_fraction": g.memorized_fraction,
        "authentic_fraction": g.authentic_fraction,
        "pixel_novelty": g.pixel_novelty,
        "distance_ratio_score": lambda a, b: g.distance_ratio_score(a, b, x),
        "mae_score": lambda a, b: g.mae_score(a, b, pixel_range=(0, 1)),
        "reproducibility_score": lambda a, b: g.reproducibility_score(a, b, 0.5),
    }
    for name, score in scores.items():
        for a, b in ((empty, x), (x, empty), (empty, empty)):
            with pytest.raises(ValueError, match=r"no examples in|too few held-out|shape of b"):
                score(a, b)
        for a, b in ((nan, x), (x, nan)):
            with pytest.raises(ValueError, match="not finite: expected numbers, got 4 of 4"):
                score(a, b)
        with pytest.raises(ValueError, match=r"wrong shape of an example|shape of b"):
            score(x, np.ones((4, 2)))
        if name not in ("mae_score", "reproducibility_score"):
            continue
        with pytest.raises(ValueError, match=r"shape of b: expected that of a, \(4, 3\)"):
            score(x, np.ones((5, 3)))


def test_unfit_settings_are_refused(unchecked):
    g = generalization
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"threshold out of range: expected \[-1, 1\], got 1\.2"):
        g.reproducibility_score(x, x, 1.2)
    with pytest.raises(ValueError, match="at least 99, got 4; give more"):
        g.calibrate_threshold(x, x)
    with pytest.raises(ValueError, match="too few pairs: expected at least 99, got 16"):
        g.pair_threshold(x, x)
    with pytest.raises(ValueError, match="false_positive_rate out of range"):
        g.calibrate_threshold(x, x, false_positive_rate=1)
    with pytest.raises(ValueError, match="black below white"):
        g.mae_score(x, x, pixel_range=(1, -1))
    with pytest.raises(ValueError, match=r"threshold out of range: expected \[0, 255\]"):
        g.mae_score(x, x, -1, pixel_range=(0, 1))
    with pytest.raises(ValueError, match="too few training examples"):
        g.authentic_fraction(x, x[:1])
    with pytest.raises(ValueError, match=r"expected \[b, h, w, c\], got \(4, 3\); for vectors"):
        g.image_embedding(x)
    with pytest.raises(ValueError, match="wrong shape of the embedding"):
        g.generalization_score(x, x, 0.5, embed=lambda x: x.sum())
    uneven = lambda e: e[:, : 2 + (len(e) > 4)]
    with pytest.raises(ValueError, match=r"width of the embedding: expected 3 .*, got 2"):
        g.generalization_score(x, np.ones((5, 3)), 0.5, embed=uneven)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "percent"), [("mnist", 65.66), ("fashion-mnist", 70.99)])
def test_held_out_images_are_as_authentic_as_published(name, percent, data_root):
    """10,000 held-out images against the first 10,000 training images, by dgm-eval's rule."""
    train = data.load(data_root / name, split="train").images[:10000].astype(np.float32) / 255
    test = data.load(data_root / name, split="test").images.astype(np.float32) / 255
    found = jax.jit(generalization.authentic_fraction)(test, train)
    assert 100 * float(found) == pytest.approx(percent, abs=0.011)
