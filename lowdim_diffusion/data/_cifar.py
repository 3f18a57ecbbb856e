"""CIFAR-10 and CIFAR-100, python and binary versions, from a folder or an archive.

The python version consists of pickles, and a pickle is a program. These are read by an unpickler
that knows the few names a pickled array needs and nothing else; each name stands for an inert
object of our own, so neither numpy's nor anybody else's code runs on what the file says.

References:
    Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from lowdim_diffusion.data._dataset import DataError, Dataset, data_error, from_arrays
from lowdim_diffusion.data._files import READ_ERRORS, Member, Source, check_bytes, natural_key

_PIXELS = 3 * 32 * 32
_PYTHON = {"train": re.compile(r"data_batch_\d+|train"), "test": re.compile(r"test_batch|test")}
_BINARY = {
    "train": re.compile(r"data_batch_\d+\.bin|train\.bin"),
    "test": re.compile(r"test_batch\.bin|test\.bin"),
}


def cifar_version(source: Source) -> str | None:
    """Return ``"python"`` or ``"binary"`` if the member names are CIFAR's, else None."""
    for version, patterns in (("python", _PYTHON), ("binary", _BINARY)):
        if _batches(source, patterns["train"]) or _batches(source, patterns["test"]):
            return version
    return None


def load_cifar(source: Source, *, split: str | None, name: str) -> Dataset:
    """Return one split of CIFAR-10 or CIFAR-100 (fine labels)."""
    version = cifar_version(source)
    patterns = _PYTHON if version == "python" else _BINARY
    wanted = split or "train"
    members = _batches(source, patterns[wanted]) if wanted in patterns else []
    if not members:
        found = [s for s, pattern in patterns.items() if _batches(source, pattern)]
        raise data_error(source.path, "no such split", " or ".join(found), repr(wanted))
    check_bytes(source.path, sum(member.size for member in members), source.limit)
    names = _class_names(source, version)
    read = _read_python if version == "python" else _read_binary
    parts = {member.name: read(source, member) for member in _in_file_order(source, members)}
    rows = np.concatenate([parts[member.name][0] for member in members])
    labels = np.concatenate([parts[member.name][1] for member in members])
    pictures = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return from_arrays(pictures, labels, name=name, source=str(source.path), class_names=names)


def is_batch_name(name: str) -> bool:
    """Whether a file's name is that of a pickled CIFAR-10 batch."""
    return re.fullmatch(r"data_batch_\d+|test_batch", name) is not None


def _batches(source: Source, pattern: re.Pattern[str]) -> list[Member]:
    """Return the batch files in natural order; CIFAR-100's bare names need ``meta`` beside."""
    folders = {m.name.rpartition("/")[0] for m in source.members if m.name.endswith("meta")}
    found = []
    for member in source.members:
        folder, _, base = member.name.rpartition("/")
        bare = base in ("train", "test")
        if pattern.fullmatch(base) and (not bare or folder in folders):
            found.append(member)
    return sorted(found, key=lambda m: natural_key(m.name))


def _in_file_order(source: Source, members: list[Member]) -> list[Member]:
    names = {member.name for member in members}
    return [member for member in source.members if member.name in names]


def _class_names(source: Source, version: str | None) -> list[str] | None:
    for member in source.members:
        base = member.name.rpartition("/")[2]
        if version == "python" and base in ("meta", "batches.meta"):
            where = f"{source.path}: {member.name}"
            table = read_pickle(where, source.read(member))
            names = table.get("fine_label_names", table.get("label_names"))
            if isinstance(names, list):
                return [
                    n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names
                ]
        if version == "binary" and base in ("batches.meta.txt", "fine_label_names.txt"):
            return source.read(member).decode(errors="replace").split()
    return None


def _read_python(source: Source, member: Member) -> tuple[np.ndarray, np.ndarray]:
    where = f"{source.path}: {member.name}"
    return batch_from_pickle(where, source.read(member))


def batch_from_pickle(where: Any, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(rows [k, 3072] uint8, labels [k])`` of one pickled batch."""
    table = read_pickle(where, content)
    rows, labels = table.get("data"), table.get("fine_labels", table.get("labels"))
    if isinstance(rows, _Array):
        rows = rows.to_numpy(where)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (_PIXELS,):
        got = (
            f"{rows.dtype} {list(rows.shape)}"
            if isinstance(rows, np.ndarray)
            else type(rows).__name__
        )
        raise data_error(where, "unfit 'data'", f"uint8 [k, {_PIXELS}]", got)
    if isinstance(labels, _Array):
        labels = labels.to_numpy(where)
    elif not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise data_error(where, "unfit 'labels'", "a list of ints", type(labels).__name__)
    if len(labels) != len(rows):
        raise data_error(where, "labels do not match", f"{len(rows)} of them", len(labels))
    return rows, np.asarray(labels)


def _read_binary(source: Source, member: Member) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and labels of records ``[label, pixels]`` or ``[coarse, fine, pixels]``."""
    where = f"{source.path}: {member.name}"
    content = source.read(member)
    header = 2 if member.name.rpartition("/")[2] in ("train.bin", "test.bin") else 1
    if not content or len(content) % (header + _PIXELS):
        expected = f"a multiple of {header + _PIXELS} bytes"
        raise data_error(where, "wrong file size", expected, len(content), "fetch it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, header + _PIXELS)
    return records[:, header:], records[:, header - 1]


def read_pickle(where: Any, content: bytes) -> dict[str, Any]:
    """Return the dictionary in a pickle of plain values and arrays; refuse anything else."""
    try:
        # The C unpickler reserves memory for sizes that the file merely claims: look before it
        # leaps.
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(
                content
            ):
                raise data_error(where, "damaged pickle", "a small memo index", argument)
        table = _Unpickler(content).load()
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise data_error(where, f"refused: {error}", fix="nothing in it was run") from error
    except (*READ_ERRORS, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise data_error(where, f"damaged pickle ({error})", fix="fetch it again") from error
    if not isinstance(table, dict):
        raise data_error(where, "unfit pickle", "a dictionary", type(table).__name__)
    return {
        k.decode(errors="replace") if isinstance(k, bytes) else str(k): v for k, v in table.items()
    }


class _Dtype:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else str(order)


class _Array:
    """Stands for ``numpy.ndarray``: keeps what the pickle says until :meth:`to_numpy` checks it."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self, where: Any) -> np.ndarray:
        """Return the array; only small-integer types, and bytes must fill the shape exactly."""
        try:
            _, shape, dtype, fortran, raw = self.state
            code = (dtype.order if dtype.order in "<>" else "|") + dtype.code
            kind = {
                "|u1": "u1",
                "|i1": "i1",
                "<i4": "<i4",
                "<i8": "<i8",
                ">i4": ">i4",
                ">i8": ">i8",
            }[code]
            sizes = [int(size) for size in shape]
            values = np.frombuffer(raw, kind)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise data_error(where, f"unfit array in the pickle ({error})") from error
        if min(sizes, default=0) < 0 or math.prod(sizes) != values.size:
            raise data_error(where, "unfit array in the pickle", f"shape {sizes}", values.size)
        return values.reshape(sizes, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays, as inert stand-ins, and no other name."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._budget = 4 * len(content)

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """``_codecs.encode``, as protocols 0 to 2 write bytes; repeats cannot pile up memory."""
        if encoding not in ("latin1", "latin-1", b"latin1") or not isinstance(text, str):
            raise pickle.UnpicklingError("it asks for a text codec other than latin1")
        self._budget -= len(text)
        if self._budget < 0:
            raise pickle.UnpicklingError("it unfolds to many times its size")
        return text.encode("latin1")

    @staticmethod
    def _reconstruct(*_: Any) -> _Array:
        return _Array()

    @staticmethod
    def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name on the short list."""
        known = {
            ("core.multiarray", "_reconstruct"): self._reconstruct,
            ("core.numeric", "_frombuffer"): self._frombuffer,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): self._encode,
        }
        short = re.sub(r"^numpy\._?core\.", "core.", module)
        if (short, name) not in known:
            raise pickle.UnpicklingError(f"the pickle asks to run {module}.{name}")
        return known[short, name]
