"""Data sets that are not read until an example is asked for, whatever is behind them."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lowdim_diffusion.data._arrays import _EXAMPLES, _LABELS, map_npy
from lowdim_diffusion.data._dataset import (
    DataError,
    Dataset,
    _as_examples,
    _as_labels,
    data_error,
    from_arrays,
    split_rows,
)
from lowdim_diffusion.data._files import READ_ERRORS, Folder, Source, check_bytes
from lowdim_diffusion.data._images import Listed, convert_pictures, decode
from lowdim_diffusion.sharding import num_cores

SAMPLE = 64
"""How many examples stand for a data set in :func:`fingerprint`."""

FIRST = 16
"""A data set of which so many examples at the start cannot be read is given up."""


@runtime_checkable
class RandomAccess(Protocol):
    """Anything that gives its examples by number: grain's data sources and ``MapDataset``, torch's.

    An example is a mapping with ``x`` or ``image`` and, if there are any, ``label`` (or another
    name that :func:`lowdim_diffusion.data.load` knows), or a pair ``(x, label)``. It is asked for
    from several threads at once.
    """

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return one of them."""
        ...


@dataclass(frozen=True, eq=False)
class LazyDataset:
    """Examples that are read and decoded when they are asked for.

    It draws the same batches as the :class:`Dataset` that :meth:`load` returns, bit for bit.

    Attributes:
        source: where they are.
        data_shape: shape of one example: ``(h, w, c)`` or ``(n,)``.
        dtype: uint8 pictures, or float32.
        labels: ``[N]`` int32, where they are known without reading the examples.
        labelled: whether an example comes with a label.
        name: short name for reports.
        where: file or folder, for messages.
        class_names: one name per class, or None.
        index: which examples of the source these are; None for all.
        held: all of it, if it is in memory already.
    """

    source: RandomAccess
    data_shape: tuple[int, ...]
    dtype: np.dtype
    labels: np.ndarray | None = None
    labelled: bool = False
    name: str = "data"
    where: str = ""
    class_names: tuple[str, ...] | None = None
    index: np.ndarray | None = None
    held: Dataset | None = None

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.source) if self.index is None else len(self.index)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels, and where they are neither known nor named."""
        if self.class_names:
            return len(self.class_names)
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def is_image(self) -> bool:
        """Whether the examples are pictures ``[h, w, c]``."""
        return len(self.data_shape) == 3

    @property
    def num_bytes(self) -> int:
        """Size in memory of all examples together."""
        return self.num_examples * int(np.prod(self.data_shape)) * self.dtype.itemsize

    def describe(self) -> str:
        """Return one line: name, count, shape, dtype, classes."""
        kind = "images" if self.is_image else "vectors"
        shape = "x".join(map(str, self.data_shape))
        classes = f", {self.num_classes} classes" if self.labelled else ", no labels"
        return (
            f"{self.name}: {self.num_examples} {kind} {shape}, {self.dtype}{classes}, read lazily"
        )

    def example(self, row: int) -> tuple[np.ndarray, int]:
        """Return an example and its label, 0 where there is none.

        Raises:
            DataError: if it cannot be read, or is not like the others; it names file and number.
        """
        at = int(row if self.index is None else self.index[row])
        try:
            x, label = _example(self.where, self.source[at])
        except DataError as error:
            raise DataError(f"{str(error).removesuffix('.')} (example {row}).") from error
        # A source of the user's may raise anything.
        except Exception as error:
            what = f"example {row} cannot be read ({type(error).__name__}: {error})"
            raise data_error(self.where, what) from error
        if x.shape != self.data_shape or x.dtype != self.dtype:
            expected = f"{self.dtype} {list(self.data_shape)}"
            got = f"{x.dtype} {list(x.shape)}"
            hint = "resize with size= (--data.size), convert with channels=1 or 3"
            raise data_error(self._name(at), f"example {row} differs", expected, got, hint)
        if self.labels is not None:
            label = int(self.labels[row])
        if self.class_names and not 0 <= label < len(self.class_names):
            expected = f"0 to {len(self.class_names) - 1}"
            raise data_error(self.where, f"label of example {row} out of range", expected, label)
        return x, label

    def _name(self, at: int) -> str:
        name: Any = getattr(self.source, "name", None)
        return f"{self.where}: {name(at)}" if callable(name) else self.where

    def take(self, index: Any) -> "LazyDataset":
        """Return the data set of the examples at ``index`` (integers or a mask), in that order."""
        own = np.arange(self.num_examples) if self.index is None else self.index
        labels = None if self.labels is None else self.labels[np.asarray(index)]
        return replace(self, index=own[np.asarray(index)], labels=labels, held=None)

    def split(self, num_first: int, *, seed: int = 0) -> tuple["LazyDataset", "LazyDataset"]:
        """Return two disjoint random parts, the same as :meth:`Dataset.split`."""
        first, rest = split_rows(self.name, self.num_examples, num_first, seed)
        return self.take(first), self.take(rest)

    def load(self, max_bytes: int | None = None) -> Dataset:
        """Return all of it in memory; what cannot be read is an error."""
        if self.held is not None:
            return self.held
        if max_bytes is not None:
            fix = "pass num_examples=, a smaller size=, or max_bytes="
            check_bytes(self.where, self.num_bytes, max_bytes, fix)
        return self._loaded(np.arange(self.num_examples), skip=False)

    def sample(self, count: int) -> Dataset:
        """Return so many examples in memory, evenly spread; those that cannot be read are left out.

        Raises:
            DataError: if none of them can be read.
        """
        return self._loaded(spread(self.num_examples, count), skip=True)

    def _loaded(self, rows: np.ndarray, skip: bool) -> Dataset:
        found = read_all(self, rows)
        bad = [example for example in found if isinstance(example, DataError)]
        good = [example for example in found if not isinstance(example, DataError)]
        if bad and not (skip and good):
            raise bad[0]
        x = np.stack([x for x, _ in good])
        labels = [label for _, label in good] if self.labelled else None
        return from_arrays(
            x, labels, name=self.name, source=self.where, class_names=self.class_names
        )


def from_source(
    source: RandomAccess,
    labels: Any = None,
    *,
    name: str = "data",
    where: str = "",
    class_names: Sequence[str] | None = None,
) -> LazyDataset:
    """Return the lazy data set of a source of examples, such as a grain or torch data set.

    Args:
        source: see :class:`RandomAccess`.
        labels: ``[N]`` whole numbers >= 0, where they are known beforehand; otherwise each example
            brings its own.
        name: short name for reports.
        where: where it comes from, for messages.
        class_names: one name per class; needed for conditional networks unless ``labels`` are
            given.

    Raises:
        DataError: if it is empty, or none of the first 16 examples can be read.

    Examples:
        >>> import numpy as np
        >>> pictures = [{"image": np.full((4, 4), i), "label": i % 2} for i in range(6)]
        >>> from_source(pictures, class_names=["even", "odd"]).describe()
        'data: 6 images 4x4x1, uint8, 2 classes, read lazily'
    """
    where = where or name
    count = len(source)
    if count == 0:
        raise data_error(where, "no examples", "at least one", 0)
    names = tuple(class_names) if class_names else None
    if labels is not None:
        labels, names = _as_labels(where, np.asarray(labels), count, names)
    first: Exception | None = None
    for row in range(min(count, FIRST)):
        try:
            item = source[row]
            x, _ = _example(where, item)
        except (DataError, *READ_ERRORS) as error:
            first = first or error
            continue
        labelled = labels is not None or _label_of(item) is not None
        return LazyDataset(source, x.shape, x.dtype, labels, labelled, name, where, names)
    assert first is not None
    if isinstance(first, DataError):
        raise first
    raise data_error(where, f"the first examples cannot be read ({first})") from first


def spread(count: int, at_most: int) -> np.ndarray:
    """Return up to so many of the numbers below ``count``, evenly spread from 0 on.

    Examples:
        >>> spread(10, 4), spread(3, 4)
        (array([0, 2, 5, 7]), array([0, 1, 2]))
    """
    size = min(count, at_most)
    return np.arange(size, dtype=np.int64) * count // size


def fingerprint(dataset: Dataset | LazyDataset) -> dict[str, str]:
    """Return the digests of up to 64 examples, evenly spread, by their number.

    Each is the start of the sha256 of the number of examples, the example's shape, dtype and
    decoded values, and its label. Equal data have it equal, however they are stored and read. What
    cannot be read is left out.
    """
    rows = spread(dataset.num_examples, SAMPLE)
    found: Any
    if isinstance(dataset, Dataset):
        labels = dataset.labels
        found = [(dataset.images[i], 0 if labels is None else int(labels[i])) for i in rows]
    else:
        found = read_all(dataset, rows)
    digests = {}
    for row, example in zip(rows.tolist(), found, strict=True):
        if not isinstance(example, DataError):
            x, label = example
            about = f"{dataset.num_examples} {x.dtype.str} {x.shape} {label} ".encode()
            digests[str(row)] = hashlib.sha256(about + x.tobytes()).hexdigest()[:16]
    return digests


def read_all(
    dataset: LazyDataset, rows: Sequence[int] | np.ndarray
) -> list[tuple[np.ndarray, int] | DataError]:
    """Return these examples, or what is wrong with each."""

    def read(row: int) -> tuple[np.ndarray, int] | DataError:
        try:
            return dataset.example(row)
        except DataError as error:
            return error

    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(read, map(int, rows)))


class Pictures:
    """Pictures in a folder, zip or tar, each decoded when it is asked for."""

    def __init__(
        self, source: Source, listed: Listed, size: tuple[int, int] | None, channels: int | None
    ) -> None:
        self._source, self._members = source, listed.members
        self._size, self._channels = size, channels
        # An archive is one file, with one place at which it is read.
        self._alone = None if isinstance(source, Folder) else threading.Lock()

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": decode(self.name(index, True), self._read(index), self._size, self._channels)}

    def name(self, index: int, full: bool = False) -> str:
        """Return the name of a picture's file."""
        name = self._members[index].name
        return f"{self._source.path}: {name}" if full else name

    def _read(self, index: int) -> bytes:
        member = self._members[index]
        try:
            if self._alone is None:
                return self._source.read(member)
            with self._alone:
                return self._source.read(member)
        except DataError:
            raise
        except READ_ERRORS as error:
            raise data_error(self.name(index, True), f"cannot be read ({error})") from error


class Rows:
    """The rows of an array, in memory or mapped from a file."""

    def __init__(self, array: np.ndarray, prepare: Callable[[Any], Any] = lambda x: x) -> None:
        self._array, self._prepare = array, prepare

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self._prepare(np.array(self._array[index]))}


def lazy_npy(
    path: Path, *, name: str, size: tuple[int, int] | None, channels: int | None
) -> LazyDataset:
    """Return the rows of a ``.npy`` file, mapped into memory."""

    def prepare(x: np.ndarray) -> np.ndarray:
        pictures = _as_examples(path, x[None])
        if size is None and channels is None:
            return pictures[0]
        if pictures.dtype != np.uint8:
            got = f"{pictures.dtype} {list(pictures.shape[1:])}"
            raise data_error(path, "size and channels are for 8-bit pictures", got=got)
        return convert_pictures(path, pictures, size, channels)[0]

    array = map_npy(path)
    if array.ndim not in (2, 3, 4):
        got = list(array.shape)
        raise data_error(
            path, "unfit shape of the examples", "[N, n], [N, h, w] or [N, h, w, c]", got
        )
    return from_source(Rows(array, prepare), name=name, where=str(path))


def lazy_arrays(dataset: Dataset) -> LazyDataset:
    """Return a data set in memory as a lazy one."""
    return LazyDataset(
        Rows(dataset.images),
        dataset.data_shape,
        dataset.images.dtype,
        dataset.labels,
        dataset.labels is not None,
        dataset.name,
        dataset.source or dataset.name,
        dataset.class_names,
        held=dataset,
    )


def _example(where: str, item: Any) -> tuple[np.ndarray, int]:
    """Return what a source gave as an example and its label, 0 if it has none."""
    if isinstance(item, Mapping):
        names = ("image", *_EXAMPLES)
        x = next((item[name] for name in names if name in item), None)
        if x is None:
            raise data_error(where, "no example in it", " or ".join(names[:3]), ", ".join(item))
    else:
        x = item[0] if isinstance(item, tuple | list) else item
    label = _label_of(item)
    return _as_examples(where, np.asarray(x)[None])[0], 0 if label is None else int(label)


def _label_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next((item[name] for name in _LABELS if name in item), None)
    return item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
