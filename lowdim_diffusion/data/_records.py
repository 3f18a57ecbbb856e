"""Pictures in ArrayRecord files, the format of grain and tfds, bare or in ``tf.train.Example``.

Only the few fields of ``tf.train.Example`` that hold a picture and its label are read, by a parser
of the wire format of protocol buffers.

References:
    https://protobuf.dev/programming-guides/encoding (wire format);
    tensorflow/core/example/feature.proto (Features = map<string, Feature>; Feature = bytes_list 1,
    float_list 2, int64_list 3, each with its values in field 1).
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lowdim_diffusion.data._dataset import data_error
from lowdim_diffusion.data._images import decode
from lowdim_diffusion.data._lazy import LazyDataset, from_source
from lowdim_diffusion.sharding import num_cores

_IMAGES, _LABELS = ("image", "image/encoded"), ("label", "image/class/label")


def is_array_record(name: str) -> bool:
    """Whether a file's name is that of ArrayRecord: ``x.array_record``, ``x.array_record-0-of-2``.

    Examples:
        >>> is_array_record("mnist-train.array_record-00000-of-00001"), is_array_record("a.png")
        (True, False)
    """
    return re.search(r"\.array_?record(-\d+-of-\d+)?$", name) is not None


def choose_records(where: Path, paths: list[Path], split: str | None) -> list[Path]:
    """Return the files of a split, by the part of their names before ``.array_record``.

    The split is its last word, as tfds writes it (``mnist-train.array_record-00000-of-00001``).
    Files without one are taken for ``train``.
    """
    wanted = split or "train"
    of = {path: re.split(r"[-_.]", path.name.split(".array")[0])[-1] for path in paths}
    known = {"train", "test", "validation", "val", "dev", wanted} & set(of.values())
    if not known and wanted == "train":
        return paths
    if wanted not in known:
        raise data_error(where, "no such split", " or ".join(sorted(known)), repr(wanted))
    return [path for path in paths if of[path] == wanted]


def array_records(
    where: Path,
    paths: list[Path],
    *,
    name: str,
    size: tuple[int, int] | None,
    channels: int | None,
) -> LazyDataset:
    """Return the pictures in these files, one after the other."""
    try:
        from array_record.python.array_record_data_source import (  # pyright: ignore
            ArrayRecordDataSource,
        )
    except ModuleNotFoundError as error:
        hint = 'pip install "lowdim-diffusion[grain]"'
        raise data_error(where, "reading .array_record files needs grain", fix=hint) from error
    records = _Records(where, ArrayRecordDataSource([str(path) for path in paths]), size, channels)
    try:
        count = len(records)
        labelled = count > 0 and records.label(0) is not None
        with ThreadPoolExecutor(num_cores()) as pool:
            labels = list(pool.map(records.label, range(count))) if labelled else None
    # Its readers raise RuntimeError and, in Python, whatever they stumble over.
    except Exception as error:
        what = f"damaged or unreadable ({type(error).__name__}: {error})"
        raise data_error(where, what, fix="fetch it again") from error
    if labels is not None and None in labels:
        what = f"record {labels.index(None)} has no label and the first one does"
        raise data_error(where, what)
    return from_source(records, labels, name=name, where=str(where))


class _Records:
    """Records, each read and decoded when it is asked for."""

    def __init__(
        self, where: Path, records: Any, size: tuple[int, int] | None, channels: int | None
    ) -> None:
        self._where, self._records = where, records
        self._size, self._channels = size, channels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        content = _parse(self._records[index]).image
        return {"x": decode(self._name(index), content, self._size, self._channels)}

    def label(self, index: int) -> int | None:
        """Return the label of a record, without decoding its picture."""
        return _parse(self._records[index]).label

    def _name(self, index: int) -> str:
        return f"{self._where}: record {index}"


class _Record(NamedTuple):
    image: bytes
    label: int | None


def _parse(content: bytes) -> _Record:
    """Return picture and label; what is no ``tf.train.Example`` with a picture is a picture."""
    image, label = None, None
    try:
        for features in _values(memoryview(content), 1):
            for entry in _values(features, 1):
                key = bytes(next(_values(entry, 1))).decode()
                if key in _IMAGES:
                    image = bytes(next(_values(next(_values(next(_values(entry, 2)), 1)), 1)))
                elif key in _LABELS:
                    value = next(_values(next(_values(next(_values(entry, 2)), 3)), 1))
                    label = value if isinstance(value, int) else _varint(value, 0)[0]
    except (ValueError, StopIteration, IndexError, TypeError):
        image = None
    return _Record(content, None) if image is None else _Record(image, label)


def _values(message: Any, number: int) -> Iterator[Any]:
    """Yield the values of a field of a message: bytes of a length-delimited one, or a varint."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError("not a message")
        if at > len(message):
            raise ValueError("a field goes beyond the message")
        if tag >> 3 == number:
            yield value


def _varint(message: Any, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value - (1 << 64) if value >> 63 else value, at
    raise ValueError("not a varint")
