r"""A stride-1 SAME convolution with derivatives that stay fast inside ``scan`` on a CPU.

With zero padding of half the (odd) kernel, write the trilinear form

.. math:: T(x, w, g) = \sum_{b,p,s} g_{b,p,o}\, x_{b,p+s,i}\, w_{s,i,o}.

Fixing two of its arguments gives three linear maps: the convolution ``y(x, w)``, its transpose in
``x`` (again a convolution, of ``g`` with the flipped kernel), and its transpose in ``w`` (a
correlation of ``x`` with ``g``, the *kernel gradient*). Every derivative of every order of one is a
sum of the others.

XLA:CPU runs a convolution outside the entry computation (in ``scan``, ``while``, ``cond``) through
its fast kernel only in the order NHWC x HWIO -> NHWC (jax-ml/jax issue 12868). The transposes that
autodiff writes are not in that order and are tens of times slower. A ``custom_vjp`` could fix the
gradient but would forbid ``jvp``, which Jacobian tools need; so the two bilinear maps are two
primitives whose transposes are each other. They have ``jvp``, ``vjp``, ``vmap``, ``jit``,
``shard_map`` and derivatives of any order.

On a CPU the kernel gradient is written as a forward convolution with batch and channels exchanged;
on other platforms it is the transpose that jax itself writes, which their compilers recognise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, Float

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_WHOLE = PartitionSpec(None, None, None, None)


def conv(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "b h w o"]:
    """Return the SAME convolution (as in deep learning: a correlation) of ``x`` with ``kernel``.

    Args:
        x: ``[b, h, w, channels_in]``.
        kernel: ``[kh, kw, channels_in, channels_out]`` with odd ``kh`` and ``kw``, in the dtype of
            ``x``.

    Raises:
        ValueError: if a kernel side is even.
    """
    kh, kw = kernel.shape[:2]
    if kh % 2 == 0 or kw % 2 == 0:
        raise fail("conv", "even kernel", "odd kernel sides", (kh, kw))
    if (kh, kw) == (1, 1):
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    return _conv(x, kernel)


def _conv(x: Any, kernel: Any) -> Any:
    return _conv_p.bind(*_vary_alike(x, kernel))


def _kernel_grad(x: Any, g: Any, size: tuple[int, int]) -> Any:
    return _kernel_grad_p.bind(*_vary_alike(x, g), size=size)


def _vary_alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Mark both as varying over the same mesh axes, as ``shard_map`` wants of operands."""
    axes_a, axes_b = jax.typeof(a).mat.varying, jax.typeof(b).mat.varying
    if axes_b - axes_a:
        a = jax.lax.pcast(a, tuple(axes_b - axes_a), to="varying")
    if axes_a - axes_b:
        b = jax.lax.pcast(b, tuple(axes_a - axes_b), to="varying")
    return a, b


def _padding(kh: int, kw: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (kh // 2, kh // 2), (kw // 2, kw // 2)


# --- values -------------------------------------------------------------------------------------


def _conv_value(x: Any, kernel: Any) -> Any:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), _padding(*kernel.shape[:2]), dimension_numbers=_DIMENSIONS
    )


def _replicated(x: Any) -> NamedSharding | None:
    """Return what the type of a kernel gradient says under a mesh with Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding.update(spec=_WHOLE) if sharding.mesh.explicit_axes else None


def _kernel_grad_exchanged(x: Any, g: Any, *, size: tuple[int, int]) -> Any:
    """Kernel gradient as a forward convolution: channels of ``x`` as batch, batch as channels."""
    rows = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        _padding(*size),
        dimension_numbers=_DIMENSIONS,
        out_sharding=_replicated(x),
    )
    return rows.transpose(1, 2, 0, 3)


def _kernel_grad_transposed(x: Any, g: Any, *, size: tuple[int, int]) -> Any:
    """Kernel gradient as jax itself writes it."""
    kernel = jax.ShapeDtypeStruct((*size, x.shape[3], g.shape[3]), x.dtype, sharding=_replicated(x))
    return jax.linear_transpose(lambda k: _conv_value(x, k), kernel)(g)[0]


def _windows(x: Any, size: tuple[int, int]) -> Any:
    """Return ``[kh, kw, b, h, w, i]``: ``x`` shifted under each kernel entry."""
    (kh, kw), (h, w) = size, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *_padding(kh, kw), (0, 0)))
    return jnp.stack(
        [jnp.stack([padded[:, r : r + h, c : c + w] for c in range(kw)]) for r in range(kh)]
    )


def _conv_by_products(x: Any, kernel: Any) -> Any:
    return jnp.einsum("rcbhwi,rcio->bhwo", _windows(x, kernel.shape[:2]), kernel)


def _kernel_grad_by_products(x: Any, g: Any, size: tuple[int, int]) -> Any:
    return jnp.einsum("rcbhwi,bhwo->rcio", _windows(x, size), g)


# --- primitives ---------------------------------------------------------------------------------

_conv_p = Primitive("lowdim_conv")
_kernel_grad_p = Primitive("lowdim_conv_kernel_grad")

_conv_p.def_abstract_eval(lambda x, k: x.update(shape=(*x.shape[:3], k.shape[3])))
_kernel_grad_p.def_abstract_eval(
    lambda x, g, *, size: x.update(
        shape=(*size, x.shape[3], g.shape[3]),
        sharding=x.sharding.update(spec=_WHOLE),
    )
)
_conv_p.def_impl(jax.jit(_conv_value))
_kernel_grad_p.def_impl(
    jax.jit(
        lambda x, g, *, size: _kernel_grad_p.bind(x, g, size=size),
        static_argnames="size",
    )
)
mlir.register_lowering(_conv_p, mlir.lower_fun(_conv_value, multiple_results=False))
mlir.register_lowering(
    _kernel_grad_p, mlir.lower_fun(_kernel_grad_transposed, multiple_results=False)
)
mlir.register_lowering(
    _kernel_grad_p, mlir.lower_fun(_kernel_grad_exchanged, multiple_results=False), platform="cpu"
)


def _flip(kernel: Any) -> Any:
    """Return the kernel of the transposed convolution."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


ad.defbilinear(
    _conv_p,
    lambda ct, x, kernel: _conv(ct, _flip(kernel)),
    lambda ct, x, kernel: _kernel_grad(x, ct, kernel.aval.shape[:2]),
)
ad.defbilinear(
    _kernel_grad_p,
    lambda ct, x, g, *, size: _conv(g, _flip(ct)),
    lambda ct, x, g, *, size: _conv(x, ct),
)


def _fold(x: Any, dim: int, into: int) -> Any:
    """Merge the mapped axis ``dim``, as slow index, into ``into`` (numbered without it)."""
    x = jnp.moveaxis(x, dim, into)
    return x.reshape(*x.shape[:into], -1, *x.shape[into + 2 :])


def _unfold(x: Any, size: int, axis: int) -> Any:
    """Undo ``_fold``: split ``axis`` and move the mapped axis to the front."""
    x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _conv_batched(args: Any, dims: Any) -> tuple[Any, int]:
    (x, kernel), (x_dim, k_dim) = args, dims
    if k_dim is None:
        return _unfold(_conv(_fold(x, x_dim, 0), kernel), x.shape[x_dim], 0), 0
    if x_dim is None:
        return _unfold(_conv(x, _fold(kernel, k_dim, 3)), kernel.shape[k_dim], 3), 0
    return jax.vmap(_conv_by_products, dims)(x, kernel), 0


def _kernel_grad_batched(args: Any, dims: Any, *, size: tuple[int, int]) -> tuple[Any, int]:
    (x, g), (x_dim, g_dim) = args, dims
    if g_dim is None:
        return _unfold(_kernel_grad(_fold(x, x_dim, 3), g, size), x.shape[x_dim], 2), 0
    if x_dim is None:
        return _unfold(_kernel_grad(x, _fold(g, g_dim, 3), size), g.shape[g_dim], 3), 0
    return jax.vmap(lambda a, b: _kernel_grad_by_products(a, b, size), dims)(x, g), 0


batching.primitive_batchers[_conv_p] = _conv_batched
batching.primitive_batchers[_kernel_grad_p] = _kernel_grad_batched
