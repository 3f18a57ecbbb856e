"""What happens to images on their way, and what people do to them: attacks on watermarks.

Each is ``(key, x, strength) -> x`` for ``x: [b, h, w, c]`` in [-1, 1], pure jax, the key only for
what is random; values are cut to [-1, 1] where the formula needs the ends of the range.

=============  ==================================  ========================  =============
attack         strength                            none at                   published
=============  ==================================  ========================  =============
``noise``      standard deviation                  0                         .2 (see below)
``blur``       standard deviation in pixels        0                         8 x 8 window
``jpeg``       quality, 1 .. 100                   (100 still rounds)        25
``crop``       share of each side that is kept     1                         -
``resize``     size in between, share of the own   1                         .5
``brightness`` factor up to ``1 + strength``       0                         6
``colour``     the same, a factor per channel      0                         -
``drop``       share of each side that is erased   0                         .4
``median``     window in pixels, odd               1                         7
=============  ==================================  ========================  =============

Published strengths are for pictures of 512 pixels with values in [0, 1]: their noise of .1 is .2
here, and their windows are large on small pictures.

References:
    Li et al. 2024, arXiv 2410.21088, section 5 (the list); ITU-T T.81 (JPEG), annex K.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, Float, PRNGKey, Scalar

__all__ = [
    "blur",
    "brightness",
    "colour",
    "crop",
    "drop",
    "jpeg",
    "median",
    "noise",
    "resize",
]


def noise(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: Scalar = 0.1
) -> Float[Array, "b h w c"]:
    """Return images with white noise of standard deviation ``strength``, not cut."""
    check_range("noise", "strength", strength, 0)
    return x + strength * jax.random.normal(key, x.shape, x.dtype)


def blur(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: float = 1.0
) -> Float[Array, "b h w c"]:
    """Return images under a Gaussian of this standard deviation in pixels; edges are repeated."""
    del key
    check_range("blur", "strength", strength, 0)
    if strength == 0:
        return x
    half = int(np.ceil(3 * strength))
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / strength) ** 2)
    weights = weights / weights.sum()
    for axis in (1, 2):
        place = np.clip(
            np.arange(x.shape[axis])[:, None] + np.arange(-half, half + 1), 0, x.shape[axis] - 1
        )
        matrix = np.zeros((x.shape[axis],) * 2)
        np.add.at(matrix, (np.arange(x.shape[axis])[:, None], place), weights)
        x = jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix, x.dtype), x, (1, axis)), 0, axis)
    return x


def crop(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: float = 0.75
) -> Float[Array, "b h w c"]:
    """Return a random window of each image, enlarged to the whole (bilinear).

    Args:
        key: typed random key.
        x: images.
        strength: share of each side that is kept, in (0, 1].
    """
    check_range("crop", "strength", strength, 0, 1, low_open=True)
    height, width = x.shape[1:3]
    size = max(round(height * strength), 1), max(round(width * strength), 1)
    keys = jax.random.split(key, 2)
    top = jax.random.randint(keys[0], (x.shape[0],), 0, height - size[0] + 1)
    left = jax.random.randint(keys[1], (x.shape[0],), 0, width - size[1] + 1)

    def one(image: Array, top: Array, left: Array) -> Array:
        window = jax.lax.dynamic_slice(image, (top, left, 0), (*size, image.shape[-1]))
        return jax.image.resize(window, image.shape, "bilinear")

    return jax.vmap(one)(x, top, left)


def resize(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: float = 0.5
) -> Float[Array, "b h w c"]:
    """Return images brought to ``strength`` of their size, in (0, 1], and back (bilinear)."""
    del key
    check_range("resize", "strength", strength, 0, 1, low_open=True)
    batch, height, width, channels = x.shape
    small = max(round(height * strength), 1), max(round(width * strength), 1)
    x_small = jax.image.resize(x, (batch, *small, channels), "bilinear")
    return jax.image.resize(x_small, x.shape, "bilinear")


def brightness(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: Scalar = 0.5
) -> Float[Array, "b h w c"]:
    """Return images whose distance from black is scaled by a random factor each, and cut.

    The factor is uniform in ``[max(0, 1 - strength), 1 + strength]``.
    """
    check_range("brightness", "strength", strength, 0)
    return _scaled(key, x, strength, (x.shape[0], 1, 1, 1))


def colour(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: Scalar = 0.5
) -> Float[Array, "b h w c"]:
    """Return images as :func:`brightness` does, with another factor for each channel."""
    check_range("colour", "strength", strength, 0)
    return _scaled(key, x, strength, (x.shape[0], 1, 1, x.shape[3]))


def _scaled(key: PRNGKey, x: Array, strength: Scalar, shape: tuple[int, ...]) -> Array:
    low, high = jnp.maximum(0, 1 - strength), 1 + strength
    factor = jax.random.uniform(key, shape, x.dtype)
    return jnp.clip((x + 1) * (low + (high - low) * factor).astype(x.dtype) - 1, -1, 1)


def drop(
    key: PRNGKey, x: Float[Array, "b h w c"], strength: float = 0.4
) -> Float[Array, "b h w c"]:
    """Return images in which a random window of each is black.

    Args:
        key: typed random key.
        x: images.
        strength: share of each side that the window takes, in [0, 1].
    """
    check_range("drop", "strength", strength, 0, 1)
    inside = jnp.ones((x.shape[0], 1, 1, 1), bool)
    for axis, part in zip((1, 2), jax.random.split(key, 2), strict=True):
        length = x.shape[axis]
        size = round(length * strength)
        first = jax.random.randint(part, (x.shape[0], 1), 0, length - size + 1)
        place = jnp.arange(length)[None]
        along = (place >= first) & (place < first + size)
        inside = inside & (along[:, :, None, None] if axis == 1 else along[:, None, :, None])
    return jnp.where(inside, -1, x)


def median(key: PRNGKey, x: Float[Array, "b h w c"], strength: int = 3) -> Float[Array, "b h w c"]:
    """Return the median over a square window of ``strength`` pixels, odd; edges are repeated."""
    del key
    check_int("median", "strength", strength)
    if strength % 2 == 0:
        raise fail("median", "window has no middle", "an odd number", strength)
    half = strength // 2
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)), mode="edge")
    shifts = [
        padded[:, i : i + height, j : j + width] for i in range(strength) for j in range(strength)
    ]
    return jnp.median(jnp.stack(shifts), axis=0)


# ---- JPEG ---------------------------------------------------------------------------------------

_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMINANCE = np.full((8, 8), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# Rows: Y, Cb, Cr of R, G, B (ITU-R BT.601).
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_DCT = np.sqrt(0.25) * np.cos(np.pi / 16 * np.arange(8)[:, None] * (2 * np.arange(8)[None] + 1))
_DCT[0] *= 0.5**0.5


def jpeg(key: PRNGKey, x: Float[Array, "b h w c"], strength: int = 25) -> Float[Array, "b h w c"]:
    """Return images after JPEG: with the DCT coefficients of their 8 x 8 blocks rounded.

    As libjpeg does it: its tables and quality scale, colours at half the resolution (4:2:0) for 3
    channels, gray otherwise, channel by channel; 8-bit values before and after. Its integer
    arithmetic rounds some coefficients to the other side: Pillow's pictures are about half a level
    of 255 away.

    Args:
        key: not used.
        x: images.
        strength: quality, 1 (coarse) to 100.

    Raises:
        ValueError: for a quality outside of 1 .. 100.
    """
    del key
    check_int("jpeg", "strength", strength)
    check_range("jpeg", "strength", strength, 1, 100)
    height, width, channels = x.shape[1:]
    levels = jnp.clip(jnp.round((x + 1) * 127.5), 0, 255)
    if channels != 3:
        out = _coded(levels - 128, _LUMINANCE, strength) + 128
    else:
        matrix = jnp.asarray(_YCBCR, x.dtype)
        planes = jnp.round(jnp.einsum("bhwc,dc->bhwd", levels, matrix, precision="highest"))
        luma = _coded(planes[..., :1] - 128, _LUMINANCE, strength) + 128
        pad = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        chroma = jnp.pad(planes[..., 1:], pad, mode="edge")
        rows, columns = chroma.shape[1] // 2, chroma.shape[2] // 2
        # Halves are rounded down and up in turn, as libjpeg does.
        bias = 0.25 + 0.25 * (jnp.arange(columns) % 2).astype(x.dtype)[None, None, :, None]
        chroma = jnp.floor(chroma.reshape(-1, rows, 2, columns, 2, 2).mean((2, 4)) + bias)
        chroma = _coded(chroma, _CHROMINANCE, strength)
        full = (chroma.shape[0], 2 * rows, 2 * columns, 2)
        chroma = jax.image.resize(chroma, full, "bilinear")[:, :height, :width]
        planes = jnp.concatenate([luma, chroma], axis=-1)
        inverse = jnp.asarray(np.linalg.inv(_YCBCR), x.dtype)
        out = jnp.einsum("bhwc,dc->bhwd", planes, inverse, precision="highest")
    return jnp.clip(jnp.round(out), 0, 255) / 127.5 - 1


def _coded(planes: Array, table: np.ndarray, quality: int) -> Array:
    """Planes ``[b, h, w, c]`` of numbers around 0 with their DCT coefficients rounded."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = np.clip((table * scale + 50) // 100, 1, 255)[:, :, None]
    batch, height, width, channels = planes.shape
    pad = ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0))
    padded = jnp.pad(planes, pad, mode="edge")
    rows, columns = padded.shape[1] // 8, padded.shape[2] // 8
    blocks = padded.reshape(batch, rows, 8, columns, 8, channels)
    dct, steps = jnp.asarray(_DCT, planes.dtype), jnp.asarray(steps, planes.dtype)
    kept = jnp.einsum("ui,vj,brisjc->brsuvc", dct, dct, blocks, precision="highest")
    kept = jnp.round(kept / steps[None, None, None]) * steps[None, None, None]
    back = jnp.einsum("ui,vj,brsuvc->brisjc", dct, dct, kept, precision="highest")
    values = back.reshape(padded.shape)[:, :height, :width]
    return jnp.clip(jnp.round(values), -128, 127)
