r"""Which pixels an edit is for: boolean arrays of an example's shape, True inside.

LOCO edits change a region and leave the rest alone. With the mask :math:`\Omega` and the denoiser's
mean :math:`f(x_t)`, the Jacobian is split by its *rows*, ``J_in`` for the pixels of
:math:`f` inside and ``J_out`` for those outside. The mask belongs to the denoised image; directions
in the space of :math:`x_t` are never masked themselves.

Everything here runs on the host and returns numpy arrays, so that code can look at a mask while
jax traces. A region may be drawn as a box, taken from a segmentation, or read from a file. An empty
mask is always an error: there would be nothing to edit. A full one is allowed where it was asked
for by numbers (``J_out`` is then empty, with nothing to project away); in a file it is taken for a
mistake.

References:
    Chen et al. 2024, arXiv 2409.02374, section 4 (LOCO edit); masks there come from CelebAMask-HQ
    labels or from SAM.
"""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Bool
from lowdim_diffusion.data._arrays import _read_npy
from lowdim_diffusion.data._dataset import DataError, data_error
from lowdim_diffusion.data._files import byte_limit
from lowdim_diffusion.data._images import _FORMATS, _MAX_PIXELS, _pillow

Mask: TypeAlias = Bool[np.ndarray, "..."]


def _sides(where: str, data_shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of an example ``[h, w, c]``."""
    if len(data_shape) != 3:
        fix = "masks of other data are boolean arrays of the example's shape"
        raise fail(where, "not the shape of a picture", "(h, w, c)", tuple(data_shape), fix)
    return int(data_shape[0]), int(data_shape[1])


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]} (rows x columns)"


def check_mask(
    where: str, mask: ArrayLike, data_shape: Sequence[int]
) -> Bool[np.ndarray, "..."] | Bool[Array, "..."]:
    """Return ``mask`` as a boolean array of the example's shape; the entrance of every edit.

    A full mask passes: callers who need an outside ask ``mask.all()``, which is known while jax
    traces unless the mask itself is an argument of the traced function.

    Args:
        where: who asks, for the error's first words.
        mask: ``[*data]``; for pictures ``[h, w, c]`` also ``[h, w]`` or ``[h, w, 1]``, the same in
            all channels. Booleans, or numbers that are 0 outside and 1 inside.
        data_shape: shape of one example.

    Returns:
        ``[*data]``: a new numpy array, or a jax array if ``mask`` is traced. Traced masks are not
        checked for being empty, and every nonzero number in them is inside.

    Raises:
        ValueError: if the shape does not fit, a number is neither 0 nor 1, or no pixel is inside.
        TypeError: if ``mask`` holds no numbers.

    Examples:
        >>> check_mask("here", [[0, 1], [0, 0]], (2, 2, 3)).sum()
        np.int64(3)
    """
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    wanted = tuple(int(length) for length in data_shape)
    shapes = [wanted, wanted[:2], (*wanted[:2], 1)] if len(wanted) == 3 else [wanted]
    if mask.shape not in shapes:
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        fix = "give one boolean per pixel; masks.from_file resizes with resize=True"
        raise fail(where, "wrong shape of the mask", expected, mask.shape, fix)
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.number)):
        raise TypeError(f"{where}: mask must hold booleans, or 0 and 1, got {mask.dtype}.")
    if not is_concrete(mask):
        mask = jnp.asarray(mask) != 0
        mask = mask[..., None] if mask.ndim < len(wanted) else mask
        return jnp.broadcast_to(mask, wanted)
    mask = np.asarray(mask)
    inside = mask == 1
    if not np.all(inside | (mask == 0)):
        odd = mask[~(inside | (mask == 0))].ravel()[0]
        fix = "compare first, e.g. mask > 0, or use masks.from_segmentation for labels"
        raise fail(where, "mask holds other numbers", "booleans, or 0 and 1", odd, fix)
    if not inside.any():
        raise fail(where, "mask has no pixel inside", "at least one", 0)
    inside = inside[..., None] if inside.ndim < len(wanted) else inside
    return np.array(np.broadcast_to(inside, wanted))


def box(data_shape: Sequence[int], top: int, left: int, height: int, width: int) -> Mask:
    """Return the mask of a rectangle, given in pixels, in all channels.

    Args:
        data_shape: ``(h, w, c)``.
        top: first row inside, 0 at the upper edge.
        left: first column inside, 0 at the left edge.
        height: rows inside.
        width: columns inside.

    Returns:
        ``[h, w, c]`` booleans.

    Raises:
        ValueError: if the box is empty or reaches outside the picture.
        TypeError: if a number is not whole; there are no fractions of a picture here.

    Examples:
        >>> box((2, 4, 1), 0, 1, 1, 2)[..., 0].astype(int).tolist()
        [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    rows, columns = _sides("box", data_shape)
    check_int("box", "top", top, low=0)
    check_int("box", "left", left, low=0)
    check_int("box", "height", height, fix="an empty box edits nothing")
    check_int("box", "width", width, fix="an empty box edits nothing")
    for name, end, limit in (("rows", top + height, rows), ("columns", left + width, columns)):
        if end > limit:
            raise fail("box", f"{name} outside the picture", f"at most {limit}", f"up to {end}")
    mask = np.zeros(tuple(data_shape), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def from_segmentation(labels: ArrayLike, wanted: ArrayLike, data_shape: Sequence[int]) -> Mask:
    """Return the mask of the pixels that carry a label, or one of several.

    Args:
        labels: ``[h, w]`` or ``[h, w, 1]`` integers, one per pixel.
        wanted: the label or labels inside.
        data_shape: ``(h, w, c)``.

    Returns:
        ``[h, w, c]`` booleans, equal in all channels.

    Raises:
        ValueError: if the sizes differ, no label is wanted, or one that is wanted does not occur
            (the message lists those that do).
        TypeError: if labels are not integers.

    Examples:
        >>> from_segmentation([[0, 0, 7], [5, 5, 7]], [5, 7], (2, 3, 1))[..., 0].sum(1).tolist()
        [1, 3]
    """
    where = "from_segmentation"
    size = _sides(where, data_shape)
    labels, wanted = np.asarray(labels), np.atleast_1d(np.asarray(wanted))
    labels = labels[..., 0] if labels.ndim == 3 and labels.shape[2] == 1 else labels
    if labels.shape != size:
        got = _size(labels.shape) if labels.ndim == 2 else labels.shape
        raise fail(where, "size of the segmentation", _size(size), got)
    if wanted.size == 0:
        raise fail(where, "no label wanted", "at least one", 0)
    for name, values in (("labels", labels), ("wanted", wanted)):
        if values.dtype.kind not in "bui":
            raise TypeError(f"{where}: {name} must be integers, got {values.dtype}.")
    present = np.unique(labels)
    unknown = np.setdiff1d(wanted, present)
    if unknown.size:
        listed = ", ".join(map(str, present[:30])) + (", ..." if present.size > 30 else "")
        raise fail(where, "label does not occur", f"one of {listed}", unknown[0])
    return np.asarray(check_mask(where, np.isin(labels, wanted), data_shape))


def from_file(
    path: str | os.PathLike[str], data_shape: Sequence[int], *, resize: bool = False
) -> Mask:
    """Return the mask in a picture file or a ``.npy`` file.

    In a **picture** (PNG and the other formats of :mod:`lowdim_diffusion.data`) a pixel is inside
    if its brightest colour, laid on black where it is transparent, is above half of full scale.
    So white or any bright colour is inside, black is outside, and transparent pixels are outside
    whatever their colour. Pictures with the values 0 and 1 only are taken as they are.

    In a **.npy** file booleans and integers are inside where they are not 0, floats in [0, 1] where
    they are above 1/2. It holds ``[h, w]``, ``[h, w, 1]`` or, to choose channels, ``[h, w, c]``.

    Files are read as in :mod:`lowdim_diffusion.data`: no pickle, sizes checked before memory is
    taken. Pictures need Pillow: ``pip install 'lowdim-diffusion[data]'``.

    Args:
        path: the file.
        data_shape: ``(h, w, c)``.
        resize: bring another size to this one by nearest neighbour, stretching if the proportions
            differ. Without it another size is an error.

    Returns:
        ``[h, w, c]`` booleans.

    Raises:
        lowdim_diffusion.data.DataError: (a ``ValueError``) if the file cannot be read, has another
            size, or has all pixels inside or none.

    Examples:
        >>> import pathlib, tempfile
        >>> from lowdim_diffusion.reporting import png
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "mask.png")
        ...     _ = path.write_bytes(png(np.array([[0, 255], [0, 0]], np.uint8)))
        ...     from_file(path, (2, 2, 1))[..., 0].tolist()
        [[False, True], [False, False]]
    """
    size = _sides("from_file", data_shape)
    path = Path(path)
    if not path.is_file():
        raise data_error(path, "no such file", "a picture or a .npy file with the mask")
    if path.suffix.lower() == ".npy":
        inside, hint = _from_npy(path), "nonzero is inside"
    else:
        inside = _from_picture(path)
        hint = "bright is inside, black or transparent outside; for labels use from_segmentation"
    channels = (1, int(data_shape[2]))
    if inside.ndim not in (2, 3) or (inside.ndim == 3 and inside.shape[2] not in channels):
        expected = " or ".join(f"[h, w, {c}]" for c in dict.fromkeys(channels))
        raise data_error(path, "wrong shape of the mask", f"[h, w], {expected}", inside.shape)
    if inside.shape[:2] != size:
        if not resize or 0 in inside.shape:
            fix = "pass resize=True for nearest neighbour" if not resize else ""
            got = _size(inside.shape)
            raise data_error(path, "another size than the picture", _size(size), got, fix)
        row, column = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(size, inside.shape[:2], strict=True)
        )
        inside = inside[row][:, column]
    if not inside.any():
        raise data_error(path, "mask has no pixel inside", "at least one", 0, hint)
    if inside.all():
        raise data_error(path, "mask has every pixel inside", "a part of them", "all", hint)
    return np.asarray(check_mask("from_file", inside, data_shape))


def _from_npy(path: Path) -> np.ndarray:
    size = path.stat().st_size
    with open(path, "rb") as file:
        values = _read_npy(path, file, size, byte_limit(size, None))
    if values.dtype.kind != "f":
        return values != 0
    if not np.all((values >= 0) & (values <= 1)):
        got = f"{values.min()} to {values.max()}"
        raise data_error(path, "floats of a mask", "in [0, 1]", got, "save booleans")
    return values > 0.5


def _from_picture(path: Path) -> np.ndarray:
    """Pixels ``[h, w]`` above half of full scale, transparent ones laid on black."""
    image_module = _pillow(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image = image_module.open(path, formats=_FORMATS)
        with image:
            if image.width * image.height > _MAX_PIXELS:
                got = image.width * image.height
                raise data_error(path, "picture too large", f"at most {_MAX_PIXELS} pixels", got)
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image).astype(np.float64)
                full = 65535 if image.mode != "F" else 1
            else:
                pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
                values, full = pixels[..., :3].max(-1) * pixels[..., 3] / 255, 255
    except DataError:
        raise
    # Pillow's decoders raise whatever they stumble over; every such picture is damaged.
    except Exception as error:
        reason = re.sub(r"\s*<_io[^>]*>", "", f"{type(error).__name__}: {error}")
        raise data_error(path, f"damaged picture ({reason})", fix="save it again") from error
    return values > (0.5 if values.max(initial=0) <= 1 else full / 2)
