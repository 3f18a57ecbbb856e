"""What a data set is in memory, and the one error that reading it raises."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._types import Array

MAX_CLASSES = 2**20
"""Labels beyond this are taken for arbitrary identifiers and numbered anew."""


class DataError(ValueError):
    """A data file that cannot be used: one line that names it, what was expected and what came."""


def data_error(
    source: Any, what: str, expected: Any = None, got: Any = None, fix: str = ""
) -> DataError:
    """Return (not raise) a ``DataError`` of one printable line; hostile names cannot break it."""
    text = f"{source}: {what}"
    if expected is not None:
        text += f": expected {expected}"
    if got is not None:
        text += f"{',' if expected is not None else ':'} got {got}"
    text += f"; {fix}" if fix else ""
    line = "".join(c if c.isprintable() else " " for c in re.sub(r"\s+", " ", text))
    return DataError((line if len(line) < 600 else line[:597] + "...").rstrip(".") + ".")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory, with where they came from.

    8-bit pictures stay ``uint8`` and are scaled to [-1, 1] (``x / 127.5 - 1``) as they are drawn.
    Float vectors and float pictures are kept as they are.

    Attributes:
        images: uint8 pictures ``[N, h, w, c]``, or float32 vectors ``[N, n]`` or pictures.
        labels: ``[N]`` int32 in ``0 .. num_classes - 1``, or None.
        name: short name for reports.
        source: file or folder it was read from; empty for made data.
        class_names: one name per class, or None.
        truth: the exact distribution that the examples were drawn from, where there is one.
        sha256: digest of examples and labels, not of the file: recompressing keeps it.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    name: str = "data"
    source: str = ""
    class_names: tuple[str, ...] | None = None
    truth: Any = None
    sha256: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        images, labels = _read_only(self.images), self.labels
        where = self.source or self.name
        if images.dtype == np.uint8 and images.ndim == 4:
            fine = True
        else:
            fine = images.dtype == np.float32 and images.ndim in (2, 4)
        if not fine:
            raise data_error(
                where,
                "unfit array of examples",
                "uint8 [N, h, w, c] or float32 [N, n] or [N, h, w, c]",
                f"{images.dtype} {list(images.shape)}",
                "data.from_arrays converts",
            )
        if images.size == 0:
            raise data_error(where, "no examples", "at least one", f"shape {list(images.shape)}")
        if labels is not None:
            labels = _read_only(labels)
            if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
                got = f"{labels.dtype} {list(labels.shape)}"
                raise data_error(where, "labels do not fit", f"int32 [{len(images)}]", got)
            limit = len(self.class_names) if self.class_names else MAX_CLASSES
            if labels.min() < 0 or labels.max() >= limit:
                got = f"{labels.min()} to {labels.max()}"
                raise data_error(where, "label out of range", f"0 to {limit - 1}", got)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "sha256", _digest(images, labels))

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.images)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(h, w, c)`` or ``(n,)``."""
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels. Classes that a filter left out still count."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    @property
    def is_image(self) -> bool:
        """Whether the examples are pictures ``[h, w, c]``."""
        return self.images.ndim == 4

    def describe(self) -> str:
        """Return one line: name, count, shape, dtype, range, classes.

        Examples:
            >>> from lowdim_diffusion import data
            >>> data.load("digits").describe()
            'digits: 1797 images 8x8x1, uint8 0..255 (drawn in [-1, 1]), 10 classes'
        """
        low, high = self.images.min(), self.images.max()
        if self.images.dtype == np.uint8:
            values = f"uint8 {low}..{high} (drawn in [-1, 1])"
        else:
            values = f"float32 {low:.4g}..{high:.4g}"
        kind = "images" if self.is_image else "vectors"
        shape = "x".join(map(str, self.data_shape))
        classes = f", {self.num_classes} classes" if self.labels is not None else ", no labels"
        return f"{self.name}: {self.num_examples} {kind} {shape}, {values}{classes}"

    def floats(self, index: Any = None) -> np.ndarray:
        """Return the examples, or those at ``index``, as float32 in the range they are drawn in."""
        chosen = self.images if index is None else self.images[index]
        return chosen if chosen.dtype == np.float32 else from_uint8(chosen)

    def take(self, index: Any) -> "Dataset":
        """Return the data set of the examples at ``index`` (integers or a mask), in that order."""
        index = np.asarray(index)
        labels = None if self.labels is None else self.labels[index]
        return Dataset(
            self.images[index], labels, self.name, self.source, self.class_names, self.truth
        )

    def split(self, num_first: int, *, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """Return two disjoint random parts, the first of ``num_first`` examples.

        Examples:
            >>> from lowdim_diffusion import data
            >>> train, held_out = data.load("digits").split(1500)
            >>> train.num_examples, held_out.num_examples
            (1500, 297)
        """
        first, rest = split_rows(self.name, self.num_examples, num_first, seed)
        return self.take(first), self.take(rest)


def split_rows(name: str, count: int, num_first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two disjoint random parts of ``range(count)``, each in order."""
    if not 0 < num_first < count:
        raise data_error(name, "no such split", f"1 to {count - 1} examples", num_first)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[:num_first]), np.sort(order[num_first:])


def from_arrays(
    x: Any,
    labels: Any = None,
    *,
    name: str = "data",
    source: str = "",
    class_names: Sequence[str] | None = None,
    truth: Any = None,
) -> Dataset:
    """Return a ``Dataset`` of arrays in memory, checked and converted.

    Args:
        x: whole numbers 0..255, ``[N, h, w]`` or ``[N, h, w, c]`` with ``c <= 4``, become uint8
            pictures. Float pictures keep their values (they should span about [-1, 1]). ``[N, n]``
            become float32 vectors. Nothing may be NaN or infinite.
        labels: ``[N]`` or ``[N, 1]`` whole numbers >= 0. Others (negative, or identifiers of 2^20
            and more) are numbered from 0 in ascending order; their values become the class names.
        name: short name for reports.
        source: where the arrays came from, for messages.
        class_names: one name per class; labels then count from 0.
        truth: exact distribution of ``x``, if known.

    Raises:
        DataError: if the arrays do not fit this description.

    Examples:
        >>> import numpy as np
        >>> from_arrays(np.zeros((4, 12)), [1, -1, -1, 1]).class_names
        ('-1', '1')
    """
    where = source or name
    images = _as_examples(where, np.asarray(x))
    names = tuple(class_names) if class_names else None
    if labels is not None:
        labels, names = _as_labels(where, np.asarray(labels), len(images), names)
    return Dataset(images, labels, name, source, names, truth)


def to_uint8(x: Any) -> np.ndarray:
    """Return pictures in [-1, 1] as uint8 0..255, undoing the scaling; values outside are cut.

    Examples:
        >>> to_uint8([-1.0, 0.0, 1.0, 7.0])
        array([  0, 128, 255, 255], dtype=uint8)
    """
    return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def denormalize(x: Any) -> Array:
    """Return pictures in [-1, 1] as floats in [0, 1]; values outside are cut."""
    return jnp.clip((jnp.asarray(x) + 1) / 2, 0, 1)


def from_uint8(x: Any) -> Any:
    """Return ``x / 127.5 - 1`` in float32 of bytes 0..255, for numpy and for jax arrays.

    Written as one product of an exact integer, so that compilers cannot round it differently.

    Examples:
        >>> from_uint8(np.array([0, 255], np.uint8))
        array([-1.,  1.], dtype=float32)
    """
    xp = jnp if isinstance(x, jax.Array) else np
    return (2 * x.astype(xp.int32) - 255).astype(xp.float32) * xp.float32(1 / 255)


def _read_only(x: np.ndarray) -> np.ndarray:
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def _digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in (images, labels):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _as_examples(where: Any, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "buif":
        raise data_error(where, "unfit dtype of the examples", "real numbers", x.dtype)
    if x.ndim not in (2, 3, 4):
        raise data_error(
            where, "unfit shape of the examples", "[N, n], [N, h, w] or [N, h, w, c]", list(x.shape)
        )
    if x.size == 0:
        raise data_error(where, "no examples", "at least one", f"shape {list(x.shape)}")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[-1] > 4:
        hint = "channels come last: transpose (0, 2, 3, 1)" if x.shape[1] <= 4 else ""
        raise data_error(where, "unfit pictures", "[N, h, w, c] with c <= 4", list(x.shape), hint)
    if x.ndim == 4 and x.dtype.kind == "b":
        x = x * np.uint8(255)
    if x.ndim == 4 and x.dtype.kind in "ui":
        if x.min() < 0 or x.max() > 255:
            raise data_error(where, "pixel out of range", "0 to 255", f"{x.min()} to {x.max()}")
        return x.astype(np.uint8, copy=False)
    with np.errstate(over="ignore"):
        floats = x.astype(np.float32)
    bad = ~np.isfinite(floats).reshape(len(floats), -1).all(axis=1)
    if bad.any():
        first = int(np.argmax(bad))
        got = f"NaN or infinity in {int(bad.sum())} of {len(x)} examples, first in number {first}"
        raise data_error(where, "bad values", "finite float32 numbers", got, "drop or repair them")
    return floats


def _as_labels(
    where: Any, labels: np.ndarray, count: int, names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    if labels.shape not in ((count,), (count, 1), (1, count)):
        raise data_error(
            where, "labels do not match the examples", f"[{count}]", list(labels.shape)
        )
    labels = labels.reshape(-1)
    if labels.dtype.kind not in "buif" or not np.array_equal(labels, np.trunc(labels)):
        raise data_error(where, "unfit labels", "whole numbers", labels.dtype)
    if names is None and (labels.min() < 0 or labels.max() >= MAX_CLASSES):
        values, labels = np.unique(labels, return_inverse=True)
        names = tuple(str(int(value)) for value in values)
    limit = len(names) if names else MAX_CLASSES
    if labels.min() < 0 or labels.max() >= limit:
        got = f"{labels.min()} to {labels.max()}"
        raise data_error(where, "label out of range", f"0 to {limit - 1}", got)
    return labels.astype(np.int32), names
