"""Arrays on disk, ``.npy``, ``.npz`` and MATLAB's ``.mat``: no objects, headers before memory.

References:
    Cai, He & Han (2007) distribute many clustering sets as ``.mat`` files with rows ``fea``, each a
    picture in column-major order, and labels ``gnd``.
"""

import contextlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowdim_diffusion.data._dataset import (
    MAX_CLASSES,
    DataError,
    Dataset,
    data_error,
    from_arrays,
)
from lowdim_diffusion.data._files import Zip, byte_limit, check_bytes

_EXAMPLES = ("x", "images", "data", "fea", "features")
_LABELS = ("y", "labels", "label", "gnd", "targets")
_PICKLED = "save plain numbers (np.savez with numeric arrays)"


def load_npy(path: Path, *, name: str, max_bytes: int | None = None) -> Dataset:
    """Return the examples in one ``.npy`` file; it has no labels."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        array = _read_npy(path, file, size, byte_limit(size, max_bytes))
    return from_arrays(array, name=name, source=str(path))


def load_npz(path: Path, *, split: str | None, name: str, max_bytes: int | None = None) -> Dataset:
    """Return examples and labels of an ``.npz`` file, by the names of its arrays."""
    choose = lambda keys: [key for key in _choose_keys(path, keys, split) if key is not None]
    x, labels = [*read_npz(path, choose, max_bytes).values(), None][:2]
    return from_arrays(x, labels, name=name, source=str(path))


def read_npz(
    path: Path, choose: Callable[[list[str]], list[str]], max_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Return those arrays of an ``.npz`` file that ``choose`` picks from their names."""
    arrays = {}
    with contextlib.closing(Zip(path, max_bytes)) as archive:
        members = {m.name.removesuffix(".npy"): m for m in archive.members}
        keys = choose(list(members))
        check_bytes(path, sum(members[key].size for key in keys), archive.limit)
        for key in keys:
            with archive.open(members[key]) as file:
                where = f"{path}: {key}"
                arrays[key] = _read_npy(where, file, members[key].size, archive.limit)
                if file.read(1):
                    raise data_error(where, "more bytes than its header says")
    return arrays


def load_mat(path: Path, *, split: str | None, name: str, max_bytes: int | None = None) -> Dataset:
    """Return examples and labels of a MATLAB version 5 file.

    Rows of ``fea`` whose length is a square, with values whole in 0..255 or real in [0, 1], are
    pictures stored column by column; those in [0, 1] become float32 in [-1, 1]. Four axes ``[h, w,
    c, N]``, samples last, become ``[N, h, w, c]``. Labels that count from 1 will count from 0.
    """
    try:
        import scipy.io
    except ModuleNotFoundError as error:
        hint = 'pip install "lowdim-diffusion[data]"'
        raise data_error(path, "reading .mat files needs scipy", fix=hint) from error
    limit = byte_limit(path.stat().st_size, max_bytes)
    _check_mat(path, limit)
    try:
        keys = [key for key, _, kind in scipy.io.whosmat(path) if kind not in ("cell", "struct")]
        x_key, y_key = _choose_keys(path, keys, split)
        table = scipy.io.loadmat(path, variable_names=[k for k in (x_key, y_key) if k])
        x, labels = table[x_key], table[y_key] if y_key else None
    except DataError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise data_error(path, f"damaged .mat file ({type(error).__name__}: {error})") from error
    if not isinstance(x, np.ndarray):
        raise data_error(path, f"unfit {x_key!r}", "a full array", type(x).__name__)
    if x_key == "fea" and x.ndim == 2:
        x = _column_major_pictures(x)
    elif x.ndim == 4 and x.shape[2] in (1, 3) and x.shape[3] not in (1, 3):
        x = x.transpose(3, 0, 1, 2)
    names = None
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "uif" and labels.size:
        if 1 <= labels.min() and labels.max() < MAX_CLASSES:
            names = [str(i + 1) for i in range(int(labels.max()))]
            labels = labels.astype(np.float64) - 1
    return from_arrays(x, labels, name=name, source=str(path), class_names=names)


def map_npy(path: Path) -> np.ndarray:
    """Return the array in a ``.npy`` file without reading it: it is mapped into memory."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        shape, fortran, dtype = _npy_header(path, file, size, size)
        start = file.tell()
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", start, shape, order) if math.prod(shape) else np.empty(shape)


def _read_npy(where: Any, file: Any, size: int, limit: int) -> np.ndarray:
    """Return the array in an open ``.npy`` stream of ``size`` bytes, its header checked first."""
    shape, fortran, dtype = _npy_header(where, file, size, limit)
    count = math.prod(shape) * dtype.itemsize
    array, done = np.empty(count, np.uint8), 0
    while done < count:
        block = file.read(min(count - done, 2**20))
        if not block:
            raise data_error(where, "truncated", f"{count} bytes", done, "fetch it again")
        array[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return array.view(dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(
    where: Any, file: Any, size: int, limit: int
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether columns come first, and dtype: of plain numbers, ``size`` bytes."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise data_error(where, "unfit .npy version", "1.0 or 2.0", version)
        shape, fortran, dtype = read(file)
    except DataError:
        raise
    except ValueError as error:
        raise data_error(where, f"damaged .npy header ({error})") from error
    if dtype.hasobject:
        raise data_error(where, "holds pickled objects", "plain numbers", dtype, _PICKLED)
    if dtype.names or dtype.kind not in "buif":
        raise data_error(where, "unfit dtype", "real numbers", dtype)
    count = math.prod(shape) * dtype.itemsize
    check_bytes(where, count, limit, f"its header claims shape {list(shape)}: is it damaged?")
    if file.tell() + count != size:
        got = size - file.tell()
        raise data_error(
            where, "truncated or damaged", f"{count} bytes for shape {list(shape)}", got
        )
    return shape, fortran, dtype


def _choose_keys(path: Path, keys: list[str], split: str | None) -> tuple[str, str | None]:
    """Return the names of examples and labels: ``x``/``y`` and their kin, or those of a split."""
    wanted = split or "train"
    lower = {key.lower(): key for key in keys}

    def find(kinds: tuple[str, ...]) -> tuple[str | None, str | None]:
        named = [form for k in kinds for form in (f"{wanted}_{k}", f"{k}_{wanted}")]
        plain = next((lower[k] for k in kinds if k in lower), None)
        return next((lower[k] for k in named if k in lower), None), plain

    x_split, x_plain = find(_EXAMPLES)
    y_split, y_plain = find(_LABELS)
    if x_split is not None:
        return x_split, y_split
    if x_plain is not None and wanted == "train":
        return x_plain, y_plain
    if not keys:
        raise data_error(path, "no arrays in it", "x or images or data")
    listed = ", ".join(keys[:20])
    if x_plain is None and wanted == "train":
        raise data_error(
            path, "no examples", "an array named x, images or data", listed, "rename it"
        )
    raise data_error(path, f"no split {wanted!r}", f"an array named x_{wanted}", listed)


def _column_major_pictures(rows: np.ndarray) -> np.ndarray:
    side = math.isqrt(rows.shape[1])
    if side < 2 or side * side != rows.shape[1]:
        return rows
    low, high = rows.min(), rows.max()
    whole = rows.dtype.kind in "ui" or (high > 1 and bool(np.all(rows == np.trunc(rows))))
    if whole and low >= 0 and high <= 255:
        rows = rows.astype(np.uint8)
    elif not whole and low >= 0 and high <= 1:
        rows = (2 * rows - 1).astype(np.float32)
    else:
        return rows
    return rows.reshape(-1, side, side).transpose(0, 2, 1)


def _check_mat(path: Path, limit: int) -> None:
    """Raise if the packed variables of a version 5 file unfold beyond the limit or are cut."""
    total = 0
    with open(path, "rb") as file:
        header = file.read(128)
        order = "little" if header[126:128] == b"IM" else "big"
        while tag := file.read(8):
            kind, count = int.from_bytes(tag[:4], order), int.from_bytes(tag[4:], order)
            if kind >> 16:  # a small element holds its data inside the tag
                continue
            total += 0 if kind == 15 else count
            unpack = zlib.decompressobj()
            while count > 0:
                block = file.read(min(count, 2**16))
                if not block:
                    raise data_error(path, "truncated", f"{count} more bytes", 0, "fetch it again")
                count -= len(block)
                while kind == 15 and block:
                    total += len(unpack.decompress(block, 2**20))
                    block = unpack.unconsumed_tail
                    check_bytes(path, total, limit)
    check_bytes(path, total, limit)
