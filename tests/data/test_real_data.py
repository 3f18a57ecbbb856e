"""The files that users have, where present: published counts, digests and statistics."""

import collections
import hashlib
import tarfile

import numpy as np
import pytest
import scipy.io

from lowdim_diffusion import data


def md5_of_idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return hashlib.md5(head + array.astype(np.uint8).tobytes()).hexdigest()


MNIST = {
    "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
    "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_the_original(data_root, split):
    mnist = data.load(data_root / "mnist", split=split)
    found = md5_of_idx(mnist.images[..., 0]), md5_of_idx(mnist.labels)
    assert found == MNIST[split]
    if split == "train":
        x = mnist.images / np.float32(255)
        assert abs(x.mean() - 0.13066) < 1e-5
        assert abs(x.std() - 0.30811) < 1e-5


def test_fashion_mnist(data_root):
    train = data.load(data_root / "fashion-mnist")
    test = data.load(data_root / "fashion-mnist", split="test")
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    x = train.images / np.float32(255)
    assert abs(x.mean() - 0.28604) < 1e-5
    assert abs(x.std() - 0.35302) < 1e-5
    assert train.describe() == (
        "fashion-mnist: 60000 images 28x28x1, uint8 0..255 (drawn in [-1, 1]), 10 classes"
    )


def test_cifar_10_pickles(data_root):
    cifar = data.load(data_root / "cifar10" / "cifar-10-first4000-python.tar.gz")
    assert cifar.images.shape == (4000, 32, 32, 3)
    assert cifar.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert cifar.class_names[6] == "frog"
    # The first picture's first pixels, as everybody who has opened data_batch_1 has seen them.
    assert cifar.images[0, 0, 0].tolist() == [59, 62, 63]
    with pytest.raises(data.DataError, match="no such split: expected train, got 'test'"):
        data.load(data_root / "cifar10" / "cifar-10-first4000-python.tar.gz", split="test")


def test_cifar_10_extracted(data_root, tmp_path):
    archive = data_root / "cifar10" / "cifar-10-first4000-python.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    assert data.load(tmp_path).sha256 == data.load(archive).sha256


def test_folder_with_several_archives(data_root):
    with pytest.raises(data.DataError, match="several data files"):
        data.load(data_root / "cifar10")


@pytest.mark.slow
def test_cifar_10_jpegs(data_root):
    archive = data_root / "cifar10" / "cifar10-jpeg-60000.tar.gz"
    test = data.load(archive, split="test")
    assert test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    train = data.load(archive)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    # Within a class the order is the data set's: the lossless first frogs match the JPEG ones.
    exact = data.load(data_root / "cifar10" / "cifar-10-first4000-python.tar.gz", classes=["frog"])
    frogs = train.take(train.labels == train.class_names.index("frog"))
    error = exact.images[:50].astype(float) - frogs.images[:50]
    assert 28 < 10 * np.log10(255**2 / np.mean(error**2)) < 34


def test_extended_yale_b(data_root):
    faces = data.load(data_root / "extended-yale-b" / "CroppedYale_48x42.zip")
    assert faces.images.shape == (2414, 48, 42, 1)
    assert faces.num_classes == 38
    fewer = {"11": 60, "12": 59, "13": 60, "15": 63, "16": 62, "17": 63, "18": 63}
    counts = collections.Counter(faces.class_names[label] for label in faces.labels)
    for name, count in counts.items():
        assert count == fewer.get(name.removeprefix("yaleB"), 64), name
    large = data.load(data_root / "extended-yale-b" / "CroppedYale_192x168_subjects01-03.zip")
    assert large.images.shape == (192, 192, 168, 1)
    small = faces.take(faces.labels < 3).images[:, :, :, 0].astype(float)
    means = large.images[..., 0].reshape(192, 48, 4, 42, 4).mean(axis=(2, 4))
    assert np.abs(small - means).mean() < 3  # the same pictures, upright, in the same order


def test_coil_20(data_root):
    coil = data.load(data_root / "coil20")
    assert coil.images.shape == (1440, 32, 32, 1)
    assert np.bincount(coil.labels).tolist() == [72] * 20
    assert coil.images.min() == -1
    row = scipy.io.loadmat(data_root / "coil20" / "COIL20.mat")["fea"][100]
    upright = row.reshape(32, 32, order="F")  # stored column by column
    np.testing.assert_allclose(coil.images[100, :, :, 0], 2 * upright - 1, atol=1e-6)
    poses = coil.images[:72, :, :, 0]
    turn = np.abs(np.diff(poses, axis=0)).mean()
    assert turn < 0.1  # neighbouring poses are 5 degrees apart
