r"""What "looks the same" means: embeddings that are compared by the cosine.

Two examples resemble each other if ``M(x, y) = <e(x), e(y)> / (||e(x)|| ||e(y)||)`` is large. The
papers take for e the copy-detection network SSCD, with threshold 0.6. Two embeddings here need no
weights:

- :func:`image_embedding`, for pictures: the Laplacian of a Gaussian of a sixteenth of the picture.
- :func:`pixel_embedding`, for anything: the correlation of the pixels.

Which cosine means "copy" depends on the images and on their number, so there is no number to quote
for them: :func:`~lowdim_diffusion.generalization.calibrate_threshold` takes it from held-out
images, which are no copies.

Features computed elsewhere (SSCD, DINO, Inception) come in by :func:`load_features`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, ArrayLike, Float
from lowdim_diffusion.data._arrays import read_npz
from lowdim_diffusion.data._files import READ_ERRORS
from lowdim_diffusion.generalization._inputs import check_finite
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.neighbors import _flat

Embedding: TypeAlias = Callable[[Array], Array]
"""``[b, *data] -> [b, *features]``; lengths do not matter, only directions."""

SSCD_THRESHOLD = 0.6
"""Cosine of SSCD features (``sscd_disc_large``) above which the papers call two images copies."""

_WIDTH = 1 / 16  # of the Gaussian, in sides of the picture
_KEEP = 24  # frequencies kept along a side: those beyond weigh less than 0.001 of the largest


def _centered(x: Array, axes: tuple[int, ...]) -> Array:
    """``x`` without its means; exactly 0 where it is constant, which rounding would miss."""
    spread = x.max(axes, keepdims=True) - x.min(axes, keepdims=True)
    return jnp.where(spread == 0, 0, x - x.mean(axes, keepdims=True))


def unit(e: ArrayLike) -> Float[Array, "b n"]:
    """Return each example as a vector of unit length; zeros stay zeros."""
    e = _flat(e)
    norm = safe_sqrt(jnp.sum(e**2, axis=-1, keepdims=True))
    return e / jnp.where(norm == 0, 1, norm)


def pixel_embedding(x: ArrayLike) -> Float[Array, "b n"]:
    """Return each example's pixels as a vector with its own mean removed and unit length.

    The cosine of two of these is the correlation of the pixels: blind to brightness and contrast,
    but not to shifts. A constant example gives zeros, which resemble nothing.

    Args:
        x: ``[b, *data]``.

    Examples:
        >>> pixel_embedding([[1.0, 3.0], [5.0, 5.0]]).round(3).tolist()
        [[-0.707..., 0.707...], [0.0, 0.0]]
    """
    return unit(_centered(_flat(x), (1,)))


def _cosines(size: int, keep: int) -> np.ndarray:
    """First rows of the orthonormal cosine transform (DCT-II)."""
    i, x = np.arange(keep)[:, None], np.arange(size)[None, :] + 0.5
    rows = np.cos(np.pi * i * x / size) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


def image_embedding(x: ArrayLike) -> Float[Array, "b n"]:
    r"""Return the picture seen through the Laplacian of a Gaussian, at unit length.

    .. math:: e_{ij}(x) \propto k_{ij}^2 \exp(-(\pi k_{ij} / 16)^2 / 2) \, (C \bar x C^T)_{ij},

    ``\bar x`` the mean of the channels, C the orthonormal cosine transform, ``k_ij`` the length of
    the frequency ``(i, j)`` in half periods across the picture (across the geometric mean of its
    sides). The Laplacian turns flat areas to 0 and keeps edges, the Gaussian, of a sixteenth of the
    picture, drops what noise, blur and small shifts change. Blind to brightness, contrast and
    colour; a picture and its enlargement embed alike. Linear but for its length, and nothing is
    fitted: a cosine means the same whatever the training set. At most 576 numbers, however large
    the picture.

    Args:
        x: ``[b, h, w, c]``, in any range of values. A constant picture gives zeros.

    Examples:
        >>> import jax.numpy as jnp
        >>> ramp = jnp.arange(64.0).reshape(1, 8, 8, 1)
        >>> e = image_embedding(jnp.concatenate([ramp, 0.1 * ramp + 7]))
        >>> float(e[0] @ e[1]).__round__(4)
        1.0
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        fix = "for vectors use pixel_embedding"
        raise fail("image_embedding", "wrong shape of x", "[b, h, w, c]", x.shape, fix)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean(-1)
    height, width = x.shape[1:]
    rows, cols = (_cosines(size, min(size, _KEEP)) for size in (height, width))
    side = (height * width) ** 0.5
    i = np.arange(len(rows))[:, None] * side / height
    j = np.arange(len(cols))[None, :] * side / width
    k = np.sqrt(i**2 + j**2)
    weight = jnp.asarray(k**2 * np.exp(-((np.pi * k * _WIDTH) ** 2) / 2), x.dtype)
    rows, cols = jnp.asarray(rows, x.dtype), jnp.asarray(cols, x.dtype)
    e = jnp.einsum("ih,bhw,jw->bij", rows, _centered(x, (1, 2)), cols, precision="highest")
    return unit(e * weight[None])


def default_embedding(x: ArrayLike) -> Float[Array, "b n"]:
    """Return :func:`image_embedding` of pictures ``[b, h, w, c]``, else :func:`pixel_embedding`."""
    return image_embedding(x) if jnp.ndim(x) == 4 else pixel_embedding(x)


def no_embedding(x: ArrayLike) -> Float[Array, "b n"]:
    """Return ``x`` itself, ``[b, n]``: for features that were computed elsewhere."""
    return _flat(x)


class Features(NamedTuple):
    """Features of samples and of training examples, from one network."""

    samples: np.ndarray
    """``[b, n]``."""
    train: np.ndarray
    """``[N, n]``."""


def load_features(path: str | os.PathLike[str]) -> Features:
    """Return features that were computed elsewhere, from an ``.npz`` of ``samples`` and ``train``.

    They take the place of the images, and :func:`no_embedding` that of the embedding::

        f = load_features("sscd.npz")
        generalization_score(f.samples, f.train, SSCD_THRESHOLD, embed=no_embedding)

    Only numbers are read: nothing in the file is ever executed.

    Args:
        path: ``.npz`` with ``samples: [b, n]`` and ``train: [N, n]``, finite reals.

    Raises:
        ValueError: if the file is no ``.npz``, or an array is missing, empty, not finite, not of
            numbers or of another width.
    """
    where = "load_features"
    try:
        found = read_npz(Path(path), lambda names: [n for n in Features._fields if n in names])
    except OSError:
        raise
    except READ_ERRORS as error:
        raise fail(where, f"{path} is unreadable", "an .npz of numbers", error) from error
    for name in Features._fields:
        x = found.get(name)
        if x is None:
            raise fail(where, f"{path} lacks {name}", f"arrays {Features._fields}", list(found))
        if x.ndim != 2 or x.size == 0 or x.dtype.kind not in "fiu":
            expected = "real numbers [b, n], none of them 0"
            raise fail(where, f"{path}: unfit {name}", expected, f"{x.dtype} {x.shape}")
        check_finite(where, f"{path}: {name}", x)
    features = Features(**found)
    if features.samples.shape[1] != features.train.shape[1]:
        widths = features.train.shape[1], features.samples.shape[1]
        raise fail(where, f"{path}: width of samples", f"that of train, {widths[0]}", widths[1])
    return features
