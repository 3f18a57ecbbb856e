"""Data read as they are drawn: what is read, in what order, and what happens to what cannot be."""

import itertools
import shutil
import tarfile
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from lowdim_diffusion import data, sharding
from lowdim_diffusion.data import _records, _stream

B, N = 8, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty small pictures in two class folders, of three sizes."""
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(N):
        inside = path / ("cats" if i % 3 else "dogs")
        inside.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (6 + i % 3, 7, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(inside / f"{i}.png")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def packed(folder, kind, at):
    path = at / f"pictures.{kind}"
    files = sorted(p for p in folder.rglob("*.png"))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))
    return path


def same(lazy, whole):
    loaded = lazy.load()
    assert np.array_equal(loaded.images, whole.images)
    assert loaded.images.dtype == lazy.dtype == whole.images.dtype
    assert np.array_equal(loaded.labels, whole.labels)
    assert loaded.sha256 == whole.sha256
    assert loaded.class_names == lazy.class_names == whole.class_names
    assert (lazy.num_classes, lazy.name) == (whole.num_classes, whole.name)
    assert lazy.data_shape == whole.data_shape and lazy.num_bytes == whole.images.nbytes
    assert data.fingerprint(lazy) == data.fingerprint(whole)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_lazy_pictures_are_the_loaded_ones(folder, tmp_path, kind):
    path = folder if kind == "folder" else packed(folder, kind, tmp_path)
    for options in (
        {"size": 5},
        {"size": (4, 6), "channels": 1, "num_examples": 7, "seed": 3},
        {"size": 5, "classes": ["dogs"]},
    ):
        same(data.load_lazy(path, **options), data.load(path, **options))


@pytest.mark.parametrize("kind", ["pictures", "wide", "vectors"])
def test_lazy_arrays_are_the_loaded_ones(tmp_path, kind):
    rng = np.random.default_rng(0)
    array = {
        "pictures": rng.integers(0, 256, (N, 5, 4, 3)).astype(np.uint8),
        "wide": np.asfortranarray(rng.integers(0, 256, (N, 5, 4))),
        "vectors": rng.normal(size=(N, 6)),
    }[kind]
    path = tmp_path / "x.npy"
    np.save(path, array)
    lazy = data.load_lazy(path)
    assert isinstance(lazy.source._array, np.memmap)
    same(lazy, data.load(path))
    if kind != "vectors":
        same(data.load_lazy(path, size=3), data.load(path, size=3))


def test_parts_are_those_of_the_loaded_data(folder):
    lazy, whole = data.load_lazy(folder, size=5), data.load(folder, size=5)
    for mine, other in zip(lazy.split(20, seed=4), whole.split(20, seed=4), strict=True):
        same(mine, other)
    same(lazy.take([5, 2, 9]).take([2, 0]), whole.take([9, 5]))
    same(data.load_lazy("digits"), data.load("digits"))


def test_digests_tell_data_apart(folder):
    lazy = data.load_lazy(folder, size=5)
    before = data.fingerprint(lazy)
    assert len(before) == N
    other = data.load(folder, size=5)
    images, labels = other.images.copy(), other.labels.copy()
    images[3, 0, 0, 0] ^= 1
    labels[4] ^= 1
    changed = data.fingerprint(data.from_arrays(images, labels, class_names=other.class_names))
    assert {row for row in before if before[row] != changed[row]} == {"3", "4"}
    assert not set(before.values()) & set(data.fingerprint(lazy.take(np.arange(N - 1))).values())


def chunks(monkeypatch, steps):
    monkeypatch.setattr(_stream, "CHUNK_EXAMPLES", steps * B)


def drawn(stream, key, steps, devices=4):
    """Batches of a stream, each device drawing its part from its part of a chunk."""
    mesh = sharding.data_mesh(devices)
    feed = stream.feed(mesh, key, steps[0], steps[-1] + 1)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, feed.shapes)

    def part(arrays, key, step):
        index = sharding.local_index(B // devices, sharding.AXIS)
        return stream.examples(arrays, key, step, index)

    whole = PartitionSpec()
    split = PartitionSpec(sharding.AXIS)
    options = {"mesh": mesh, "in_specs": (specs, whole, whole), "out_specs": split}
    draw = jax.jit(jax.shard_map(part, **options, check_vma=False))
    try:
        for step in steps:
            chunk = feed(step)
            assert chunk.error is None and step < chunk.end
            yield jax.device_get(draw(chunk.arrays, key, step))
    finally:
        feed.close()


@pytest.mark.parametrize("shuffle", ["epoch", "replacement", "none"])
def test_batches_are_those_of_data_on_the_device(folder, key, monkeypatch, shuffle):
    chunks(monkeypatch, 3)
    options = {"shuffle": shuffle, "flip": True}
    whole = data.batches(data.load(folder, size=5), B, **options)
    stream = data.stream(data.load_lazy(folder, size=5), B, **options)
    assert stream.chunk_steps == 3 and stream.steps_per_epoch == whole.steps_per_epoch
    draw = jax.jit(whole.batch)
    for first in (0, 100):
        steps = range(first, first + 7)
        for step, batch in zip(steps, drawn(stream, key, steps), strict=True):
            expected = jax.device_get(draw(key, step, whole.arrays))
            assert expected.keys() == batch.keys()
            for name, value in expected.items():
                assert np.array_equal(value, batch[name]), (step, name)
                assert value.dtype == batch[name].dtype


def test_chunks_end_with_training_and_stay_small(folder, key, monkeypatch):
    lazy = data.load_lazy(folder, size=5)
    stream = data.stream(lazy, B)
    assert stream.chunk_steps == _stream.CHUNK_STEPS
    assert data.stream(lazy, 2**14).chunk_steps == data.stream(lazy, 2**15).chunk_steps == 1
    big = data.from_source([np.zeros((512, 512, 3), np.uint8)] * 3)
    assert data.stream(big, B).chunk_steps == 2**26 // (512 * 512 * 3) // B
    chunks(monkeypatch, 3)
    read = []
    counted = data.from_source(Recorded(lazy.load(), read))
    read.clear()
    feed = data.stream(counted, B).feed(sharding.data_mesh(1), key, 4, 9)
    assert [feed(step).end for step in (4, 5, 6, 7, 8)] == [7, 7, 7, 9, 9]
    feed.close()
    assert len(read) == 5 * B


class Recorded:
    """A source that remembers what it was asked for."""

    def __init__(self, dataset, read):
        self.dataset, self.read = dataset, read

    def __len__(self):
        return self.dataset.num_examples

    def __getitem__(self, i):
        self.read.append(i)
        return {"image": self.dataset.images[i], "label": int(self.dataset.labels[i])}


class OneOfTwo:
    """The sharding as one of two processes sees it."""

    def __init__(self, split, process):
        self.split, self.process = split, process

    def addressable_devices_indices_map(self, shape):
        found = self.split.devices_indices_map(shape)
        return dict(itertools.islice(found.items(), 4 * self.process, 4 * self.process + 4))


def test_processes_take_disjoint_parts():
    split = NamedSharding(sharding.data_mesh(8), PartitionSpec(None, sharding.AXIS))
    parts = [_stream.own_places(OneOfTwo(split, process), 16) for process in (0, 1)]
    assert [part.tolist() for part in parts] == [list(range(8)), list(range(8, 16))]
    assert _stream.own_places(split, 16).tolist() == list(range(16))


@pytest.mark.parametrize("flaw", ["cut", "flipped", "gone", "empty", "text", "another size"])
def test_stops_right_before_the_step_that_needs_a_bad_file(copy, key, monkeypatch, flaw):
    chunks(monkeypatch, 4)
    options = {} if flaw == "another size" else {"size": 5}
    if flaw == "another size":
        for file in copy.rglob("*.png"):
            Image.new("RGB", (5, 5)).save(file)
    stream = data.stream(data.load_lazy(copy, **options), B)
    row = int(data.batches(data.load(copy, **options), B).batch(key, 2)["row"][3])
    name = stream.dataset.source.name(row)
    damage(copy / name, flaw)
    feed = stream.feed(sharding.data_mesh(1), key, 0, 20)
    chunk = feed(0)
    feed.close()
    assert chunk.end == 2
    assert isinstance(chunk.error, data.DataError)
    assert name in str(chunk.error) and f"example {row}" in str(chunk.error)


def damage(file, flaw):
    content = file.read_bytes()
    if flaw == "gone":
        file.unlink()
    elif flaw == "another size":
        Image.new("RGB", (6, 5)).save(file)
    elif flaw == "flipped":
        at = content.index(b"IDAT") + 8
        file.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    else:
        new = {"cut": content[: len(content) // 2], "empty": b"", "text": b"not a picture"}
        file.write_bytes(new[flaw])


def test_bad_files_are_replaced_by_the_next_good_one(copy, key, monkeypatch):
    chunks(monkeypatch, 3)
    whole = data.batches(data.load(copy, size=5), B)
    lazy = data.load_lazy(copy, size=5)
    bad = [4, 11, 12, 29]
    after = {4: 5, 11: 13, 12: 13, 29: 0}
    for row in bad:
        damage(copy / lazy.source.name(row), "cut")
    stream = data.stream(lazy, B, on_error="skip", max_unreadable=4)
    for first in (0, 5):  # whoever begins later replaces alike
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            steps = range(first, 12)
            for step, batch in zip(steps, drawn(stream, key, steps), strict=True):
                rows = np.asarray(whole.batch(key, step)["row"])
                expected = np.array([after.get(row, row) for row in rows.tolist()])
                assert np.array_equal(batch["row"], expected)
                images = np.asarray(whole.arrays["images"])[expected]
                assert np.array_equal(data.to_uint8(batch["x"]), images)
                assert np.array_equal(batch["label"], whole.arrays["labels"][expected])
        lines = [str(w.message) for w in told]
        names = [lazy.source.name(row) for row in bad]
        assert [sum(name in line for line in lines) for name in names] == [1] * 4


def test_too_many_bad_files_end_it(copy, key):
    lazy = data.load_lazy(copy, size=5)
    for row in (4, 11, 12):
        damage(copy / lazy.source.name(row), "cut")
    feed = data.stream(lazy, B, on_error="skip", max_unreadable=2).feed(
        sharding.data_mesh(1), key, 0, 100
    )
    with pytest.warns(UserWarning, match="left out"):
        chunk = feed(0)
    feed.close()
    assert chunk.end < 4 and "3 examples cannot be read" in str(chunk.error)
    assert "max-unreadable" in str(chunk.error)


def test_nothing_readable_is_an_error(copy):
    for file in copy.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(data.DataError, match="damaged picture"):
        data.load_lazy(copy, size=5)
    with pytest.raises(data.DataError, match="no examples"):
        data.from_source([])


def test_anything_with_numbers_is_a_source(folder):
    whole = data.load(folder, size=5)
    pairs = [(whole.images[i], whole.labels[i]) for i in range(N)]
    same(data.from_source(pairs, class_names=whole.class_names, name=whole.name), whole)
    plain = data.from_source([np.full(3, i) for i in range(4)])
    assert plain.example(2)[0].tolist() == [2, 2, 2] and plain.num_classes == 0
    broken = data.from_source(Broken(whole.images), where="mine")
    with pytest.raises(data.DataError, match=r"mine: example 1 cannot be read \(KeyError"):
        broken.example(1)
    with pytest.raises(data.DataError, match="label of example 0 out of range"):
        data.from_source([(np.zeros(2), 7)], class_names=["a", "b"]).example(0)
    with pytest.raises(data.DataError, match="no example in it"):
        data.from_source([{"y": 3}])


class Broken(list):
    def __getitem__(self, i):
        if i == 1:
            raise KeyError(i)
        return super().__getitem__(i)


def test_data_too_large_to_load_can_be_read_lazily(folder):
    with pytest.raises(data.DataError, match="too large when decoded"):
        data.load(folder, size=64, max_bytes=100_000)
    lazy = data.load_lazy(folder, size=64)
    assert lazy.num_bytes == N * 64 * 64 * 3
    with pytest.raises(data.DataError, match="too large when decoded"):
        lazy.load(100_000)
    assert len(lazy.sample(4).images) == 4


# ---- records ------------------------------------------------------------------------------------


def field(number, content):
    """A field of a protocol buffer: bytes, or a whole number."""
    if isinstance(content, int):
        return bytes([number << 3]) + varint(content)
    assert isinstance(content, bytes)
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def tf_example(packed=True, **features):
    """The bytes of a ``tf.train.Example``."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            feature = field(3, field(1, varint(value) if packed else value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def test_examples_of_tensorflow_are_understood():
    # By Google's protobuf 7.36: image=[b"abc"], label=[300], w=[1.0, 2.0].
    content = (
        b"\n6\n\x10\n\x05image\x12\x07\n\x05\n\x03abc\n\x0f\n\x05label\x12\x06\x1a\x04\n\x02\xac\x02"
        b"\n\x11\n\x01w\x12\x0c\x12\n\n\x08\x00\x00\x80?\x00\x00\x00@"
    )
    assert _records._parse(content) == (b"abc", 300)
    assert tf_example(image=b"abc", label=300)[2:] == content[2:37]
    assert _records._varint(b"\xff" * 9 + b"\x01", 0) == (-1, 10)
    for packed_form in (True, False):
        found = _records._parse(tf_example(packed_form, image=b"abc", label=300, other=b"x"))
        assert found == (b"abc", 300)
    assert _records._parse(b"\x89PNG\r\n\x1a\n") == (b"\x89PNG\r\n\x1a\n", None)
    assert _records._parse(tf_example(text=b"abc")).label is None
    whole = tf_example(image=b"abc", label=3)
    for end in range(len(whole)):
        _records._parse(whole[:end])


@pytest.mark.parametrize("labelled", [True, False])
def test_array_records_are_read_like_a_folder(folder, tmp_path, labelled):
    module = pytest.importorskip("array_record.python.array_record_module")
    lazy, whole = data.load_lazy(folder, size=5), data.load(folder, size=5)
    files = [folder / lazy.source.name(row) for row in range(N)]
    for part in (0, 1):
        name = tmp_path / f"pets-train.array_record-0000{part}-of-00002"
        writer = module.ArrayRecordWriter(str(name), "group_size:1")
        for row in range(15 * part, 15 * part + 15):
            content = files[row].read_bytes()
            label = int(whole.labels[row])
            writer.write(tf_example(image=content, label=label) if labelled else content)
        writer.close()
    found = data.load_lazy(tmp_path, size=5)
    assert np.array_equal(found.load().images, whole.images)
    assert np.array_equal(found.labels, whole.labels) if labelled else found.labels is None
    assert np.array_equal(data.load(tmp_path, size=5).images, whole.images)
    with pytest.raises(data.DataError, match="no such split"):
        data.load_lazy(tmp_path, size=5, split="test")
    (tmp_path / "bad.array_record").write_bytes(b"garbage")
    with pytest.raises(data.DataError, match="damaged or unreadable"):
        data.load_lazy(tmp_path / "bad.array_record")


def test_a_pipeline_of_grain_is_a_source(folder, key):
    grain = pytest.importorskip("grain")
    lazy, whole = data.load_lazy(folder, size=5), data.load(folder, size=5)
    pipeline = grain.MapDataset.source(lazy.source).map(lambda e: {"image": 255 - e["x"]})
    negative = data.from_source(pipeline, whole.labels, class_names=whole.class_names)
    assert np.array_equal(negative.load().images, 255 - whole.images)


def test_chunks_do_not_hide_in_a_program(folder, key):
    stream = data.stream(data.load_lazy(folder, size=5), B)
    shapes = stream.shapes(B)
    jaxpr = jax.make_jaxpr(lambda a, k: stream.examples(a, k, 3, jnp.arange(B)))(
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), key
    )
    assert all(np.size(const) < 100 for const in jaxpr.consts)
