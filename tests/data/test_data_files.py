"""Every kind of file a user may have, written here by independent means and read back."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from lowdim_diffusion import data

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 5, 4), np.uint8)
COLOUR = RANDOM.integers(0, 256, (6, 5, 4, 3), np.uint8)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def encoded(array, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- MNIST family -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder(tmp_path, packed):
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    labels = np.array([0, 1, 2, 2, 1, 0])
    write(tmp_path / f"train-images-idx3-ubyte{end}", pack(idx(GREY)))
    write(tmp_path / f"train-labels-idx1-ubyte{end}", pack(idx(labels)))
    test = write(tmp_path / f"t10k-images-idx3-ubyte{end}", pack(idx(GREY[:2])))
    train = data.load(tmp_path)
    assert np.array_equal(train.images[..., 0], GREY)
    assert train.labels.tolist() == labels.tolist()
    assert train.name == tmp_path.name
    assert data.load(tmp_path, split="test").labels is None
    assert data.load(test).num_examples == 2
    with pytest.raises(data.DataError, match="no such split: expected test, got 'train'"):
        data.load(test, split="train")
    with pytest.raises(data.DataError, match=r"no such split: expected .*, got 'val'"):
        data.load(tmp_path, split="val")


def test_idx_one_file_with_another_name(tmp_path):
    file = write(tmp_path / "letters.bin", idx(GREY))
    assert np.array_equal(data.load(str(file)).images[..., 0], GREY)


# --- CIFAR --------------------------------------------------------------------------------------


def cifar_rows(count):
    return RANDOM.integers(0, 256, (count, 3072), np.uint8)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_python_of_every_protocol(tmp_path, protocol):
    rows, labels = cifar_rows(7), [3, 1, 4, 1, 5, 9, 2]
    files = {
        "cifar-10-batches-py/data_batch_2": {b"data": rows[4:], b"labels": labels[4:]},
        "cifar-10-batches-py/data_batch_1": {b"data": rows[:4], b"labels": labels[:4]},
        "cifar-10-batches-py/test_batch": {"data": np.asfortranarray(rows[:2]), "labels": [7, 8]},
        "cifar-10-batches-py/batches.meta": {b"label_names": [b"c%d" % i for i in range(10)]},
    }
    files = {name: pickle.dumps(value, protocol) for name, value in files.items()}
    archive = make_tar(tmp_path / "cifar-10-python.tar.gz", files)
    train = data.load(archive)
    # Channel planes first on disk: pixel (i, j) of plane c is at 1024 c + 32 i + j.
    assert train.images[5, 2, 9, 1] == rows[5, 1024 + 32 * 2 + 9]
    assert np.array_equal(train.images[:, :, :, 2].reshape(7, -1), rows[:, 2048:])
    assert train.labels.tolist() == labels
    assert train.class_names[9] == "c9"
    assert train.name == "cifar-10-python"
    assert data.load(archive, split="test").labels.tolist() == [7, 8]
    for name, content in files.items():
        write(tmp_path / "extracted" / name, content)
    assert data.load(tmp_path / "extracted").sha256 == train.sha256
    assert data.load(tmp_path / "extracted" / "cifar-10-batches-py").sha256 == train.sha256
    one = data.load(tmp_path / "extracted" / "cifar-10-batches-py" / "data_batch_1")
    assert one.num_examples == 4


def python2_batch(rows, labels):
    """A batch as Python 2 wrote the official files: byte strings (U, T), protocol 2."""
    long = lambda b: b"T" + len(b).to_bytes(4, "little") + b
    short = lambda b: b"U" + bytes([len(b)]) + b
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
        b"(K\x01K" + bytes([len(rows)]) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + long(rows.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(b"labels") + numbers + b"u."


def test_cifar_python_2_pickles(tmp_path):
    rows = cifar_rows(3)
    content = python2_batch(rows, [5, 0, 9])
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], rows)
    loaded = data.load(make_tar(tmp_path / "c.tar", {"data_batch_1": content}, "w"))
    assert np.array_equal(loaded.images.transpose(0, 3, 1, 2).reshape(3, 3072), rows)
    assert loaded.labels.tolist() == [5, 0, 9]


def test_cifar_100_python(tmp_path):
    rows = cifar_rows(3)
    files = {
        "cifar-100-python/train": {
            "data": rows,
            "fine_labels": [7, 99, 0],
            "coarse_labels": [1] * 3,
        },
        "cifar-100-python/meta": {"fine_label_names": [f"f{i}" for i in range(100)]},
    }
    files = {name: pickle.dumps(value) for name, value in files.items()}
    loaded = data.load(make_tar(tmp_path / "cifar-100-python.tar.gz", files))
    assert loaded.labels.tolist() == [7, 99, 0]
    assert loaded.class_names[99] == "f99"
    with pytest.raises(data.DataError, match="no such split: expected train, got 'test'"):
        data.load(tmp_path / "cifar-100-python.tar.gz", split="test")


def test_cifar_binary(tmp_path):
    rows, labels = cifar_rows(4), np.array([3, 0, 9, 9], np.uint8)
    ten = np.column_stack([labels, rows]).tobytes()
    hundred = np.column_stack([np.zeros(4, np.uint8), labels + 50, rows]).tobytes()
    names = "\n".join(f"n{i}" for i in range(10)).encode()
    folder = "cifar-10-batches-bin/"
    archive = make_tar(
        tmp_path / "ten.tar.gz",
        {folder + "data_batch_1.bin": ten, folder + "batches.meta.txt": names},
    )
    loaded = data.load(archive)
    assert np.array_equal(loaded.images.transpose(0, 3, 1, 2).reshape(4, 3072), rows)
    assert loaded.labels.tolist() == labels.tolist()
    assert loaded.class_names[3] == "n3"
    write(tmp_path / "hundred" / "train.bin", hundred)
    assert data.load(tmp_path / "hundred").labels.tolist() == (labels + 50).tolist()
    assert data.load(tmp_path / "hundred" / "train.bin").num_examples == 4


# --- pictures -----------------------------------------------------------------------------------


def tree(kind="PNG", end="png"):
    """Six colour pictures in two class folders; names sort naturally, not by character."""
    names = [f"set/cat/img{i}.{end}" for i in (2, 10, 1)] + [f"set/dog/{i}.{end}" for i in "abc"]
    return {name: encoded(COLOUR[i], kind) for i, name in enumerate(names)}


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz"])
def test_pictures_in_class_folders(tmp_path, form):
    files = {
        **tree(),
        "__MACOSX/set/._1.png": b"junk",
        "set/cat/.hidden.png": b"",
        "set/README": b"x",
    }
    path = tmp_path / f"animals.{form}"
    if form == "folder":
        for name, content in files.items():
            write(path / name, content)
    elif form == "zip":
        make_zip(path, files)
    else:
        make_tar(path, files, "w:gz" if form == "tar.gz" else "w")
    loaded = data.load(path)
    assert np.array_equal(loaded.images, COLOUR[[2, 0, 1, 3, 4, 5]])
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.class_names == ("cat", "dog")
    dogs = data.load(path, classes=["dog"], num_examples=2)
    assert np.array_equal(dogs.images, COLOUR[3:5])
    assert dogs.labels.tolist() == [1, 1]
    assert dogs.num_classes == 2


@pytest.mark.parametrize("kind", ["PNG", "PPM", "BMP", "TIFF", "GIF"])
def test_lossless_formats(tmp_path, kind):
    for i, picture in enumerate(GREY):
        write(tmp_path / f"{i}.{kind.lower()}", encoded(picture, kind))
    loaded = data.load(tmp_path, channels=1)
    assert np.array_equal(loaded.images[..., 0], GREY)
    assert loaded.labels is None


def test_splits_of_pictures_share_their_classes(tmp_path):
    files = {
        "root/train/a/1.png": encoded(COLOUR[0]),
        "root/train/b/1.png": encoded(COLOUR[1]),
        "root/train/c/1.png": encoded(COLOUR[2]),
        "root/test/c/1.png": encoded(COLOUR[3]),
    }
    archive = make_zip(tmp_path / "x.zip", files)
    assert data.load(archive).labels.tolist() == [0, 1, 2]
    test = data.load(archive, split="test")
    assert test.labels.tolist() == [2]
    assert test.class_names == ("a", "b", "c")
    assert np.array_equal(test.images[0], COLOUR[3])
    with pytest.raises(data.DataError, match="no such split: expected test or train, got 'val'"):
        data.load(archive, split="val")
    flat = make_zip(tmp_path / "flat.zip", tree())
    with pytest.raises(data.DataError, match="no split 'test'"):
        data.load(flat, split="test")


def test_size_cuts_the_middle(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the middle third is all that a square keeps
    write(tmp_path / "wide.png", encoded(wide))
    write(tmp_path / "small.png", encoded(np.full((4, 4, 3), 200, np.uint8)))
    loaded = data.load(tmp_path, size=4)
    assert loaded.data_shape == (4, 4, 3)
    assert loaded.images.min() >= 195
    assert data.load(tmp_path, size=(2, 6)).data_shape == (2, 6, 3)


def test_channels_are_decided_or_declared(tmp_path):
    grey = write(tmp_path / "grey" / "a.png", encoded(GREY[0])).parent
    assert data.load(grey).data_shape == (5, 4, 1)
    assert np.array_equal(data.load(grey, channels=3).images[0], np.stack([GREY[0]] * 3, axis=-1))
    colour = write(tmp_path / "colour" / "a.png", encoded(COLOUR[0])).parent
    assert data.load(colour).data_shape == (5, 4, 3)
    luma = COLOUR[0] @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(data.load(colour, channels=1).images[0, ..., 0] - luma).max() <= 1
    deep = (np.arange(20).reshape(5, 4) * 257 * 13).astype(np.uint16)
    deep_file = write(tmp_path / "deep" / "a.png", encoded(deep))
    assert np.array_equal(
        data.load(deep_file.parent).images[0, ..., 0], np.arange(20).reshape(5, 4) * 13
    )


def test_photographs_stand_upright(tmp_path):
    image = Image.fromarray(COLOUR[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to show
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(data.load(tmp_path).images[0], np.rot90(COLOUR[0], -1))


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_key", "y_key"), [("x", "y"), ("images", "labels"), ("data", "label"), ("X", "Y")]
)
def test_npz_names(tmp_path, x_key, y_key):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **{x_key: COLOUR, y_key: np.arange(6)[:, None]})
    loaded = data.load(path)
    assert np.array_equal(loaded.images, COLOUR)
    assert loaded.labels.tolist() == list(range(6))


def test_npz_with_splits(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=GREY[:4], y_train=[0, 1, 2, 3], x_test=GREY[4:], y_test=[0, 1])
    assert data.load(path).num_examples == 4
    assert np.array_equal(data.load(path, split="test").images[..., 0], GREY[4:])
    med = tmp_path / "med.npz"
    np.savez(med, train_images=GREY, val_images=GREY[:1], train_labels=[[0]] * 6, val_labels=[[0]])
    assert data.load(med, split="val").num_examples == 1
    with pytest.raises(data.DataError, match="no split 'test': expected an array named x_test"):
        data.load(med, split="test")


def test_npy_orders_and_types(tmp_path):
    x = RANDOM.normal(size=(7, 3))
    for i, array in enumerate([x, np.asfortranarray(x), x.astype(">f4"), x.astype(np.float16)]):
        path = tmp_path / f"{i}.npy"
        np.save(path, array)
        np.testing.assert_array_equal(data.load(path).images, array.astype(np.float32))


def test_mat_rows_are_pictures_by_columns(tmp_path):
    pictures = RANDOM.integers(0, 256, (6, 4, 4), np.uint8)
    rows = np.stack([picture.ravel(order="F") for picture in pictures])
    kinds = {"bytes": rows, "whole": rows.astype(float), "unit": rows / 255}
    for name, fea in kinds.items():
        path = tmp_path / f"{name}.mat"
        scipy.io.savemat(path, {"fea": fea, "gnd": np.arange(1, 7)[:, None]}, do_compression=True)
        loaded = data.load(path)
        np.testing.assert_allclose(
            loaded.floats()[..., 0], pictures / 127.5 - 1, atol=1e-6, err_msg=name
        )
        assert loaded.labels.tolist() == list(range(6))
        assert loaded.class_names == tuple("123456")
    last = tmp_path / "svhn.mat"
    scipy.io.savemat(last, {"X": COLOUR.transpose(1, 2, 3, 0), "y": np.arange(6)[:, None]})
    assert np.array_equal(data.load(last).images, COLOUR)
    plain = tmp_path / "plain.mat"
    scipy.io.savemat(plain, {"x": RANDOM.normal(size=(5, 9))})
    assert data.load(plain).data_shape == (9,)


def test_folder_with_one_data_file(tmp_path):
    np.savez(tmp_path / "only.npz", x=GREY)
    assert data.load(tmp_path).name == tmp_path.name
    np.savez(tmp_path / "other.npz", x=GREY)
    with pytest.raises(data.DataError, match=r"several data files: expected one, got .*other\.npz"):
        data.load(tmp_path)
