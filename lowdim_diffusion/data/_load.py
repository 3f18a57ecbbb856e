"""Finding out what a path holds, and reading it."""

import contextlib
import difflib
import gzip
import operator
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowdim_diffusion._checks import check_int
from lowdim_diffusion.data._arrays import load_mat, load_npy, load_npz
from lowdim_diffusion.data._cifar import batch_from_pickle, cifar_version, is_batch_name, load_cifar
from lowdim_diffusion.data._dataset import DataError, Dataset, data_error, from_arrays
from lowdim_diffusion.data._files import (
    READ_ERRORS,
    Source,
    byte_limit,
    check_bytes,
    open_source,
)
from lowdim_diffusion.data._idx import find_idx, is_idx, load_idx, split_of
from lowdim_diffusion.data._images import (
    Select,
    convert_pictures,
    is_image_name,
    list_images,
    load_images,
)
from lowdim_diffusion.data._lazy import (
    LazyDataset,
    Pictures,
    from_source,
    lazy_arrays,
    lazy_npy,
)
from lowdim_diffusion.data._records import array_records, choose_records, is_array_record
from lowdim_diffusion.data._synthetic import digits, molrg

BUILT_IN: dict[str, Callable[..., Dataset]] = {"digits": digits, "molrg": molrg}
"""Data sets that need no file."""

_ARCHIVES = ("npz", "npy", "mat", "zip", "tar", "gz", "tgz")
_KNOWN = "a folder, zip or tar of pictures, IDX, CIFAR, .npz, .npy, .mat (v5) or .array_record"


def load(
    path_or_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    classes: Sequence[int | str] | None = None,
    num_examples: int | None = None,
    seed: int | None = None,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    max_bytes: int | None = None,
    **options: Any,
) -> Dataset:
    """Return the data set at a path, or one of the built-in ``"digits"`` and ``"molrg"``.

    What a path holds is told from its content, not its name:

    - MNIST family: a folder with ``train-images-idx3-ubyte[.gz]`` and its kin, or one such file;
    - CIFAR-10 and -100, python or binary version: the archive, its folder, or one batch;
    - pictures (png, jpg, pgm, bmp, gif, tif, webp) in a folder, zip or tar[.gz], class folders
      giving labels;
    - ``.array_record`` files of pictures, see :func:`load_lazy`;
    - ``.npz`` with arrays x or images or data, and y or labels; ``.npy``; ``.mat`` with ``fea`` and
      ``gnd``;
    - a folder with exactly one file of these kinds.

    Nothing in a file is executed or unpacked to disk, and sizes are checked before memory is taken.

    Args:
        path_or_name: file, folder or built-in name.
        split: ``"train"`` (default where there are splits), ``"test"``, or a folder such as
            ``"val"``.
        classes: keep only these, as numbers or names; labels keep their numbers.
        num_examples: keep so many, after ``classes``: the first ones, or a random choice if
            ``seed`` is given.
        seed: see ``num_examples``.
        size: side, or (height, width): pictures are cut to the middle and resized (bicubic).
        channels: 1 for grey, 3 for colour; by default what the files are.
        max_bytes: limit for the decoded data; by default 512 MiB or 20 times the size on disk.
        **options: for ``"molrg"``, see :func:`molrg`.

    Raises:
        DataError: in one line, what is wrong with the file and what would help.

    Examples:
        >>> from lowdim_diffusion import data
        >>> data.load("digits", classes=[0, 1], num_examples=100, seed=0).num_examples
        100
    """
    found, where = _read(
        path_or_name, False, split, classes, num_examples, seed, size, channels, max_bytes, options
    )
    assert isinstance(found, Dataset)
    shape = _check_size(size)
    return found if shape is None and channels is None else _reshaped(where, found, shape, channels)


def load_lazy(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    classes: Sequence[int | str] | None = None,
    num_examples: int | None = None,
    seed: int | None = None,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    **options: Any,
) -> LazyDataset:
    """Return the data set that :func:`load` returns, read only as far as it is asked for.

    Pictures in a folder, a zip or a plain tar are listed and stay where they are; a ``.npy`` file
    is mapped into memory; of ``.array_record`` files (grain's and tfds's, extra ``grain``) records
    are read one by one, see below. All else, a gzipped tar too, is read into the host's memory.

    A record is one file of a picture, without a label, or a ``tf.train.Example`` with a picture in
    ``image`` or ``image/encoded`` and perhaps a number in ``label`` or ``image/class/label``;
    labels are looked through once at the start.

    Args:
        path: file, folder or built-in name.
        split: see :func:`load`, like all that follow.
        classes: keep only these.
        num_examples: keep so many.
        seed: chooses them.
        size: side, or (height, width).
        channels: 1 or 3.
        **options: for ``"molrg"``.

    Raises:
        DataError: as :func:`load`; a damaged picture is an error only once it is asked for.
    """
    found, where = _read(
        path, True, split, classes, num_examples, seed, size, channels, None, options
    )
    if isinstance(found, LazyDataset):
        return found
    shape = _check_size(size)
    if shape is not None or channels is not None:
        found = _reshaped(where, found, shape, channels)
    return lazy_arrays(found)


def _read(
    path_or_name: str | os.PathLike[str],
    lazy: bool,
    split: str | None,
    classes: Sequence[int | str] | None,
    num_examples: int | None,
    seed: int | None,
    size: Any,
    channels: int | None,
    max_bytes: int | None,
    options: dict[str, Any],
) -> tuple[Dataset | LazyDataset, Any]:
    """Return what is asked for, and where it is; lazy only if that is possible."""
    text = os.fspath(path_or_name)
    if num_examples is not None:
        check_int("load", "num_examples", num_examples)
    shape = _check_size(size)
    if channels not in (None, 1, 3):
        raise data_error(text, "unfit channels", "1 or 3", channels)

    def select(labels: Any, names: Any, count: int) -> np.ndarray | None:
        return _select(text, labels, names, count, classes, num_examples, seed)

    if text in BUILT_IN:
        dataset, selected = _built_in(text, split, options), False
        where: Any = text
    else:
        if options:
            raise data_error(text, "unknown options", "none for a file", ", ".join(options))
        where = _existing(text)
        try:
            reader = _Reader(where, lazy, split, select, shape, channels, max_bytes)
            dataset, selected = reader.read()
        except DataError:
            raise
        except READ_ERRORS as error:
            raise _unreadable(where, error) from error
    if not selected:
        rows = select(dataset.labels, dataset.class_names, dataset.num_examples)
        dataset = dataset if rows is None else dataset.take(rows)
    return dataset, where


class _Reader:
    """One path and what was asked of it; :meth:`read` tells its kind and reads it."""

    def __init__(
        self,
        path: Path,
        lazy: bool,
        split: str | None,
        select: Select,
        size: tuple[int, int] | None,
        channels: int | None,
        max_bytes: int | None,
    ) -> None:
        self.path, self.lazy, self.split, self.select = path, lazy, split, select
        self.size, self.channels, self.max_bytes = size, channels, max_bytes
        self.name = (
            re.sub(r"(\.tar)?\.\w+$", "", path.name) if path.is_file() else path.resolve().name
        )

    def read(self) -> tuple[Dataset | LazyDataset, bool]:
        """Return the data set, and whether ``select`` has been applied already."""
        return self._folder() if self.path.is_dir() else self._file()

    def _folder(self) -> tuple[Dataset | LazyDataset, bool]:
        sets = find_idx(self.path)
        if sets:
            wanted = self.split or "train"
            if wanted not in sets:
                got = repr(wanted)
                raise data_error(self.path, "no such split", " or ".join(sets), got)
            return load_idx(sets[wanted], name=self.name, max_bytes=self.max_bytes), False
        source = open_source(self.path, self.max_bytes)
        if records := [m.handle for m in source.members if is_array_record(m.name)]:
            return self._records(sorted(records)), False
        if cifar_version(source) is None and not any(is_image_name(m.name) for m in source.members):
            files = [m for m in source.members if m.name.lower().rpartition(".")[2] in _ARCHIVES]
            if len(files) == 1:
                self.path = files[0].handle
                return self._file()
            if files:
                got = ", ".join(m.name for m in files[:6])
                raise data_error(self.path, "several data files", "one", got, "give one of them")
        return self._members(source)

    def _file(self) -> tuple[Dataset | LazyDataset, bool]:
        path, limit = self.path, self.max_bytes
        if is_array_record(path.name):
            return self._records([path]), False
        if path.stat().st_size == 0:
            raise data_error(path, "empty file", _KNOWN)
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as file:
                head = file.read(512)
        if head.startswith(b"\x93NUMPY"):
            self._no_split()
            if self.lazy:
                options: Any = {"name": self.name, "size": self.size, "channels": self.channels}
                return lazy_npy(path, **options), False
            return load_npy(path, name=self.name, max_bytes=limit), False
        if head.startswith(b"MATLAB 5.0"):
            return load_mat(path, split=self.split, name=self.name, max_bytes=limit), False
        if head.startswith(b"PK"):
            return self._zip()
        if is_idx(head):
            self._no_split(split_of(path))
            return load_idx(path, name=path.parent.resolve().name, max_bytes=limit), False
        if tarfile_header(head):
            return self._members(open_source(path, limit))
        if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or is_batch_name(path.name):
            return self._pickle(), False
        size = path.stat().st_size
        if path.suffix == ".bin" and size % 3073 * (size % 3074) == 0:
            return self._members(_Single(path, limit))
        raise data_error(path, "unknown kind of file", _KNOWN, _looks_like(head), _advice(head))

    def _records(self, paths: list[Path]) -> Dataset | LazyDataset:
        chosen = choose_records(self.path, paths, self.split)
        options: Any = {"name": self.name, "size": self.size, "channels": self.channels}
        found = array_records(self.path, chosen, **options)
        if self.lazy:
            return found
        return found.load(byte_limit(sum(p.stat().st_size for p in chosen), self.max_bytes))

    def _members(self, source: Source) -> tuple[Dataset | LazyDataset, bool]:
        at_random = not getattr(source, "packed", False)
        if self.lazy and at_random and cifar_version(source) is None:
            listed = list_images(source, split=self.split, select=self.select)
            pictures = Pictures(source, listed, self.size, self.channels)
            options: Any = {"name": self.name, "where": str(source.path)}
            options["class_names"] = listed.class_names
            return from_source(pictures, listed.labels, **options), True
        with contextlib.closing(source):
            if cifar_version(source) is not None:
                return load_cifar(source, split=self.split, name=self.name), False
            dataset = load_images(
                source,
                split=self.split,
                select=self.select,
                size=self.size,
                channels=self.channels,
                name=self.name,
            )
            return dataset, True

    def _zip(self) -> tuple[Dataset | LazyDataset, bool]:
        with zipfile.ZipFile(self.path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        if names and all(name.endswith(".npy") for name in names):
            split, limit = self.split, self.max_bytes
            return load_npz(self.path, split=split, name=self.name, max_bytes=limit), False
        if any(name.endswith("data.pkl") for name in names):
            fix = "convert it to .npz with a program you trust"
            raise data_error(self.path, "a PyTorch file, which is a program", _KNOWN, fix=fix)
        return self._members(open_source(self.path, self.max_bytes))

    def _pickle(self) -> Dataset:
        size = self.path.stat().st_size
        check_bytes(self.path, size, byte_limit(size, self.max_bytes))
        rows, labels = batch_from_pickle(self.path, self.path.read_bytes())
        self._no_split("test" if self.path.name.startswith("test") else "train")
        pictures = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return from_arrays(pictures, labels, name=self.name, source=str(self.path))

    def _no_split(self, own: str | None = None) -> None:
        if self.split not in (None, own or "train"):
            got = repr(self.split)
            raise data_error(self.path, "no such split", own or "none in this file", got)


class _Single:
    """One file as a source."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        whole = open_source(path.parent, max_bytes)
        self.path, self.limit = path, whole.limit
        self.members = [m for m in whole.members if m.handle == path]
        self.read, self.close = whole.read, whole.close


def tarfile_header(head: bytes) -> bool:
    """Whether 512 bytes are a tar header with a right checksum."""
    with contextlib.suppress(tarfile.TarError):
        return bool(tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape"))
    return False


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if os.path.lexists(path) and not path.exists():
        raise data_error(text, "a link that leads nowhere")
    if path.exists():
        raise data_error(text, "neither a file nor a folder", _KNOWN)
    near = difflib.get_close_matches(text, BUILT_IN, 1)
    hint = f"did you mean {near[0]!r}?" if near else "built in are " + " and ".join(BUILT_IN)
    raise data_error(text, "no such file or folder", fix=hint)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, EOFError):
        return data_error(path, "truncated: it ends too early", fix="fetch it again")
    if isinstance(error, PermissionError):
        return data_error(path, "no permission to read it")
    if isinstance(error, MemoryError):
        return data_error(path, "does not fit into memory", fix="pass num_examples=")
    return data_error(path, f"damaged or unreadable ({error})", fix="fetch it again")


def _looks_like(head: bytes) -> str:
    kinds = {
        b"\x89PNG": "one PNG picture",
        b"\xff\xd8\xff": "one JPEG picture",
        b"P5": "one PGM picture",
        b"P6": "one PPM picture",
        b"BM": "one BMP picture",
        b"\x89HDF": "HDF5 (MATLAB v7.3?)",
        b"PAR1": "Parquet",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"%PDF": "PDF",
        b"<": "a web page (a failed download?)",
    }
    for start, kind in kinds.items():
        if head.lstrip().startswith(start):
            return kind
    return "text" if head.isascii() and b"\0" not in head else f"bytes {head[:8].hex(' ')}"


def _advice(head: bytes) -> str:
    kind = _looks_like(head)
    if kind.endswith("picture"):
        return "give the folder that holds the pictures"
    if kind.startswith("HDF5"):
        return "in MATLAB save with -v7"
    return "unpack it and pack it as .tar.gz or .zip" if kind in ("bzip2", "xz") else ""


def _built_in(name: str, split: str | None, options: dict[str, Any]) -> Dataset:
    if split not in (None, "train"):
        fix = "divide it with Dataset.split"
        raise data_error(name, "no such split", "train, all there is", repr(split), fix)
    try:
        return BUILT_IN[name](**options)
    except TypeError as error:
        raise data_error(name, f"unfit options ({error})") from error


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = size if isinstance(size, tuple | list) else (size, size)
        height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError) as error:
        raise data_error("load", "unfit size", "a side or (height, width)", repr(size)) from error
    if not (1 <= height <= 8192 and 1 <= width <= 8192):
        raise data_error("load", "unfit size", "1 to 8192 pixels", f"{height} x {width}")
    return height, width


def _select(
    where: Any,
    labels: np.ndarray | None,
    names: tuple[str, ...] | None,
    count: int,
    classes: Sequence[int | str] | None,
    num_examples: int | None,
    seed: int | None,
) -> np.ndarray | None:
    """Return the indices that are asked for, ascending, or None for all of them."""
    rows = np.arange(count)
    if classes is not None:
        if labels is None:
            raise data_error(where, "classes asked for", "labels", "none")
        rows = rows[np.isin(labels, [_class_number(where, c, labels, names) for c in classes])]
        if rows.size == 0:
            raise data_error(where, "no examples of these classes", got=list(classes))
    if num_examples is not None:
        if num_examples > len(rows):
            raise data_error(where, "too few examples", num_examples, len(rows))
        if seed is None:
            rows = rows[:num_examples]
        else:
            rows = np.sort(np.random.default_rng(seed).choice(rows, num_examples, replace=False))
    return None if len(rows) == count else rows


def _class_number(
    where: Any, wanted: int | str, labels: np.ndarray, names: tuple[str, ...] | None
) -> int:
    if isinstance(wanted, str):
        if names is not None and wanted in names:
            return names.index(wanted)
        shown = ", ".join(names[:12]) if names else "numbers (the classes have no names)"
        raise data_error(where, "unknown class", shown, repr(wanted))
    limit = len(names) if names else int(labels.max()) + 1
    if not 0 <= wanted < limit:
        raise data_error(where, "unknown class", f"0 to {limit - 1}", wanted)
    return int(wanted)


def _reshaped(
    where: Any, dataset: Dataset, size: tuple[int, int] | None, channels: int | None
) -> Dataset:
    if dataset.images.dtype != np.uint8:
        got = f"{dataset.images.dtype} {list(dataset.data_shape)}"
        raise data_error(where, "size and channels are for 8-bit pictures", "uint8 [h, w, c]", got)
    images = convert_pictures(where, dataset.images, size, channels)
    if images is dataset.images:
        return dataset
    return Dataset(images, dataset.labels, dataset.name, dataset.source, dataset.class_names)
