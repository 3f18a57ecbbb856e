r"""Layers that the networks share. They compute in the dtype of their input; sums run in float32.

The names of the parameters say how they start (see ``_module``).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._types import Array
from lowdim_diffusion.linalg import largest_divisor
from lowdim_diffusion.networks._conv import conv

_SHAPE_ONLY = nn.initializers.zeros  # values come from `_module`


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def tap(module: nn.Module, name: str, value: Array) -> None:
    """Offer a feature under ``name`` to whoever collects the taps (see ``_module``)."""
    module.sow("taps", "all", (name, value))


class Dense(nn.Module):
    """Affine map of the last axis; ``zero`` starts it at zero."""

    features: int
    zero: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        name = "zero_kernel" if self.zero else "kernel"
        kernel = self.param(name, _SHAPE_ONLY, (x.shape[-1], self.features))
        bias = self.param("bias", _SHAPE_ONLY, (self.features,))
        y = jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype))
        return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


class Conv(nn.Module):
    """SAME convolution of NHWC images; ``zero`` starts it at zero."""

    features: int
    size: int = 3
    zero: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        name = "zero_kernel" if self.zero else "kernel"
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param(name, _SHAPE_ONLY, shape)
        bias = self.param("bias", _SHAPE_ONLY, (self.features,))
        y = conv(x, kernel.astype(x.dtype))
        return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


class DownConv(nn.Module):
    """3x3 convolution at every second pixel of NHWC images with even sides, half as large.

    ``before`` rows of zeros come above and left of the image, and one below and right: 1 centres
    the kernel on the even pixels, 0 on the odd ones.
    """

    features: int
    before: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, height, width, channels = x.shape
        kernel = self.param("kernel", _SHAPE_ONLY, (3, 3, channels, self.features))
        bias = self.param("bias", _SHAPE_ONLY, (self.features,))
        # One matrix product: all its derivatives are such too, and fast inside `scan` (see _conv).
        x = jnp.pad(x, ((0, 0), (self.before, 1), (self.before, 1), (0, 0)))
        rows, columns = 2 * (height // 2) - 1, 2 * (width // 2) - 1
        seen = [x[:, r : r + rows : 2, c : c + columns : 2] for r in range(3) for c in range(3)]
        flat = kernel.astype(x.dtype).reshape(-1, self.features)
        y = jnp.einsum("bhwi,io->bhwo", jnp.concatenate(seen, -1), flat)
        return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


class GroupNorm(nn.Module):
    """Group normalisation, ``min(32, channels / 4)`` groups or the nearest smaller divisor.

    ``num_groups`` sets another number, which must divide the channels.
    """

    eps: float = 1e-5
    num_groups: int | None = None

    @nn.compact
    def __call__(self, x: Array, film: tuple[Array, Array] | None = None) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", _SHAPE_ONLY, (channels,))
        bias = self.param("bias", _SHAPE_ONLY, (channels,))
        groups = self.num_groups or largest_divisor(channels, min(32, channels // 4))
        return group_norm(x, scale, bias, groups, film=film, eps=self.eps)


def group_norm(
    x: Array,
    scale: Array,
    bias: Array,
    num_groups: int,
    *,
    film: tuple[Array, Array] | None = None,
    eps: float = 1e-5,
) -> Array:
    """Return ``(x - mean) / std * scale + bias`` with moments per example and group of channels.

    Both moments come from one pass over ``x``, in float32 or wider; the normalisation, the affine
    map and ``film`` fold into one multiply-add per entry.

    Args:
        x: ``[b, h, w, c]``.
        scale: ``[c]``.
        bias: ``[c]``.
        num_groups: divides ``c``.
        film: further ``(scale - 1, bias)`` of shape ``[b, c]``, applied after the first.
        eps: added to the variance.
    """
    wide = _wide(x.dtype)
    channels = x.shape[-1]
    entries = x.astype(wide)
    # Between channels and groups by products, which XLA leaves outside the loops over entries, here
    # and in the derivatives: there a group's numbers per entry would keep it from vectorising.
    member = np.repeat(np.eye(num_groups, dtype=wide), channels // num_groups, axis=1)
    product = lambda m, n: jnp.split(jnp.dot(jnp.concatenate(m), n, precision="highest"), 2)
    moments = entries.mean((1, 2)), (entries * entries).mean((1, 2))
    mean, square = product(moments, member.T / (channels // num_groups))
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps)
    a, b = product((inverse, -mean * inverse), member * scale.astype(wide)[None])
    b = b + bias.astype(wide)[None]
    if film is not None:
        gain = 1 + film[0].astype(wide)
        a, b = a * gain, b * gain + film[1].astype(wide)
    return (entries * a[:, None, None] + b[:, None, None]).astype(x.dtype)


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Return ``x`` with mean 0 and variance 1 along the last axis, no parameters."""
    entries = x.astype(_wide(x.dtype))
    entries = entries - entries.mean(-1, keepdims=True)
    var = (entries * entries).mean(-1, keepdims=True)
    return (entries * jax.lax.rsqrt(var + eps)).astype(x.dtype)


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    """Return ``x (1 + scale) + shift`` with one scale and shift per example and feature."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    return x * (1 + scale.reshape(shape)) + shift.reshape(shape)


def attend(q: Array, k: Array, v: Array, num_heads: int) -> Array:
    """Return soft-max attention of ``[b, tokens, features]`` arrays, the soft-max in float32."""

    def one(qkv: tuple[Array, ...]) -> Array:
        q, k, v = (a.reshape(a.shape[0], num_heads, -1).swapaxes(0, 1) for a in qkv)
        logits = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=_wide(q.dtype))
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("hqk,hkd->hqd", weights, v).swapaxes(0, 1)
        return mixed.reshape(mixed.shape[0], -1)

    # Of one example the weights, [heads, tokens, tokens], stay in the cache of a CPU.
    one_by_one, together = functools.partial(jax.lax.map, one), jax.vmap(one)
    return jax.lax.platform_dependent((q, k, v), cpu=one_by_one, default=together)


def dropout(x: Array, rate: float, keys: Array | None, layer: int) -> Array:
    """Return ``x`` with entries dropped at ``rate`` and the rest scaled up; one key per example.

    ``layer`` tells the layers of a network apart. Without keys nothing is dropped.
    """
    if keys is None or rate == 0:
        return x
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:])
    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0)


def sinusoids(values: Array, dim: int, low: float, high: float) -> Array:
    """Return ``[..., dim]``: cosines and sines of ``values`` at geometric frequencies."""
    half = dim // 2
    frequencies = np.geomspace(low, high, half).astype(values.dtype)
    angles = values[..., None] * jnp.expand_dims(frequencies, tuple(range(values.ndim)))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Fourier(nn.Module):
    """``[b, 2 num]``: sines and cosines of ``values`` at fixed random frequencies."""

    num: int

    @nn.compact
    def __call__(self, values: Array) -> Array:
        frequencies = self.param("frequencies", _SHAPE_ONLY, (self.num,))
        fixed = jax.lax.stop_gradient(frequencies).astype(values.dtype)
        angles = values[:, None] * fixed[None] * (2 * np.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Rows(nn.Module):
    """``[b, width]``: one trained row per label; the label ``num`` has the zero row."""

    num: int
    width: int

    @nn.compact
    def __call__(self, labels: Array, dtype: Any) -> Array:
        table = self.param("table", _SHAPE_ONLY, (self.num, self.width))
        return jax.nn.one_hot(labels, self.num, dtype=dtype) @ table.astype(dtype)


def downsample(x: Array, taps: tuple[float, ...] = (1, 1), pad: int | None = None) -> Array:
    """Return every second pixel of images that are smoothed along both sides by ``taps``.

    Args:
        x: ``[b, h, w, c]``.
        taps: filter of even length, here divided by its sum; ``(1, 1)`` is the 2x2 mean.
        pad: rows of zeros around the image; None keeps the filter centred, so that even sides are
            halved.
    """
    pad = (len(taps) - 1) // 2 if pad is None else pad
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    weights = [tap / sum(taps) for tap in taps]
    for axis in (1, 2):
        size = (x.shape[axis] - len(taps)) // 2 + 1
        x = _weighted(x, axis, weights, range(len(taps)), size, 2)
    return x


def upsample(x: Array, taps: tuple[float, ...] = (1, 1)) -> Array:
    """Return images of twice the size: four times the transpose of ``downsample``.

    Args:
        x: ``[b, h, w, c]``.
        taps: filter of even length; ``(1, 1)`` repeats every pixel.
    """
    weights = [2 * tap / sum(taps) for tap in taps]
    centre = (len(taps) - 1) // 2
    for axis in (1, 2):
        size = x.shape[axis]
        padding = [(0, 0)] * 4
        padding[axis] = (centre, centre)
        padded = jnp.pad(x, padding)
        phases = []
        for phase in (0, 1):  # pixel 2 m + phase sees the pixels m + (phase + centre - k) / 2
            used = range((phase + centre) % 2, len(taps), 2)
            starts = [centre + (phase + centre - k) // 2 for k in used]
            phases.append(_weighted(padded, axis, [weights[k] for k in used], starts, size))
        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


def _weighted(x: Array, axis: int, weights: Any, starts: Any, size: int, stride: int = 1) -> Array:
    """Return ``sum_k weights[k] x[starts[k] + stride i]`` for ``i < size``."""
    last = stride * (size - 1) + 1
    pick = lambda start: jax.lax.slice_in_dim(x, start, start + last, stride, axis)
    terms = [weight * pick(start) for weight, start in zip(weights, starts, strict=True)]
    return functools.reduce(jnp.add, terms)


class Embedding(nn.Module):
    """``[b, width]`` features of noise level and class label: sinusoids, then two layers.

    ``c_noise`` spans about 4 from clean to pure noise; frequencies from 1/4 to 16 radians resolve a
    factor of about 1.3 in sigma. No label is the zero row.
    """

    width: int
    num_classes: int
    num_frequencies: int = 64

    @nn.compact
    def __call__(self, c_noise: Array, cond: Array | None, dtype: Any) -> Array:
        e = sinusoids(c_noise, 2 * self.num_frequencies, 0.25, 16.0)
        e = jax.nn.silu(Dense(self.width, name="noise")(e.astype(dtype)))
        if self.num_classes:
            table = self.param("table", _SHAPE_ONLY, (self.num_classes, self.width))
            if cond is not None:
                rows = jax.nn.one_hot(cond, self.num_classes, dtype=dtype)
                e = e + rows @ table.astype(dtype)
        return jax.nn.silu(Dense(self.width, name="joint")(e))
