"""Data sets in memory, and those that need no file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from lowdim_diffusion import data


def test_digits_are_scikit_learns():
    ours, theirs = data.load("digits"), sklearn.datasets.load_digits()
    assert ours.images.dtype == np.uint8
    expected = np.floor(theirs.images * 255 / 16 + 0.5)
    assert np.array_equal(ours.images[..., 0], expected)
    assert np.array_equal(ours.labels, theirs.target)
    assert ours.class_names == tuple("0123456789")
    assert ours.describe() == (
        "digits: 1797 images 8x8x1, uint8 0..255 (drawn in [-1, 1]), 10 classes"
    )


def test_molrg_keeps_its_truth():
    made = data.load("molrg", dim=20, rank=3, num_components=4, num_samples=500, seed=1)
    assert (made.num_examples, made.data_shape, made.num_classes) == (500, (20,), 4)
    bases = np.asarray(made.truth.bases)
    for x, label in zip(made.images, made.labels, strict=True):
        inside = bases[label] @ (bases[label].T @ x)
        np.testing.assert_allclose(inside, x, atol=1e-5)
    joint = bases.transpose(1, 0, 2).reshape(20, 12)
    np.testing.assert_allclose(joint.T @ joint, np.eye(12), atol=1e-5)
    variance = np.sum(made.images**2, axis=1).mean()  # E |x|^2 = rank
    assert abs(variance - 3) < 4.5 * np.sqrt(2 * 3 / 500)


def test_molrg_options():
    a, b, c = (data.molrg(dim=8, rank=2, num_samples=3000, seed=s).sha256 for s in (0, 0, 1))
    assert a == b != c
    noisy = data.molrg(dim=8, rank=2, num_samples=3000, noise_std=0.5)
    assert abs(np.sum(noisy.images**2, axis=1).mean() - (2 + 8 * 0.25)) < 0.3
    with pytest.raises(ValueError, match="no room for mutually orthogonal"):
        data.molrg(dim=8, rank=5)
    assert data.molrg(dim=8, rank=5, num_samples=3000, orthogonal=False).data_shape == (8,)
    with pytest.raises(data.DataError, match=r"molrg: unfit options .*'colour'"):
        data.load("molrg", colour=3)


def test_scaling_goes_round():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pictures = data.from_arrays(levels)
    assert pictures.floats().min() == -1
    assert pictures.floats().max() == 1
    assert np.array_equal(data.to_uint8(pictures.floats()), levels)
    assert np.array_equal(data.to_uint8(jnp.asarray([-5.0, 5.0])), [0, 255])
    unit = jax.jit(data.denormalize)(pictures.floats())
    np.testing.assert_allclose(unit, levels / 255, atol=1e-6)


def test_from_arrays_converts():
    grey = data.from_arrays(np.full((2, 4, 5), 7, np.int64))
    assert grey.images.dtype == np.uint8
    assert grey.data_shape == (4, 5, 1)
    assert data.from_arrays(np.array([[[True, False]]])).images.ravel().tolist() == [255, 0]
    real = data.from_arrays(np.linspace(-1, 1, 24).reshape(2, 2, 2, 3))
    assert real.images.dtype == np.float32
    assert real.is_image
    vectors = data.from_arrays(np.array([[1, 2], [3, 400]]))
    assert vectors.images.dtype == np.float32
    assert not vectors.is_image
    assert vectors.describe() == "data: 2 vectors 2, float32 1..400, no labels"


def test_labels_count_from_zero():
    x = np.zeros((4, 2))
    kept = data.from_arrays(x, [0, 2, 2, 5])
    assert kept.labels.tolist() == [0, 2, 2, 5]
    assert kept.num_classes == 6
    anew = data.from_arrays(x, np.array([[20.0], [-7.0], [-7.0], [300.0]]))
    assert anew.labels.tolist() == [1, 0, 0, 2]
    assert anew.class_names == ("-7", "20", "300")


def test_digest_tells_data_apart():
    x = np.arange(12.0).reshape(6, 2)
    base = data.from_arrays(x, [0, 1, 0, 1, 0, 1])
    assert base.sha256 == data.from_arrays(x.copy(), [0, 1, 0, 1, 0, 1], name="other").sha256
    others = [
        data.from_arrays(x),
        data.from_arrays(x.reshape(4, 3)),
        data.from_arrays(x[::-1], [0, 1, 0, 1, 0, 1]),
        data.from_arrays(x, [0, 1, 0, 1, 1, 1]),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 5


def test_take_and_split():
    digits = data.load("digits")
    part = digits.take([5, 3])
    assert np.array_equal(part.images, digits.images[[5, 3]])
    assert part.labels.tolist() == digits.labels[[5, 3]].tolist()
    a, b = data.from_arrays(np.arange(10.0)[:, None]).split(6, seed=2)
    both = np.concatenate([a.images, b.images]).ravel()
    assert sorted(both.tolist()) == list(range(10))
    assert a.num_examples == 6
    with pytest.raises(
        data.DataError, match="no such split: expected 1 to 1796 examples, got 1797"
    ):
        digits.split(1797)


def test_frozen():
    digits = data.load("digits")
    with pytest.raises(ValueError, match="read-only"):
        digits.images[0] = 0
    with pytest.raises(AttributeError):
        digits.name = "other"


def test_selection():
    twos = data.load("digits", classes=[2])
    assert set(twos.labels.tolist()) == {2}
    assert twos.num_classes == 10
    named = data.load("digits", classes=["2", "7"], num_examples=50)
    assert named.num_examples == 50
    assert set(named.labels.tolist()) == {2, 7}
    full = data.load("digits")
    first = data.load("digits", num_examples=100)
    assert np.array_equal(first.images, full.images[:100])
    a, b, c = (data.load("digits", num_examples=100, seed=s) for s in (0, 0, 1))
    assert a.sha256 == b.sha256 != c.sha256
    assert len(np.unique(a.images.reshape(100, -1), axis=0)) == 100
    large = data.load("digits", size=(16, 12), channels=3, num_examples=5)
    assert large.data_shape == (16, 12, 3)
    assert np.array_equal(large.images[..., 0], large.images[..., 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 5000}, "digits: too few examples: expected 5000, got 1797"),
        ({"num_examples": 0}, "num_examples too small: expected at least 1, got 0"),
        ({"classes": [10]}, "unknown class: expected 0 to 9, got 10"),
        ({"classes": ["cat"]}, "unknown class: expected 0, 1, 2, .*, got 'cat'"),
        ({"split": "test"}, "no such split: expected train, .* divide it with Dataset.split"),
        ({"size": 0}, "unfit size: expected 1 to 8192 pixels, got 0 x 0"),
        ({"size": (3, 4, 5)}, r"unfit size: expected a side or \(height, width\)"),
        ({"channels": 2}, "unfit channels: expected 1 or 3, got 2"),
        ({"colour": 1}, "unfit options"),
    ],
)
def test_nice_errors_of_selection(options, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **options)


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.zeros(3), None, r"unfit shape of the examples: expected \[N, n\].*, got \[3\]"),
        (np.zeros((0, 3)), None, "no examples: expected at least one"),
        (np.zeros((3, 2), complex), None, "unfit dtype of the examples: .* got complex128"),
        (np.full((2, 2, 2), 256), None, "pixel out of range: expected 0 to 255, got 256 to 256"),
        (np.zeros((2, 3, 8, 8), np.uint8), None, r"channels come last: transpose \(0, 2, 3, 1\)"),
        ([[1, 2], [np.nan, 1]], None, "NaN or infinity in 1 of 2 examples, first in number 1"),
        ([[1, 2], [1e39, 1]], None, "expected finite float32 numbers"),
        (np.zeros((3, 2)), [0, 1], r"labels do not match the examples: expected \[3\], got \[2\]"),
        (np.zeros((2, 2)), [0, 0.5], "unfit labels: expected whole numbers"),
        (np.zeros((2, 2)), ["a", "b"], "unfit labels: expected whole numbers"),
    ],
)
def test_nice_errors_of_arrays(x, labels, message):
    with pytest.raises(data.DataError, match=message):
        data.from_arrays(x, labels)


def test_label_beyond_the_class_names():
    with pytest.raises(data.DataError, match="label out of range: expected 0 to 1, got 0 to 2"):
        data.from_arrays(np.zeros((3, 2)), [0, 1, 2], class_names=["a", "b"])
