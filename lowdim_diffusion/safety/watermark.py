r"""Watermarks in the noise: Shallow Diffuse.

An image is carried up to a noise level by the sampler's ODE, a few entries of its Fourier transform
are replaced by a secret pattern, and it is sampled again. Where the denoiser's Jacobian has low
rank, most of the change lies in its null space: the clean image that is predicted hardly moves,
and the pattern stays in the part that the sampler takes for noise. Detection carries an image up
in the same way and looks there.

``F`` is the orthonormal DFT over rows and columns, channel by channel, and ``M`` a set of entries
that holds with each frequency its negative. With a pattern ``W`` of real images,
``W(-k) = conj W(k)``,

.. math:: x \mapsto x + F^{-1} M (W - F x)

is real without taking a real part, and ``sum_M |F x|^2`` is a sum of as many real squares as M has
entries. (The released code draws ``W`` without the symmetry, so that the real part of the inverse
keeps half of it, and counts every number twice in its p-value.)

The entries lie within a radius of the highest frequency, the middle of an *unshifted* DFT
(``band="high"``, as published), where pictures hold little, or of frequency zero, the middle of a
shifted one (``band="low"``).

Along the ODE a component in the null space shrinks by ``sqrt((d^2 + s_0^2) / (d^2 + s^2))`` from
noise level ``s`` to ``s_0``, with the data's own standard deviation ``d`` there. On exactly
low-rank data ``d = 0``: nothing of the pattern reaches the image as ``s_0`` goes to 0, and the way
back blows up whatever noise the image has met, so these cannot be marked invisibly. Networks can
because their Jacobian regains full rank at low noise, or if ``s_0`` stays above the noise that is
to be borne (``sigma_min`` of :func:`grid`).

References:
    Li et al. 2024, "Shallow Diffuse", arXiv 2410.21088;
    Wen et al. 2023, "Tree-Ring Watermarks", arXiv 2305.20030 (rings, p-value).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import sampling, schedules, solvers
from lowdim_diffusion._checks import (
    check_choice,
    check_int,
    check_range,
    check_shape,
    fail,
)
from lowdim_diffusion._types import (
    Array,
    ArrayLike,
    Bool,
    DenoiseFn,
    Float,
    PRNGKey,
    Scalar,
    Schedule,
)
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.safety._chi2 import noncentral_chi2_cdf

Band = Literal["high", "low"]
Pattern = Literal["rings", "noise"]

__all__ = [
    "Mark",
    "Match",
    "decode",
    "embed",
    "grid",
    "inject",
    "make_mark",
    "match",
    "p_value",
    "recover",
    "threshold",
    "turn_signs",
]


class _Layout(NamedTuple):
    """Where in the spectrum the numbers of a mark go; arrays ``[h, w, c]``."""

    inside: np.ndarray
    real_index: np.ndarray
    real_gain: np.ndarray
    imag_index: np.ndarray
    imag_gain: np.ndarray
    count: int
    """How many numbers there are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """The secret key of a watermark: entries of the spectrum and the numbers that belong there.

    Made by :func:`make_mark`, or from stored numbers.

    Args:
        values: ``[num_values]``: one per ring and channel, or one per real degree of freedom.
        shape: ``(h, w, c)`` of the images.
        radius: entries within this distance of the band's middle, in frequencies.
        channels: those that carry the pattern.
        band: around the highest frequency, or around zero.
        pattern: ``"rings"``, constant on circles of width 1 and thus the same after a turn or a
            flip, or ``"noise"``, the spectrum of white noise.

    Raises:
        ValueError: for a shape that is none of images, a radius that leaves fewer than two entries
            or reaches beyond half of the shorter side, a channel that there is not, or another
            number of values.
    """

    values: Float[Array, " num_values"]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    radius: float = dataclasses.field(metadata={"static": True})
    channels: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    band: Band = dataclasses.field(default="high", metadata={"static": True})
    pattern: Pattern = dataclasses.field(default="rings", metadata={"static": True})

    def __post_init__(self) -> None:
        layout = self.layout
        if isinstance(self.values, np.ndarray | jax.Array):  # else a pytree made of something else
            fix = "the key belongs to another shape, radius or pattern"
            check_shape("Mark", "values", self.values, (layout.count,), fix)

    @property
    def layout(self) -> _Layout:
        """Where the numbers go."""
        return _layout(self.shape, self.radius, self.channels, self.band, self.pattern)

    @property
    def mask(self) -> Bool[np.ndarray, "h w c"]:
        """The entries of the unshifted DFT that are replaced."""
        return self.layout.inside

    @property
    def spectrum(self) -> Array:
        """``W [h, w, c]``, complex; zero outside of the mask."""
        q, dtype = self.layout, jnp.asarray(self.values).dtype
        real = self.values[q.real_index] * q.real_gain.astype(dtype)
        return jax.lax.complex(real, self.values[q.imag_index] * q.imag_gain.astype(dtype))


class Match(NamedTuple):
    """How well images agree with a mark; ``[b]`` each."""

    distance: Float[Array, " b"]
    """Mean of ``|F x - W|`` over the mask, the released score; low if marked."""
    eta: Float[Array, " b"]
    """``sum |F x - W|^2 / sum |F x|^2`` over the mask, the paper's score; 0 for a perfect match."""
    cosine: Float[Array, " b"]
    """Of the angle between ``F x`` and ``W`` on the mask, in [-1, 1]; high if marked."""
    p_value: Float[Array, " b"]
    """See :func:`p_value`."""


@functools.lru_cache(maxsize=64)
def _layout(
    shape: tuple[int, ...], radius: float, channels: tuple[int, ...], band: str, pattern: str
) -> _Layout:
    where = "Mark"
    if len(shape) != 3 or min(shape) < 1:
        raise fail(where, "not the shape of images", "(height, width, channels)", shape)
    check_choice(where, "band", band, ("high", "low"))
    check_choice(where, "pattern", pattern, ("rings", "noise"))
    height, width, depth = shape
    check_range(where, "radius", radius, 0, min(height, width) / 2, fix="half the shorter side")
    if not channels or not set(channels) <= set(range(depth)):
        expected = f"one or more of 0 .. {depth - 1}"
        raise fail(where, "no such channels", expected, tuple(channels))
    rows, columns = np.arange(height), np.arange(width)
    if band == "high":
        away = np.abs(rows - height / 2), np.abs(columns - width / 2)
    else:
        away = np.minimum(rows, height - rows), np.minimum(columns, width - columns)
    distance = np.hypot(away[0][:, None], away[1][None, :])
    plane = distance <= radius
    if plane.sum() * len(channels) < 2:
        raise fail(where, "empty mask", "a radius with two entries or more", radius)
    inside = np.zeros(shape, bool)
    inside[..., list(channels)] = plane[..., None]
    real_index, imag_index = np.zeros(shape, int), np.zeros(shape, int)
    real_gain, imag_gain = np.zeros(shape), np.zeros(shape)
    if pattern == "rings":
        ring = np.maximum(np.ceil(distance), 1)
        key = np.where(inside, ring[..., None] * depth + np.arange(depth), -1)
        real_index[inside] = np.unique(key[inside], return_inverse=True)[1].reshape(-1)
        real_gain[inside] = 1
        return _Layout(inside, real_index, real_gain, imag_index, imag_gain, _top(real_index))
    count = 0
    for i, j, c in np.argwhere(inside):
        other = -i % height, -j % width, c
        if (i, j, c) == other:  # the entry of a real image is real here
            real_index[i, j, c], real_gain[i, j, c] = count, 1
            count += 1
        elif (i, j, c) < other:
            for place, sign in (((i, j, c), 1), (other, -1)):
                real_index[place], real_gain[place] = count, 0.5**0.5
                imag_index[place], imag_gain[place] = count + 1, sign * 0.5**0.5
            count += 2
    return _Layout(inside, real_index, real_gain, imag_index, imag_gain, count)


def _top(index: np.ndarray) -> int:
    return int(index.max()) + 1


def make_mark(
    key: PRNGKey,
    shape: Sequence[int],
    *,
    radius: float | None = None,
    channels: Sequence[int] | None = None,
    band: Band = "high",
    pattern: Pattern = "rings",
    scale: Scalar = 1.0,
    message: Sequence[int] | None = None,
) -> Mark:
    """Return a random mark: a random direction, whose signs carry a message if one is given.

    Bit ``i`` of a message of B bits turns the sign of the numbers ``i, i + B, i + 2 B, ...``.

    Args:
        key: typed random key, the secret: who has it can find the mark and take it out.
        shape: ``(h, w, c)`` of the images.
        radius: see :class:`Mark`; None for an eighth of the shorter side (8 of 64, as published),
            and 3 on small images: some 30 entries at least.
        channels: see :class:`Mark`; None for all.
        band: see :class:`Mark`.
        pattern: see :class:`Mark`.
        scale: root mean square of ``W`` over the mask, which the numbers are brought to. Take about
            that of the entries which it replaces, ``sigma(t)`` at the mark's noise level: 1 suits
            the published schedule.
        message: bits, 0 or 1.

    Raises:
        ValueError: as :class:`Mark`; for a message with other entries than bits or with more of
            them than there are numbers.

    Examples:
        >>> import jax
        >>> mark = make_mark(jax.random.key(0), (16, 16, 1))
        >>> int(mark.mask.sum()), mark.values.shape
        (29, (3,))
        >>> make_mark(jax.random.key(0), (16, 16, 1), pattern="noise").values.shape
        (29,)
    """
    shape = tuple(int(n) for n in shape)
    if radius is None:
        side = min(shape[:2], default=0)
        radius = min(max(side / 8, 3), side / 2)
    chosen = tuple(range(shape[-1])) if channels is None else tuple(int(c) for c in channels)
    count = _layout(shape, float(radius), chosen, band, pattern).count
    check_range("make_mark", "scale", scale, 0, low_open=True, high_open=True)
    mark = Mark(jax.random.normal(key, (count,)), shape, float(radius), chosen, band, pattern)
    power = jnp.sum(jnp.abs(mark.spectrum) ** 2) / np.sum(mark.mask)
    mark = dataclasses.replace(mark, values=scale * mark.values / jnp.sqrt(power))
    return mark if message is None else turn_signs(mark, message)


def turn_signs(mark: Mark, message: Sequence[int]) -> Mark:
    """Return the mark with a message written into the signs of its numbers, or taken out again.

    Args:
        mark: the mark.
        message: bits, as for :func:`make_mark`.

    Raises:
        ValueError: for other entries than bits, or more of them than there are numbers.

    Examples:
        >>> import jax
        >>> mark = make_mark(jax.random.key(0), (16, 16, 1))
        >>> twice = turn_signs(turn_signs(mark, [1, 0]), [1, 0])
        >>> bool((twice.values == mark.values).all())
        True
    """
    bits, count = np.asarray(message), len(mark.values)
    if bits.ndim != 1 or not bits.size or not np.isin(bits, (0, 1)).all():
        raise fail("make_mark", "message is not of bits", "zeros and ones", message)
    if bits.size > count:
        fix = 'shorten it, or take a larger radius, more channels or pattern="noise"'
        expected = f"at most {count} bits for this mark"
        raise fail("make_mark", "message too long", expected, bits.size, fix)
    return dataclasses.replace(
        mark, values=mark.values * (1 - 2 * bits[np.arange(count) % bits.size])
    )


def _spectrum(x: Array) -> Array:
    return jnp.fft.fft2(x, axes=(1, 2), norm="ortho")


def _images(where: str, x: ArrayLike, mark: Mark) -> Array:
    x = jnp.asarray(x)
    fix = "the mark was made for images of another shape"
    check_shape(where, "the images", x, (None, *mark.shape), fix)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inject(x_t: Float[Array, "b h w c"], mark: Mark) -> Float[Array, "b h w c"]:
    """Return noisy images with the mark in place of what their spectra held there.

    Args:
        x_t: ``[b, h, w, c]`` at the mark's noise level.
        mark: the mark.

    Raises:
        ValueError: for images of another shape than the mark's.

    Examples:
        >>> import jax
        >>> mark = make_mark(jax.random.key(0), (8, 8, 1))
        >>> x_t = inject(jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), mark)
        >>> match(x_t, mark).cosine.round(3).tolist()
        [1.0, 1.0, 1.0]
    """
    x_t = _images("inject", x_t, mark)
    turned = (mark.spectrum[None] - _spectrum(x_t)) * mark.mask[None].astype(x_t.dtype)
    return x_t + jnp.fft.ifft2(turned, axes=(1, 2), norm="ortho").real


def grid(
    schedule: Schedule, t: Scalar, *, num_steps: int = 20, sigma_min: float = 0.1
) -> Float[np.ndarray, " {num_steps}+1"]:
    """Return the times between a mark's time and the images, as EDM spaces them in noise level.

    The last one is at noise level ``sigma_min``, at which images are taken to be: not at 0, since a
    step to the clean image would leave out what the denoiser takes for noise, and with it the mark.
    It decides what the mark costs and what it bears. Marked entries keep about ``sigma_min`` of
    noise, and images that meet less than that on their way are found; at 0.01 the change is not
    seen, and not much is borne.

    Args:
        schedule: noise schedule.
        t: time of the mark; published is 0.3 of the longest, ``sigma / alpha`` about 1.2.
        num_steps: solver steps each way.
        sigma_min: last noise level ``sigma / alpha``; the schedule's first one if that is higher,
            and half the mark's if that is lower.

    Raises:
        ValueError: if t is outside of the schedule or at its clean end.

    Examples:
        >>> from lowdim_diffusion import schedules
        >>> grid(schedules.VE(), 0.5, num_steps=2).round(3).tolist()
        [0.5, 0.23..., 0.1...]
    """
    where = "watermark.grid"
    check_int(where, "num_steps", num_steps)
    check_range(where, "sigma_min", sigma_min, 0, low_open=True)
    low, high = float(schedule.t_min), float(schedule.t_max)
    check_range(where, "t", t, low, high, low_open=True, fix="a time of the schedule")
    with jax.ensure_compile_time_eval():
        first, clean = (float(schedules.noise_levels(schedule, s)) for s in (t, low))
        last = min(max(clean, sigma_min), first / 2)
        levels = schedules.karras_grid(num_steps + 1, last, first)[:-1]
        ts = np.array(schedules.times_from_sigmas(schedule, levels))
    ts[0] = t
    return ts


def recover(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_0: Float[Array, "b *data"],
    *,
    solver: solvers.Solver | None = None,
) -> Float[Array, "b *data"]:
    """Return ``x_t`` at ``ts[0]``: images carried up by the ODE, where a mark is to be found.

    Args:
        denoise_fn: of the model that marked them, or one near it.
        schedule: noise schedule.
        ts: from :func:`grid`, the same as for marking.
        x_0: ``[b, h, w, c]`` images.
        solver: deterministic, one that is not reversible; None for Heun's. Euler's is the
            published way, DDIM.

    Raises:
        ValueError: for a solver of another kind, or a bad grid.
    """
    solver = solvers.heun() if solver is None else solver
    if solver.undo is not None:
        fix = "e.g. solvers.heun()"
        what = "the state of a reversible solver is two images"
        raise fail("watermark.recover", what, "another solver", solver.name, fix)
    return sampling.invert(denoise_fn, schedule, ts, x_0, solver=solver)


def embed(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_0: Float[Array, "b h w c"],
    mark: Mark,
    *,
    solver: solvers.Solver | None = None,
) -> Float[Array, "b h w c"]:
    """Return images with a mark: carried up to ``ts[0]``, marked there and sampled again.

    To mark what a model generates, sample to ``ts[0]``, then :func:`inject`, then sample on.

    Args:
        denoise_fn: of the model.
        schedule: noise schedule.
        ts: from :func:`grid`.
        x_0: ``[b, h, w, c]`` images.
        mark: the mark.
        solver: as for :func:`recover`.

    Raises:
        ValueError: for images of another shape than the mark's, or as :func:`recover`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> ve, white = schedules.VE(), lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> mark, ts = make_mark(jax.random.key(0), (8, 8, 1), scale=2.0), grid(ve, 2.0)
        >>> x_0 = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
        >>> marked = embed(white, ve, ts, x_0, mark)
        >>> found = match(recover(white, ve, ts, marked), mark)
        >>> bool(jnp.all(found.p_value < 1e-6))
        True
    """
    x_t = recover(denoise_fn, schedule, ts, _images("embed", x_0, mark), solver=solver)
    solver = solvers.heun() if solver is None else solver
    key = jax.random.key(0)  # which no deterministic solver uses
    return sampling.sample(key, denoise_fn, schedule, ts, inject(x_t, mark), solver=solver).x


class _Sums(NamedTuple):
    size: int
    own: Array
    """``sum_M |F x|^2``."""
    away: Array
    """``sum_M |F x - W|^2``."""
    marks: Array
    """``sum_M |W|^2``."""
    distance: Array
    cosine: Array


def _sums(where: str, x_t: ArrayLike, mark: Mark) -> _Sums:
    x = _images(where, x_t, mark)
    inside = mark.mask
    found, own = _spectrum(x)[:, inside], mark.spectrum[inside][None]
    square = lambda z: z.real**2 + z.imag**2
    total = lambda a: jnp.sum(a, axis=-1)
    norms = jnp.sqrt(total(square(found)) * total(square(own)))
    product = total(found.real * own.real + found.imag * own.imag)
    return _Sums(
        int(inside.sum()),
        total(square(found)),
        total(square(found - own)),
        total(square(own)),
        jnp.mean(safe_sqrt(square(found - own)), axis=-1),
        jnp.clip(jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 0), -1, 1),
    )


def match(x_t: Float[Array, "b h w c"], mark: Mark) -> Match:
    """Return how well noisy images agree with a mark.

    Args:
        x_t: ``[b, h, w, c]`` at the mark's noise level, from :func:`recover`.
        mark: the mark.

    Raises:
        ValueError: for images of another shape than the mark's.
    """
    q = _sums("match", x_t, mark)
    return Match(q.distance, q.away / q.own, q.cosine, _p_of_cosine(q))


def p_value(
    x_t: Float[Array, "b h w c"], mark: Mark, *, std: Scalar | Float[Array, " b"] | None = None
) -> Float[Array, " b"]:
    r"""Return the probability that an unmarked image agrees with a mark as well as this one.

    With m entries in the mask and white noise of known standard deviation ``s`` in them,
    ``sum_M |F x - W|^2 / s^2`` is noncentral chi-square with m degrees of freedom and
    noncentrality ``sum_M |W|^2 / s^2``; the p-value is its distribution function, small for marked
    images. The published one puts the root mean square of the same entries for ``s``. Then nothing
    but the angle is random, and the exact value, which is returned without ``std``, is

    .. math:: P(\cos\theta' \ge \cos\theta) = \tfrac12
        I_{\sin^2\theta}\bigl(\tfrac{m-1}{2}, \tfrac12\bigr) \quad (\cos\theta \ge 0),

    for a random direction ``theta'``: of white entries under any mark, and of *any* image under a
    mark of the pattern ``"noise"`` that was drawn independently. Pictures of one kind resemble one
    mark more than others, and rings more than noise: there it is a score; take :func:`threshold`.

    Args:
        x_t: ``[b, h, w, c]`` at the mark's noise level.
        mark: the mark.
        std: known standard deviation, > 0, one for all or ``[b]``; None to go by the angle.

    Returns:
        ``[b]`` in [0, 1]; numbers too small for the dtype become 0.

    Raises:
        ValueError: for images of another shape than the mark's, or std <= 0.

    Examples:
        >>> import jax
        >>> mark = make_mark(jax.random.key(0), (8, 8, 1))
        >>> x_t = jax.random.normal(jax.random.key(1), (1000, 8, 8, 1))
        >>> 0.08 < float((p_value(x_t, mark) < 0.1).mean()) < 0.12
        True
    """
    q = _sums("p_value", x_t, mark)
    if std is None:
        return _p_of_cosine(q)
    check_range("p_value", "std", std, 0, low_open=True, high_open=True)
    var = jnp.broadcast_to(jnp.asarray(std, q.own.dtype) ** 2, q.own.shape)
    return noncentral_chi2_cdf(q.away / var, q.size, q.marks / var)


def _p_of_cosine(q: _Sums) -> Array:
    half, dtype = (q.size - 1) / 2, q.cosine.dtype
    sine2 = (1 - q.cosine) * (1 + q.cosine)
    tail = jax.scipy.special.betainc(jnp.asarray(half, dtype), jnp.asarray(0.5, dtype), sine2) / 2
    return jnp.where(q.cosine >= 0, tail, 1 - tail)


def decode(x_t: Float[Array, "b h w c"], mark: Mark, num_bits: int) -> Bool[Array, "b num_bits"]:
    """Return the message in noisy images, bit by bit the sign that fits better.

    Args:
        x_t: ``[b, h, w, c]`` at the mark's noise level.
        mark: the mark *without* its message: made with the same key and ``message=None``.
        num_bits: length of the message.

    Raises:
        ValueError: for images of another shape than the mark's, or more bits than it has numbers.

    Examples:
        >>> import jax
        >>> key, bits = jax.random.key(0), [1, 0, 1, 1]
        >>> sent = make_mark(key, (8, 8, 1), pattern="noise", message=bits)
        >>> x_t = inject(jax.random.normal(key, (1, 8, 8, 1)), sent)
        >>> plain = make_mark(key, (8, 8, 1), pattern="noise")
        >>> decode(x_t, plain, 4).astype(int).tolist()
        [[1, 0, 1, 1]]
    """
    x_t = _images("decode", x_t, mark)
    check_int("decode", "num_bits", num_bits)
    count = mark.values.shape[0]
    if num_bits > count:
        raise fail("decode", "too many bits", f"at most {count} for this mark", num_bits)
    q, found = mark.layout, _spectrum(x_t)[:, mark.mask]
    each = jnp.zeros((x_t.shape[0], count), x_t.dtype)
    for part, index, gain in (
        (found.real, q.real_index, q.real_gain),
        (found.imag, q.imag_index, q.imag_gain),
    ):
        weight = gain[mark.mask].astype(x_t.dtype)[None]
        each = each.at[:, index[mark.mask]].add(part * weight)
    each = each * mark.values[None]
    padded = jnp.pad(each, ((0, 0), (0, -count % num_bits)))
    return jnp.sum(padded.reshape(x_t.shape[0], -1, num_bits), axis=1) < 0


def threshold(scores: ArrayLike, max_fpr: float = 0.01) -> float:
    """Return the score above which at most a share ``max_fpr`` of unmarked images lies.

    Calibrate on images of the same kind, carried up to the same noise level.

    Args:
        scores: ``[n]`` of unmarked images, high for marked ones: ``match(...).cosine``, or
            ``-eta``, ``-distance``, ``-p_value``.
        max_fpr: in [0, 1].

    Returns:
        The smallest score of theirs that will do; an image is called marked above it. With fewer
        than ``1 / max_fpr`` images this is the largest one.

    Raises:
        ValueError: for ``max_fpr`` outside [0, 1], no scores, or NaN among them.

    Examples:
        >>> threshold([0.1, 0.9, 0.4, 0.2], 0.25)
        0.4
    """
    check_range("threshold", "max_fpr", max_fpr, 0, 1)
    found = np.sort(np.asarray(scores, np.float64))
    check_shape("threshold", "scores", found, (None,))
    if not found.size or np.isnan(found).any():
        raise fail("threshold", "no numbers to go by", "scores of unmarked images", found)
    flagged = math.floor(max_fpr * found.size * (1 + 1e-9))
    return float(found[max(found.size - 1 - flagged, 0)]) if flagged < found.size else -math.inf
