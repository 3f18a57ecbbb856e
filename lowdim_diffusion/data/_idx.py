"""IDX files, the format of the MNIST family: zero, zero, type, rank; big-endian sizes; values.

References:
    LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
"""

import gzip
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from lowdim_diffusion.data._dataset import Dataset, data_error, from_arrays
from lowdim_diffusion.data._files import byte_limit, check_bytes

_NAME = re.compile(
    r"(?P<prefix>.*?)(?P<split>train|t10k|test)[-_.]images[-_.]idx3[-_.]ubyte(\.gz)?"
)


def is_idx(head: bytes) -> bool:
    """Whether these (unpacked) first bytes open an IDX file."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in range(8, 15) and 1 <= head[3] <= 4


def read_idx(path: Path, *, max_bytes: int | None = None) -> np.ndarray:
    """Return the unsigned bytes stored in an IDX file, gzipped or not."""
    limit = byte_limit(path.stat().st_size, max_bytes)
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        head = file.read(4)
        if not is_idx(head):
            raise data_error(path, "not an IDX file", "0 0 type rank", head.hex(" ") or "nothing")
        if head[2] != 8:
            raise data_error(path, "unfit IDX values", "type 0x08, unsigned bytes", hex(head[2]))
        sizes = file.read(4 * head[3])
        shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
        total = math.prod(shape)
        if len(shape) < head[3] or total == 0:
            raise data_error(path, "empty IDX file", "at least one value", f"sizes {shape}")
        check_bytes(path, total, limit, f"its header claims sizes {shape}: is it damaged?")
        values, done = np.empty(total, np.uint8), 0
        stream: Any = file
        while done < total and (count := stream.readinto(values[done:].data)):
            done += count
        if done < total:
            raise data_error(
                path, "truncated", f"{total} values for sizes {shape}", done, "fetch it again"
            )
        if file.read(1):
            raise data_error(path, "the header does not fit", f"{total} values", "more than that")
    return values.reshape(shape)


def find_idx(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by split, ``"train"`` and ``"test"``."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):  # the unpacked file comes before its .gz and wins
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        split = "train" if match["split"] == "train" else "test"
        first = found.setdefault(split, path)
        if first != path and first.name != path.name.removesuffix(".gz"):
            got = f"{first.name} and {path.name}"
            raise data_error(folder, f"several {split} sets", "one", got, "give the file itself")
    return found


def load_idx(images: Path, *, name: str, max_bytes: int | None = None) -> Dataset:
    """Return the pictures of one IDX file with the labels beside it, if there are any."""
    x = read_idx(images, max_bytes=max_bytes)
    if x.ndim not in (3, 4):
        got = f"sizes {list(x.shape)}"
        fix = "give the images file" if x.ndim == 1 else ""
        raise data_error(images, "not a stack of pictures", "[N, h, w]", got, fix)
    labels: Any = None
    for path in _label_files(images):
        if path.is_file():
            labels = read_idx(path, max_bytes=max_bytes)
            if labels.shape != x.shape[:1]:
                got = f"{list(labels.shape)} labels in {path.name}"
                raise data_error(images, "labels do not match", f"[{len(x)}]", got)
            break
    return from_arrays(x, labels, name=name, source=str(images))


def split_of(images: Path) -> str | None:
    """Return ``"train"`` or ``"test"`` if the file's name says so."""
    match = _NAME.fullmatch(images.name)
    return None if match is None else "train" if match["split"] == "train" else "test"


def _label_files(images: Path) -> list[Path]:
    stem = images.name.removesuffix(".gz")
    stem = re.sub(r"idx3(?=[-_.]ubyte$)", "idx1", re.sub(r"images(?=[-_.]idx3)", "labels", stem))
    if stem == images.name.removesuffix(".gz"):
        return []
    return [images.with_name(stem), images.with_name(f"{stem}.gz")]
