r"""What an edit did: change inside and outside its region, similarity, success.

=========================  =======================================================  =============
score                      formula                                                  range
=========================  =======================================================  =============
``inside_outside_change``  root mean square of ``after - before`` on either side     [0, inf)
``ssim``                   mean of the structural similarity over windows            [-1, 1]
``feature_distance``       mean squared distance of unit-length activations          [0, inf)
``round_trip_error``       root mean square error, and ``20 log10(range / rmse)``    [0, inf)
``edit_success``           inside above one threshold and outside below another      true or false
=========================  =======================================================  =============

Pictures are ``[b, h, w, c]`` in [-1, 1], so that ``data_range = 2``; 8-bit pictures may be given
with ``data_range = 255``. All scores are per example.

The error of inversion caps every similarity: an edit of strength 0, inverted and sampled again,
does not return its picture exactly. Report :func:`round_trip_error` beside them as the baseline.
The paper's success rates are judgements of people; :func:`edit_success` is a machine's stand-in, to
compare methods under the same thresholds and not with published numbers.

References:
    Chen et al. 2024, arXiv 2409.02374, section 5 (local edit success, LPIPS, SSIM, transfer);
    Wang et al. 2004, doi:10.1109/TIP.2003.819861 (SSIM);
    Zhang et al. 2018, arXiv 1801.03924, equation 1 (LPIPS).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, ArrayLike, Bool, Float, Scalar
from lowdim_diffusion.editing.masks import check_mask
from lowdim_diffusion.linalg import safe_sqrt


class Change(NamedTuple):
    """How much an edit changed each example, on either side of the mask's edge."""

    inside: Float[Array, " b"]
    """Root mean square change per number inside the mask."""
    outside: Float[Array, " b"]
    """The same outside; 0 if the mask is full."""


class RoundTrip(NamedTuple):
    """How far examples came back from where they were."""

    rmse: Float[Array, " b"]
    """Root mean square error per number."""
    psnr: Float[Array, " b"]
    """Peak signal-to-noise ratio in decibels; infinite for equal examples."""


def _pair(where: str, a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both as floats of one dtype; refuses different shapes, which would broadcast."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.ndim < 2:
        raise fail(where, "shape of the examples", "[b, *data]", a.shape)
    if a.shape != b.shape:
        raise fail(where, "the two sets differ in shape", a.shape, b.shape)
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return a.astype(dtype), b.astype(dtype)


def inside_outside_change(before: ArrayLike, after: ArrayLike, mask: ArrayLike) -> Change:
    r"""Return the root mean square change per number inside and outside of a mask.

    .. math:: \Big( \frac{1}{|\Omega|} \sum_{i \in \Omega} (y_i - x_i)^2 \Big)^{1/2}

    and likewise over the complement. A side without pixels has changed by 0.

    Args:
        before: ``[b, *data]``.
        after: ``[b, *data]``, edited.
        mask: as :func:`lowdim_diffusion.editing.masks.check_mask` takes it, one for all examples
            (``vmap`` for one each).

    Returns:
        ``(inside [b], outside [b])`` in the units of the data.

    Raises:
        ValueError: if the sets differ in shape, or the mask does not fit or is empty.

    Examples:
        >>> before = np.zeros((1, 2, 2, 1))
        >>> after = np.array([3.0, 4.0, 1.0, 1.0]).reshape(1, 2, 2, 1)
        >>> change = inside_outside_change(before, after, [[1, 1], [0, 0]])
        >>> float(change.inside[0]), float(change.outside[0])
        (3.535..., 1.0)
    """
    where = "inside_outside_change"
    before, after = _pair(where, before, after)
    inside = jnp.asarray(check_mask(where, mask, before.shape[1:]))[None]
    squared = (after - before) ** 2
    axes = tuple(range(1, before.ndim))

    def rms(part: Array) -> Array:
        total = jnp.sum(jnp.where(part, squared, 0), axis=axes)
        return safe_sqrt(total / jnp.maximum(jnp.sum(part), 1).astype(total.dtype))

    return Change(rms(inside), rms(~inside))


def _window_matrix(length: int, window: int, sigma: float) -> np.ndarray:
    """``[length - window + 1, length]``: each row weighs one window by a Gaussian of sum 1."""
    weights = np.exp(-0.5 * ((np.arange(window) - window // 2) / sigma) ** 2)
    start = np.arange(length - window + 1)
    matrix = np.zeros((start.size, length))
    matrix[start[:, None], start[:, None] + np.arange(window)[None, :]] = weights / weights.sum()
    return matrix


def ssim(
    a: ArrayLike,
    b: ArrayLike,
    *,
    data_range: Scalar = 2.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    sample_covariance: bool = False,
) -> Float[Array, " b"]:
    r"""Return the mean structural similarity of pairs of pictures: 1 for equal ones.

    With the means, variances and covariance of the two pictures under a Gaussian window,

    .. math::
        \frac{(2 \mu_a \mu_b + c_1)(2 \sigma_{ab} + c_2)}
             {(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)}, \qquad
        c_i = (k_i \, \mathrm{range})^2,

    averaged over all positions at which the window lies inside the picture, and over channels. The
    defaults are those of the paper; scikit-image gives the same numbers with
    ``gaussian_weights=True, use_sample_covariance=False, channel_axis=-1``.

    Pictures smaller than the window are refused rather than given a smaller window in silence,
    because numbers of different windows are not comparable: for 8x8 pictures pass ``window=7``.

    Args:
        a: ``[b, h, w, c]``.
        b: ``[b, h, w, c]``; swapping the two changes nothing.
        data_range: largest value minus smallest that the pictures can take, > 0.
        window: side of the window in pixels, odd, 3 <= window <= min(h, w).
        sigma: width of the Gaussian in pixels, > 0.
        k1: constant of the means' term.
        k2: constant of the variances' term.
        sample_covariance: divide by ``window**2 - 1`` instead of ``window**2``, as if the weights
            were equal (scikit-image's default).

    Returns:
        ``[b]`` in [-1, 1].

    Raises:
        ValueError: if the shapes differ or are not pictures, or the window is even or larger than
            the pictures.

    Examples:
        >>> x = np.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
        >>> float(ssim(x, x, window=7)[0])
        1.0
        >>> bool(ssim(x, x / 2, window=7)[0] > ssim(x, x / 4, window=7)[0])
        True
    """
    a, b = _pair("ssim", a, b)
    if a.ndim != 4:
        raise fail("ssim", "shape of the pictures", "[b, h, w, c]", a.shape)
    check_int("ssim", "window", window, low=3)
    if window % 2 == 0:
        raise fail("ssim", "window has no middle", "an odd number", window)
    height, width = a.shape[1:3]
    if window > min(height, width):
        side = min(height, width) - (min(height, width) + 1) % 2
        fix = f"pass window={side}" if side >= 3 else "the pictures are too small for it"
        raise fail("ssim", "window larger than the pictures", f"{height}x{width}", window, fix)
    check_range("ssim", "data_range", data_range, 0, low_open=True)
    check_range("ssim", "sigma", sigma, 0, low_open=True)
    rows = jnp.asarray(_window_matrix(height, window, sigma), a.dtype)
    columns = jnp.asarray(_window_matrix(width, window, sigma), a.dtype)

    def mean(x: Array) -> Array:
        return jnp.einsum("ij,bjkc,lk->bilc", rows, x, columns, precision="highest")

    factor = window**2 / (window**2 - 1) if sample_covariance else 1
    mean_a, mean_b = mean(a), mean(b)
    var_a = factor * (mean(a**2) - mean_a**2)
    var_b = factor * (mean(b**2) - mean_b**2)
    covariance = factor * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def pyramid_features(x: Float[Array, "b h w c"], *, num_levels: int = 3) -> list[Array]:
    """Return values and gradients of pictures at several scales, for :func:`feature_distance`.

    Each level holds per pixel the c values, their c horizontal and c vertical central differences
    (edges repeated), and a constant 1. With the constant, the unit length that the distance gives
    to every pixel's vector keeps brightness and contrast, and does not blow up the noise of flat
    regions. The next level is the mean over blocks of 2 x 2 pixels.

    Args:
        x: ``[b, h, w, c]`` in [-1, 1].
        num_levels: levels at most; one is left out if it would be less than 2 pixels high or wide.

    Returns:
        list of ``[b, h / 2**l, w / 2**l, 3 c + 1]``, sizes rounded down.

    Examples:
        >>> import jax.numpy as jnp
        >>> [level.shape for level in pyramid_features(jnp.zeros((1, 8, 9, 3)))]
        [(1, 8, 9, 10), (1, 4, 4, 10), (1, 2, 2, 10)]
    """
    check_int("pyramid_features", "num_levels", num_levels)
    levels = []
    for _ in range(num_levels):
        batch, height, width, channels = x.shape
        if levels and min(height, width) < 2:
            break
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        one = jnp.ones_like(x[..., :1])
        levels.append(jnp.concatenate([x, across, down, one], axis=-1))
        half_height, half_width = height // 2, width // 2
        blocks = x[:, : 2 * half_height, : 2 * half_width]
        blocks = blocks.reshape(batch, half_height, 2, half_width, 2, channels)
        x = blocks.mean((2, 4))
    return levels


def feature_distance(
    a: ArrayLike,
    b: ArrayLike,
    features: Callable[[Array], Sequence[Array]] = pyramid_features,
    *,
    mask: ArrayLike | None = None,
    weights: Sequence[ArrayLike] | None = None,
) -> Float[Array, " b"]:
    r"""Return the distance of pictures in the activations of a network, as LPIPS measures it.

    With the activations of layer l scaled to unit length over channels at each position,

    .. math:: \sum_l \frac{1}{H_l W_l} \sum_{h, w} \| w_l \odot (\hat f^l_{hw}(a) -
        \hat f^l_{hw}(b)) \|^2 .

    LPIPS itself takes AlexNet, VGG or SqueezeNet and learnt weights; no pretrained network is
    shipped here. The default, :func:`pyramid_features`, sees values and gradients at three scales:
    good to rank edits against each other, not to set beside published LPIPS. Pass your network's
    activations as ``features`` for those.

    Args:
        a: ``[b, *data]``.
        b: ``[b, *data]``; swapping the two changes nothing (without a mask).
        features: ``[b, *data] -> list of [b, ..., c]``, one per layer; ``[b, c]`` counts as one
            position. Zero activations stay zero.
        mask: see :func:`lowdim_diffusion.editing.masks.check_mask`. If given, only what changes
            inside counts: outside of it b is replaced by a before the features are taken. The
            mean stays one over all positions. Give ``~mask`` for the change outside.
        weights: per layer a number or ``[c]``, multiplied before squaring as in the equation (the
            released code multiplies the square: take the root of its weights). None for 1.

    Returns:
        ``[b]``, >= 0.

    Raises:
        ValueError: if shapes differ, or weights do not fit the layers.

    Examples:
        >>> x = np.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
        >>> pixels = lambda x: [x]  # of one channel, unit length leaves the sign
        >>> [float(feature_distance(x, y, pixels)[0]) for y in (2 * x, -x)]
        [0.0, 4.0]
    """
    where = "feature_distance"
    a, b = _pair(where, a, b)
    if mask is not None:
        b = jnp.where(jnp.asarray(check_mask(where, mask, a.shape[1:]))[None], b, a)
    layers = list(zip(features(a), features(b), strict=True))
    weights = [1.0] * len(layers) if weights is None else weights
    if len(weights) != len(layers) or not layers:
        raise fail(
            where, "number of weights", f"one for each of {len(layers)} layers", len(weights)
        )
    total = jnp.zeros(a.shape[0], a.dtype)
    for i, ((x, y), weight) in enumerate(zip(layers, weights, strict=True)):
        weight = jnp.asarray(weight, x.dtype)
        if x.ndim < 2 or x.shape[0] != a.shape[0]:
            raise fail(where, f"shape of layer {i}", f"[{a.shape[0]}, ..., c]", x.shape)
        if weight.shape not in ((), x.shape[-1:]):
            raise fail(where, f"weights of layer {i}", f"() or ({x.shape[-1]},)", weight.shape)
        weight = weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
        squared = jnp.sum((weight * (_unit(x) - _unit(y))) ** 2, axis=-1)
        total = total + jnp.mean(squared.reshape(a.shape[0], -1), axis=-1).astype(a.dtype)
    return total


def _unit(x: Array) -> Array:
    """Unit length over the last axis, with the small constant of the published code."""
    return x / (safe_sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + 1e-10)


def round_trip_error(before: ArrayLike, after: ArrayLike, *, data_range: Scalar = 2.0) -> RoundTrip:
    r"""Return root mean square error and PSNR of examples that should have come back unchanged.

    .. math:: \mathrm{PSNR} = 20 \log_{10} ( \mathrm{range} / \mathrm{rmse} )

    Args:
        before: ``[b, *data]``.
        after: ``[b, *data]``, e.g. inverted to noise and sampled again without an edit.
        data_range: largest value minus smallest that the data can take, > 0.

    Returns:
        ``(rmse [b], psnr [b])``.

    Raises:
        ValueError: if the sets differ in shape.

    Examples:
        >>> error = round_trip_error(np.zeros((1, 4)), np.full((1, 4), 0.2))
        >>> f"{error.rmse[0]:.3f}, {error.psnr[0]:.1f} dB"
        '0.200, 20.0 dB'
    """
    before, after = _pair("round_trip_error", before, after)
    check_range("round_trip_error", "data_range", data_range, 0, low_open=True)
    rmse = safe_sqrt(jnp.mean((after - before) ** 2, axis=tuple(range(1, before.ndim))))
    return RoundTrip(rmse, 20 * (jnp.log10(data_range) - jnp.log10(rmse)))


def edit_success(
    inside: ArrayLike, outside: ArrayLike, *, min_inside: Scalar, max_outside: Scalar
) -> Bool[Array, "*cases"]:
    """Return which edits changed their region and left the rest alone.

    ``inside > min_inside`` and ``outside < max_outside``; an edit that is not finite failed. There
    are no defaults because the thresholds depend on the data: take ``min_inside`` well above the
    change inside that the round trip without an edit causes, and ``max_outside`` a little above
    the one it causes outside.

    Args:
        inside: ``[...]`` changes inside, from :func:`inside_outside_change`.
        outside: the same outside.
        min_inside: >= 0.
        max_outside: > 0.

    Examples:
        >>> edit_success([0.5, 0.5, 0.1], [0.1, 0.4, 0.1], min_inside=0.3, max_outside=0.2).tolist()
        [True, False, False]
    """
    check_range("edit_success", "min_inside", min_inside, 0)
    check_range("edit_success", "max_outside", max_outside, 0, low_open=True)
    inside, outside = jnp.asarray(inside), jnp.asarray(outside)
    if inside.shape != outside.shape:
        raise fail("edit_success", "shape of outside", inside.shape, outside.shape)
    return (inside > min_inside) & (outside < max_outside) & jnp.isfinite(inside)


def success_rate(
    success: ArrayLike, *, axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Return the share of edits that succeeded, among those of every image in every direction.

    Args:
        success: ``[images, directions, ...]`` true or false, from :func:`edit_success`; further
            axes, such as the two signs of the strength, count as further edits.
        axis: average over these axes only: 0 gives one rate per direction, 1 one per image. None
            for a single number.

    Returns:
        rates in [0, 1].

    Examples:
        >>> success_rate([[True, False], [True, True]], axis=0).tolist()
        [1.0, 0.5]
    """
    success = jnp.asarray(success).astype(bool)
    if success.size == 0:
        raise fail("success_rate", "no edits", "at least one", success.shape)
    return jnp.mean(success.astype(jnp.result_type(float)), axis=axis)


def transfer_rate(transferred: ArrayLike, own: ArrayLike | None = None) -> Float[Array, ""]:
    r"""Return the share of transfers that succeeded, among directions that work at home.

    A case is a direction found on one image, with one sign of the strength. It is applied to T
    *other* images at the same noise level. With ``s`` the success on its own image and
    ``s_j`` that on target j,

    .. math:: \frac{\sum_{cases} s \sum_j s_j}{T \sum_{cases} s} .

    A direction that fails on its own image says nothing about transfer and is left out.

    Args:
        transferred: ``[*cases, T]`` true or false, from :func:`edit_success`, the source image not
            among the targets.
        own: ``[*cases]`` true or false; None to count all cases.

    Returns:
        a number in [0, 1]; NaN if there is no case to count.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> float(transfer_rate([[True, True], [True, False], [False, False]], [True, True, False]))
        0.75
    """
    transferred = jnp.asarray(transferred).astype(bool)
    if transferred.ndim < 1 or transferred.shape[-1] == 0:
        raise fail("transfer_rate", "no targets", "[*cases, T] with T >= 1", transferred.shape)
    own = jnp.ones(transferred.shape[:-1], bool) if own is None else jnp.asarray(own).astype(bool)
    if own.shape != transferred.shape[:-1]:
        raise fail("transfer_rate", "shape of own", transferred.shape[:-1], own.shape)
    counted = jnp.sum(own) * transferred.shape[-1]
    hits = jnp.sum(transferred & own[..., None]).astype(jnp.result_type(float))
    return jnp.where(counted > 0, hits / jnp.maximum(counted, 1), jnp.nan)
