"""Pictures as uint8 arrays, grids of them, and PNG files, with numpy alone."""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowdim_diffusion._checks import fail

__all__ = ["as_pictures", "image_grid", "png"]


def as_pictures(x: Any) -> np.ndarray:
    """Return examples as uint8 pictures ``[N, h, w, c]`` with c = 1 (gray) or 3 (RGB).

    Args:
        x: uint8 pictures, or floats in [-1, 1] (values outside are cut), ``[N, h, w, 1 or 3]`` or
            gray ``[N, h, w]``; or vectors ``[N, n]``, drawn as strips of gray, zero in the middle
            and the set's largest magnitude at the ends.

    Raises:
        ValueError: if the shape is none of these.
    """
    x = np.asarray(x)
    if x.ndim == 2:
        values = x.astype(np.float64)
        top = np.max(np.abs(np.where(np.isfinite(values), values, 0)), initial=0)
        x = (values / (top or 1))[:, None, :]
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise fail("as_pictures", "shape", "[N, h, w, 1 or 3], [N, h, w] or [N, n]", x.shape)
    if x.dtype == np.uint8:
        return x
    x = np.nan_to_num(x.astype(np.float64), nan=-1.0)
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def image_grid(
    x: Any, *, columns: int | None = None, side: int = 48, gap: int = 2, background: int = 255
) -> np.ndarray:
    """Return one uint8 picture ``[H, W, c]`` that shows all examples in rows, left to right.

    Small pictures are enlarged by whole factors, so that their pixels stay sharp squares.

    Args:
        x: examples as :func:`as_pictures` takes them.
        columns: pictures per row; None for about a square.
        side: smallest size in pixels that the longer side of each picture is enlarged to.
        gap: pixels between pictures and around the grid.
        background: gray level of the gaps, 0 .. 255.

    Examples:
        >>> image_grid(np.zeros((6, 8, 8, 1)), columns=3, side=8).shape
        (22, 32, 1)
    """
    pictures = as_pictures(x)
    count, height, width, channels = pictures.shape
    if count == 0:
        raise fail("image_grid", "no pictures", "at least one", 0)
    scale = max(1, math.ceil(side / max(height, width)))
    if height == 1:  # a vector: a strip tall enough to be seen
        pictures = pictures.repeat(max(8 // scale, 1), axis=1)
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pictures.shape[1:3]
    across = columns or math.ceil(math.sqrt(count * height / width))
    across = min(count, across)
    rows = math.ceil(count / across)
    blank = np.full((rows * across, height + gap, width + gap, channels), background, np.uint8)
    blank[:count, gap:, gap:] = pictures
    cells = blank.reshape(rows, across, height + gap, width + gap, channels)
    sheet = cells.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
    return np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=background)


def png(picture: np.ndarray) -> bytes:
    r"""Return a uint8 picture ``[h, w]`` or ``[h, w, 1 or 3]`` as the bytes of a PNG file.

    Examples:
        >>> png(np.zeros((2, 2), np.uint8))[:4]
        b'\x89PNG'
    """
    picture = np.asarray(picture)
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[-1] not in (1, 3) or picture.dtype != np.uint8:
        got = f"{picture.dtype} {picture.shape}"
        raise fail("png", "not a picture", "uint8 [h, w, 1 or 3]", got, "use image_grid")
    height, width, channels = picture.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    # Bit depth 8, colour type 0 (gray) or 2 (RGB), no interlace; each row starts with filter 0.
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = np.pad(picture.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    parts: Sequence[tuple[bytes, bytes]] = (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)
