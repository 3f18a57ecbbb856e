r"""Linear measurements ``y = A x_0 + s n``: masks, block means, blurs, matrices, your own.

A :class:`LinearOperator` is a pytree around one linear function of one example; transposes come
from jax, batches from ``vmap``. Where a basis is known in which :math:`A^T A` is diagonal it
carries the functions of it,

.. math:: g(A^T A)\, v = V g(\Lambda) V^T v, \qquad
   A^+ = (A^T A)^{-1} A^T, \quad (A^T A + c I)^{-1} A^T \;\text{ on the row space of } A,

at the price of one product; elsewhere these inverses take conjugate gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, PRNGKey, PyTree, Scalar
from lowdim_diffusion.linalg import conjugate_gradient, expand_right

__all__ = [
    "LinearOperator",
    "blur",
    "downsampling",
    "inpainting",
    "matrix",
    "measure",
    "random_inpainting",
]

_HIGHEST = jax.lax.Precision.HIGHEST

Spectral: TypeAlias = Callable[[Array], Array]
"""An elementwise function of the eigenvalues of A^T A, called on the positive ones only."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearOperator:
    """A linear map A from one example ``[*data]`` to one measurement ``[*measurement]``.

    Attributes:
        fn: ``(values, x: [*data]) -> y: [*measurement]``, linear in x. Static: a function of a
            module, or a frozen dataclass, does not retrace when the operator is rebuilt.
        data_shape: ``[*data]``.
        values: pytree of arrays that the map depends on; leaves, so they may be traced. Floating
            ones are brought to the dtype of x.
        spectral_fn: ``(values, v: [*data], g) -> g(A^T A) v`` on the row space of A, with ``g``
            applied to its positive eigenvalues; None if no such basis is known.

    Raises:
        ValueError: if ``fn`` does not take examples of this shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> differences = LinearOperator(lambda values, x: x[1:] - x[:-1], (4,))
        >>> differences.apply(jnp.array([[0.0, 1.0, 3.0, 6.0]])).tolist()
        [[1.0, 2.0, 3.0]]
        >>> differences.transpose(jnp.array([[1.0, 0.0, 0.0]])).tolist()
        [[-1.0, 1.0, 0.0, 0.0]]
    """

    fn: Callable[[Any, Array], Array] = field(metadata={"static": True})
    data_shape: tuple[int, ...] = field(metadata={"static": True})
    values: PyTree = ()
    spectral_fn: Callable[[Any, Array, Spectral], Array] | None = field(
        default=None, metadata={"static": True}
    )

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """Shape of one measurement."""
        return self._abstract(jnp.float32).shape

    def apply(self, x: ArrayLike) -> Array:
        """Return ``A x: [b, *measurement]`` for ``x: [b, *data]``, in the dtype of x."""
        x = self._checked("apply", "x", x, self.data_shape)
        values = self._values(x.dtype)
        return jax.vmap(lambda one: self.fn(values, one))(x)

    def transpose(self, y: ArrayLike) -> Array:
        """Return ``A^T y: [b, *data]`` for ``y: [b, *measurement]``."""
        y = self._checked("transpose", "y", y, self.measurement_shape)
        values = self._values(y.dtype)
        example = jax.ShapeDtypeStruct(self.data_shape, y.dtype)
        back = jax.linear_transpose(lambda one: self.fn(values, one), example)
        return jax.vmap(lambda one: back(one)[0])(y)

    def normal(self, x: ArrayLike) -> Array:
        """Return ``A^T A x``."""
        return self.transpose(self.apply(x))

    def spectral(self, x: ArrayLike, g: Spectral) -> Array:
        """Return ``g(A^T A) x`` on the row space of A; what x has in the null space is dropped.

        Args:
            x: ``[b, *data]``.
            g: elementwise function of the positive eigenvalues of ``A^T A``.

        Raises:
            ValueError: if the operator does not know a basis in which ``A^T A`` is diagonal.
        """
        if self.spectral_fn is None:
            fix = "use a method that needs products only, such as dds or mmps"
            raise fail("LinearOperator", "no spectral_fn", "one, as matrix(a) has", None, fix)
        x = self._checked("spectral", "x", x, self.data_shape)
        values, spectral_fn = self._values(x.dtype), self.spectral_fn
        return jax.vmap(lambda one: spectral_fn(values, one, g))(x)

    def solve(self, y: ArrayLike, ridge: Any = 0.0, *, num_iters: int = 50) -> Array:
        r"""Return ``(A^T A + ridge I)^{-1} A^T y``; ``A^+ y`` with ``ridge = 0``.

        Args:
            y: ``[b, *measurement]``.
            ridge: >= 0, a scalar or ``[b]``.
            num_iters: steps of conjugate gradients, for operators without ``spectral_fn``.

        Examples:
            >>> import jax.numpy as jnp
            >>> downsampling((4, 1, 1), (2, 1)).solve(jnp.ones((1, 2, 1, 1))).ravel().tolist()
            [1.0, 1.0, 1.0, 1.0]
        """
        check_range("LinearOperator.solve", "ridge", ridge, 0)
        back = self.transpose(y)
        ridge = jnp.asarray(ridge, back.dtype)
        if self.spectral_fn is not None:
            values, spectral_fn = self._values(back.dtype), self.spectral_fn
            one = lambda v, c: spectral_fn(values, v, lambda eigenvalue: 1 / (eigenvalue + c))
            return jax.vmap(one)(back, jnp.broadcast_to(ridge, back.shape[:1]))
        damping = expand_right(ridge, back.ndim)
        normal = lambda x: self.normal(x) + damping * x
        return conjugate_gradient(normal, back, jnp.zeros_like(back), num_iters=num_iters)

    def matrix(self, dtype: Any = None) -> Float[Array, "rows dim"]:
        """Return A as a matrix ``[rows, n]`` of flattened measurements and examples."""
        dtype = jnp.result_type(float) if dtype is None else dtype
        size = math.prod(self.data_shape)
        unit = jnp.eye(size, dtype=dtype).reshape(size, *self.data_shape)
        return self.apply(unit).reshape(size, -1).T

    def _abstract(self, dtype: Any) -> jax.ShapeDtypeStruct:
        example = jax.ShapeDtypeStruct(self.data_shape, dtype)
        return jax.eval_shape(lambda x: self.fn(self._values(dtype), x), example)

    def _values(self, dtype: Any) -> PyTree:
        def cast(value: Any) -> Array:
            value = jnp.asarray(value)
            return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value

        return jax.tree.map(cast, self.values)

    def _checked(self, method: str, name: str, x: Any, expected: tuple[int, ...]) -> Array:
        shape = tuple(np.shape(x))
        if len(shape) != len(expected) + 1 or shape[1:] != expected:
            wanted = ", ".join(["b", *map(str, expected)])
            where = f"LinearOperator.{method}"
            fix = "put the batch first; the operator is of other data" if shape else ""
            raise fail(where, f"wrong shape of {name}", f"({wanted})", shape, fix)
        return _real(x)


def _real(x: Any) -> Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def check_measurement(
    where: str, operator: LinearOperator, y: ArrayLike, x: Array | None = None
) -> Array:
    """Return ``y`` in the dtype of x and with its batch, having checked it; x: ``[b, *data]``."""
    expected = operator.measurement_shape
    shape = tuple(np.shape(y))
    lengths = (1,) if x is None else (1, x.shape[0])
    if x is not None and x.shape[1:] != operator.data_shape:
        fix = "build the operator for the examples that the denoiser takes"
        raise fail(
            where, "measurement operator of another shape", operator.data_shape, x.shape[1:], fix
        )
    if shape[1:] != expected or len(shape) != len(expected) + 1:
        wanted = ", ".join(["b", *map(str, expected)])
        fix = "one measurement per example, or y[None] for one that all examples share"
        raise fail(where, "wrong shape of y", f"({wanted})", shape, fix)
    if x is None:
        return jnp.asarray(y)
    if shape[0] not in lengths:
        fix = "one measurement per example, or one with b = 1 that all share"
        raise fail(where, "wrong number of measurements", f"1 or {x.shape[0]}", shape[0], fix)
    return jnp.broadcast_to(jnp.asarray(y, x.dtype), (x.shape[0], *expected))


def measure(
    key: PRNGKey, operator: LinearOperator, x0: ArrayLike, noise_std: Scalar = 0.0
) -> Array:
    """Return ``A x_0 + noise_std n`` with standard normal n: ``[b, *measurement]``.

    Args:
        key: typed random key.
        operator: A.
        x0: ``[b, *data]``.
        noise_std: standard deviation, >= 0.

    Raises:
        ValueError: if the examples have another shape than the operator's, or the noise is
            negative.
    """
    check_range("measure", "noise_std", noise_std, 0, high_open=True)
    y = operator.apply(x0)
    return y + jnp.asarray(noise_std, y.dtype) * jax.random.normal(key, y.shape, y.dtype)


def _gather(index: Array, x: Array) -> Array:
    return x.reshape(-1)[index]


def _mask_spectral(index: Array, v: Array, g: Spectral) -> Array:
    flat = v.reshape(-1)
    kept = jnp.zeros_like(flat).at[index].set(flat[index] * g(jnp.ones((), v.dtype)))
    return kept.reshape(v.shape)


def inpainting(mask: ArrayLike) -> LinearOperator:
    """Return the operator that keeps the entries inside a mask, as a vector ``[m]``.

    Masks of as many entries share one compiled program. ``operator.transpose(y)`` shows the
    measurement as an example with zeros where nothing is known.

    Args:
        mask: ``[*data]`` booleans (or 0 and 1), True where the example is observed, e.g.
            ``~editing.masks.box(...)`` to fill a box. Concrete; see :func:`random_inpainting`
            for masks drawn inside ``jit``.

    Raises:
        ValueError: if nothing is observed, or entries are neither 0 nor 1.
        TypeError: if the mask is traced.

    Examples:
        >>> import jax.numpy as jnp
        >>> inpainting([True, False, True]).apply(jnp.array([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 3.0]]
    """
    if isinstance(mask, Tracer):
        raise TypeError("inpainting: the mask must be concrete; random_inpainting draws in jit.")
    mask = np.asarray(mask)
    inside = mask == 1
    if not np.all(inside | (mask == 0)):
        odd = mask[~(inside | (mask == 0))].ravel()[0]
        raise fail("inpainting", "mask holds other numbers", "booleans, or 0 and 1", odd)
    if not inside.any():
        fix = "True marks what is observed; did you mean ~mask?"
        raise fail("inpainting", "mask is empty", "at least one observed entry", 0, fix)
    index = np.flatnonzero(inside).astype(np.int32)
    return LinearOperator(_gather, mask.shape, jnp.asarray(index), _mask_spectral)


def random_inpainting(key: PRNGKey, data_shape: Sequence[int], num_observed: int) -> LinearOperator:
    """Return the operator that keeps ``num_observed`` entries chosen at random.

    Of pictures ``[h, w, c]`` it keeps that many pixels, each in all channels.

    Args:
        key: typed random key.
        data_shape: ``[*data]``.
        num_observed: how many, >= 1. Static; the choice itself may be traced.

    Raises:
        ValueError: if there are not as many.
    """
    data_shape = tuple(data_shape)
    channels = data_shape[2] if len(data_shape) == 3 else 1
    pixels = math.prod(data_shape) // channels
    check_int("random_inpainting", "num_observed", num_observed)
    if num_observed > pixels:
        raise fail("random_inpainting", "too many observed", f"at most {pixels}", num_observed)
    chosen = jnp.sort(jax.random.permutation(key, pixels)[:num_observed])
    index = (chosen[:, None] * channels + jnp.arange(channels)[None, :]).reshape(-1)
    return LinearOperator(_gather, data_shape, index, _mask_spectral)


def _picture(where: str, data_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(data_shape) != 3:
        fix = "a vector of n numbers is the picture (n, 1, 1)"
        raise fail(where, "not the shape of a picture", "(h, w, c)", tuple(data_shape), fix)
    height, width, channels = data_shape
    return int(height), int(width), int(channels)


@dataclass(frozen=True)
class _BlockMean:
    factor: tuple[int, int]

    def __call__(self, values: Any, x: Array) -> Array:
        del values
        (down, across), (height, width, channels) = self.factor, x.shape
        blocks = x.reshape(height // down, down, width // across, across, channels)
        return blocks.mean((1, 3))


@dataclass(frozen=True)
class _BlockSpectral:
    factor: tuple[int, int]

    def __call__(self, values: Any, v: Array, g: Spectral) -> Array:
        down, across = self.factor
        means = _BlockMean(self.factor)(values, v)
        spread = jnp.repeat(jnp.repeat(means, down, axis=0), across, axis=1)
        return spread * g(jnp.full((), 1 / (down * across), v.dtype))


def downsampling(data_shape: Sequence[int], factor: int | tuple[int, int]) -> LinearOperator:
    """Return the mean over blocks of ``factor`` x ``factor`` pixels: super-resolution's A.

    Args:
        data_shape: ``(h, w, c)``.
        factor: sides of a block, one number or (down, across).

    Raises:
        ValueError: if blocks do not fill the picture.

    Examples:
        >>> downsampling((8, 8, 3), 2).measurement_shape
        (4, 4, 3)
    """
    height, width, _ = shape = _picture("downsampling", data_shape)
    down, across = (factor, factor) if isinstance(factor, int) else factor
    for name, side, block in (("height", height, down), ("width", width, across)):
        check_int("downsampling", "factor", block)
        if side % block:
            got = f"{name} {side} and factor {block}"
            raise fail("downsampling", "blocks do not fill the picture", "a divisor", got)
    return LinearOperator(_BlockMean((down, across)), shape, (), _BlockSpectral((down, across)))


def _transfer(kernel: Array, height: int, width: int) -> Array:
    """The kernel's Fourier transform, its middle at pixel (0, 0): ``[h, w // 2 + 1, 1]``."""
    rows, columns = kernel.shape
    padded = jnp.zeros((height, width), kernel.dtype).at[:rows, :columns].set(kernel)
    centred = jnp.roll(padded, (-(rows // 2), -(columns // 2)), (0, 1))
    return jnp.fft.rfft2(centred)[..., None]


def _circular(kernel: Array, x: Array) -> Array:
    height, width, _ = x.shape
    spectrum = jnp.fft.rfft2(x, axes=(0, 1)) * _transfer(kernel, height, width)
    return jnp.fft.irfft2(spectrum, (height, width), axes=(0, 1)).astype(x.dtype)


def _reflected(kernel: Array, x: Array) -> Array:
    top, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = jnp.pad(x, ((top, top), (left, left), (0, 0)), mode="symmetric")
    return _circular(kernel, padded)[top : top + x.shape[0], left : left + x.shape[1]]


def _circular_spectral(kernel: Array, v: Array, g: Spectral) -> Array:
    height, width, _ = v.shape
    eigenvalues = jnp.abs(_transfer(kernel, height, width)) ** 2
    # Rounding of the transform, relative to the largest, is no information about x.
    there = eigenvalues > (100 * jnp.finfo(v.dtype).eps) ** 2 * jnp.max(eigenvalues)
    gain = jnp.where(there, g(jnp.where(there, eigenvalues, 1)), 0)
    spectrum = jnp.fft.rfft2(v, axes=(0, 1)) * gain
    return jnp.fft.irfft2(spectrum, (height, width), axes=(0, 1)).astype(v.dtype)


def blur(
    data_shape: Sequence[int],
    kernel_or_std: ArrayLike,
    *,
    boundary: str = "circular",
) -> LinearOperator:
    """Return the convolution of each channel with a kernel, or with a Gaussian of a given std.

    Args:
        data_shape: ``(h, w, c)``.
        kernel_or_std: the kernel ``[odd, odd]``, not larger than the picture; or the standard
            deviation in pixels, a Python number > 0, of a Gaussian of sum 1 that is cut at three
            of them and at the picture's size.
        boundary: ``"circular"`` (diagonal in the Fourier basis, so inverses are cheap) or
            ``"reflect"`` (edge pixels repeated).

    Raises:
        ValueError: for a kernel of other size, a std that is not positive, another boundary.

    Examples:
        >>> import jax.numpy as jnp
        >>> mean = blur((4, 4, 1), jnp.full((3, 3), 1 / 9))
        >>> float(mean.apply(jnp.ones((1, 4, 4, 1))).max().round(5))
        1.0
    """
    height, width, _ = shape = _picture("blur", data_shape)
    if boundary not in ("circular", "reflect"):
        raise fail("blur", "unknown boundary", "'circular' or 'reflect'", repr(boundary))
    if isinstance(kernel_or_std, int | float):
        check_range("blur", "std", kernel_or_std, 0, low_open=True, high_open=True)
        kernel = _gaussian(float(kernel_or_std), height, width)
    else:
        kernel = _real(kernel_or_std)
    sides = tuple(kernel.shape)
    odd = len(sides) == 2 and all(side % 2 == 1 for side in sides)
    if not odd or sides[0] > height or sides[1] > width:
        expected = f"[odd, odd] of at most {height} x {width}"
        raise fail("blur", "wrong shape of the kernel", expected, sides)
    if boundary == "reflect":
        return LinearOperator(_reflected, shape, kernel)
    return LinearOperator(_circular, shape, kernel, _circular_spectral)


def _gaussian(std: float, height: int, width: int) -> Array:
    def profile(side: int) -> np.ndarray:
        reach = min(math.ceil(3 * std), (side - 1) // 2)
        values = np.exp(-0.5 * (np.arange(-reach, reach + 1) / std) ** 2)
        return values / values.sum()

    return jnp.asarray(np.outer(profile(height), profile(width)), jnp.result_type(float))


def _product(values: Any, x: Array) -> Array:
    return jnp.matmul(values["a"], x.reshape(-1), precision=_HIGHEST)


def _product_spectral(values: Any, v: Array, g: Spectral) -> Array:
    right, s = values["right"], values["s"]
    there = s > 0
    gain = jnp.where(there, g(jnp.where(there, s, 1) ** 2), 0)
    inside = gain * jnp.matmul(right, v.reshape(-1), precision=_HIGHEST)
    return jnp.matmul(inside, right, precision=_HIGHEST).reshape(v.shape)


def matrix(a: ArrayLike, data_shape: Sequence[int] | None = None) -> LinearOperator:
    """Return the operator of a matrix, with its singular value decomposition.

    Args:
        a: ``[m, n]``, any rank.
        data_shape: shape of the examples, of n numbers; ``(n,)`` if None.

    Raises:
        ValueError: if a is no matrix, or examples have another number of entries.

    Examples:
        >>> import jax.numpy as jnp
        >>> a = matrix(jnp.array([[2.0, 0.0]]))
        >>> a.solve(jnp.array([[6.0]])).tolist()
        [[3.0, 0.0]]
    """
    a = _real(a)
    if a.ndim != 2 or 0 in a.shape:
        raise fail("matrix", "wrong shape of a", "[m, n]", a.shape)
    shape = (a.shape[1],) if data_shape is None else tuple(data_shape)
    if math.prod(shape) != a.shape[1]:
        raise fail("matrix", "a takes other examples", f"{a.shape[1]} numbers each", shape)
    _, s, right = jnp.linalg.svd(a, full_matrices=False)
    s = jnp.where(s > jnp.finfo(s.dtype).eps * max(a.shape) * s[0], s, 0)
    values = {"a": a, "right": right, "s": s}
    return LinearOperator(_product, shape, values, _product_spectral)
