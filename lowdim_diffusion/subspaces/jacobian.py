r"""The Jacobian of a denoiser, known only by its products: singular triplets, norm, symmetry.

The Jacobian ``J = d x0_hat / d x_t`` of the posterior mean is ``(alpha / sigma^2) Cov[x_0 | x_t]``:
its leading singular vectors span the directions in which the clean image can still change, and its
rank counts them. For data near a union of subspaces the rank is small except at the lowest noise.

Everything here takes a batched function ``fn: [b, *data] -> [b, *out]`` that treats each example
alone, as a denoiser with its time bound does (examples may have times of their own), and never
forms more than it returns: one linearization is shared by all vectors and all examples.

References:
    Chen et al. 2024, arXiv 2409.02374 (masked Jacobians, power method);
    Musco & Musco 2015, arXiv 1504.05477 (block Krylov methods).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, Float, Int, PRNGKey
from lowdim_diffusion.linalg import block_krylov, orthonormalize
from lowdim_diffusion.sharding import vary_like

_CHUNK_BYTES = 2**26
"""Largest array of a pass by default; all of a U-Net's pass is then about 1 GiB."""


class JacobianInfo(NamedTuple):
    """How the iteration of :func:`jacobian_svd` ended."""

    change: Float[Array, " b"]
    """Sine by which the leading subspace still turned at the end; converged if <= tol."""
    num_iters: Int[Array, ""]
    """Iterations run, the same for the whole batch."""
    residual: Float[Array, "b rank"]
    """``||J v_i - s_i u_i|| / s_1`` of each triplet; its ``s_i`` is that close to a singular value
    of J, in units of the largest."""


def _linearize(
    where: str,
    fn: Callable[[Array], Array],
    x: Array,
    mask: Any = None,
    chunk: int | None = None,
    symmetric: bool = False,
) -> tuple[Any, Any, int, tuple[int, ...]]:
    """Products of the flattened Jacobian with ``[b, n, w]`` and of its transpose, off one pass.

    With ``symmetric``, of its symmetric part.
    """
    inside = None if mask is None else _inside(where, mask, jax.eval_shape(fn, x).shape)
    masked = fn if inside is None else lambda x: jnp.where(inside, fn(x), 0)
    y, jvp = jax.linearize(masked, x)
    if y.ndim == 0 or y.shape[0] != x.shape[0]:
        raise fail(where, "fn must keep the batch axis", f"({x.shape[0]}, ...)", y.shape)
    transposed = jax.linear_transpose(jvp, x)
    if chunk is None:
        chunk = max(1, _CHUNK_BYTES // _largest(jax.make_jaxpr(jvp)(x).jaxpr))
    wide = jnp.promote_types(x.dtype, jnp.float32)  # QR and SVD know no half precision

    def columns(product: Callable[[Array], Array], like: Array) -> Callable[[Array], Array]:
        def run(v: Array) -> Array:
            v = jnp.moveaxis(v, -1, 0)
            v = vary_like(v.reshape(v.shape[:1] + like.shape).astype(like.dtype), like)
            # Equal batches: a remainder would be compiled as a second program.
            count = math.ceil(len(v) / chunk)
            size = math.ceil(len(v) / max(count, 1))
            if count > 1:
                filled = jnp.concatenate([v, jnp.zeros_like(v[: count * size - len(v)])])
                out = jax.lax.map(product, filled, batch_size=size)[: len(v)]
            else:
                out = jax.vmap(product)(v)
            return jnp.moveaxis(out.reshape((*out.shape[:2], -1)), 0, -1).astype(wide)

        return run

    dim = math.prod(x.shape[1:])
    if symmetric:
        if mask is not None or math.prod(y.shape[1:]) != dim:
            expected = "as many outputs as inputs, and no mask"
            raise fail(where, "the Jacobian has no symmetric part", expected, y.shape[1:])
        half = lambda v: (jvp(v).reshape(x.shape) + transposed(v.reshape(y.shape))[0]) / 2
        product = columns(half, x)
        return product, product, dim, y.shape
    matmat = columns(jvp, x)
    rmatmat = columns(lambda v: transposed(v)[0], y)
    return matmat, rmatmat, dim, y.shape


def _largest(jaxpr: core.Jaxpr) -> int:
    """Bytes of the largest array that a program makes."""
    sizes = [1]
    for equation in jaxpr.eqns:
        arrays: list[Any] = [v.aval for v in equation.outvars]
        sizes += [math.prod(a.shape) * a.dtype.itemsize for a in arrays if hasattr(a, "shape")]
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        sizes += [_largest(getattr(j, "jaxpr", j)) for j in inner if _is_jaxpr(j)]
    return max(sizes)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _inside(where: str, mask: Any, out_shape: tuple[int, ...]) -> Any:
    """``[1 or b, *out]``, true where the mask is not zero; numpy's if its entries are known."""
    mask = np.asarray(mask) if not hasattr(mask, "dtype") or is_concrete(mask) else mask
    if mask.shape not in (out_shape, out_shape[1:]):
        expected = f"{out_shape[1:]}, or {out_shape} for one per example"
        raise fail(where, "wrong shape of mask", expected, mask.shape)
    inside = mask != 0
    return inside if mask.shape == out_shape else inside[None]


def jacobian_svd(
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    rank: int,
    *,
    key: PRNGKey,
    mask: Any = None,
    start: Float[Array, "b r n"] | None = None,
    max_iters: int = 50,
    tol: float = 1e-4,
    oversample: int = 8,
    chunk: int | None = None,
    symmetric: bool = False,
    return_info: bool = False,
) -> Any:
    r"""Return the leading singular triplets of the Jacobian of ``fn`` at each example of ``x``.

    A block Krylov space on one ``jax.linearize`` of ``fn``, transposed once, all vectors of all
    examples batched; the Jacobian is never formed. Stops when every example's leading right
    subspace turns by less than ``tol`` (see :func:`lowdim_diffusion.linalg.block_krylov`), which
    does not depend on signs or on rotations inside equal singular values.

    Args:
        fn: ``[b, *data] -> [b, *out]``, each example alone, e.g. ``lambda x: denoise_fn(x, t)``.
        x: ``[b, *data]``, where to differentiate.
        rank: number of triplets, 1 <= rank <= min(n, out) of the flattened sizes, and at most the
            number of entries in ``mask``.
        key: draws the start block, the same for every example, so results do not depend on the
            rest of the batch but for the common number of iterations.
        mask: ``[*out]`` or ``[b, *out]``, entries of the output to look at: the Jacobian of
            ``P_Omega fn``. u is zero elsewhere; v lives in the whole input. None takes all.
        start: ``[b, r, n]``, independent rows to begin with, such as the ``vt`` of a neighbouring
            noise level; at most ``rank + oversample - 1`` are used, and random ones fill up. Where
            they are not finite all are random.
        max_iters: bound on iterations; each costs ``rank + oversample`` forward and as many
            reverse products per example.
        tol: sine of the angle by which the subspace still turns in one iteration. Singular values
            are accurate to about the square of the angle that is left, which is larger where they
            decay slowly; ``residual`` bounds it in any case.
        oversample: extra vectors that speed up convergence.
        chunk: vectors pushed through at once, to bound the memory of the network's pass. None takes
            as many as keep its largest array within 64 MiB, and so all of a U-Net's near 1 GiB; all
            ``rank + oversample`` together for small images.
        symmetric: take ``(J + J^T) / 2``, without a mask; see :func:`jacobian_asymmetry`.
        return_info: also return :class:`JacobianInfo`, which says whether it converged (and costs
            ``rank`` forward products more).

    Returns:
        ``(u, s, vt)``: ``u [b, out, rank]``, ``s [b, rank]`` descending, ``vt [b, rank, n]``, over
        flattened data; with ``return_info`` ``((u, s, vt), info)``. Signs, and directions inside
        equal singular values, are arbitrary. Not differentiable.

    Raises:
        ValueError: if ``rank`` exceeds the Jacobian's sides or the mask, ``fn`` changes the batch
            axis, or ``mask`` or ``start`` does not fit.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([5.0, 3.0, 1.0, 0.0])
        >>> fn, x, key = lambda x: x * scale[None], jnp.ones((2, 4)), jax.random.key(0)
        >>> u, s, vt = jacobian_svd(fn, x, 2, key=key)
        >>> bool(jnp.allclose(s, jnp.array([[5.0, 3.0]] * 2)))
        True
        >>> u, s, vt = jacobian_svd(fn, x, 1, key=key, mask=jnp.array([0, 1, 1, 0]))
        >>> bool(jnp.allclose(s, 3.0))
        True

    References:
        Chen et al. 2024, arXiv 2409.02374, algorithm 1 (generalized power method, the same idea).
    """
    where = "jacobian_svd"
    check_int(where, "rank", rank)
    check_int(where, "oversample", oversample, low=0)
    if chunk is not None:
        check_int(where, "chunk", chunk)
    matmat, rmatmat, dim, out_shape = _linearize(where, fn, x, mask, chunk, symmetric)
    largest = min(dim, math.prod(out_shape[1:]))
    if rank > largest:
        raise fail(where, "rank too large", f"at most {largest}, min(n, out)", rank)
    inside = None if mask is None else _inside(where, mask, out_shape)
    if isinstance(inside, np.ndarray):
        count = int(inside.reshape(len(inside), -1).sum(1).min())
        if rank > count:
            expected = f"at most {count}, the entries inside the mask"
            raise fail(where, "rank too large", expected, rank, "widen the mask or lower the rank")
    block = _start_block(where, key, start, min(rank + oversample, largest), x, dim)
    found = block_krylov(matmat, rmatmat, block, rank=rank, max_iters=max_iters, tol=tol)
    svd = (found.u, found.s, jnp.swapaxes(found.v, -1, -2))
    if not return_info:
        return svd
    missed = jnp.linalg.norm(matmat(found.v) - found.u * found.s[:, None], axis=1)
    largest_s = jnp.where(found.s[:, :1] > 0, found.s[:, :1], 1)
    return svd, JacobianInfo(found.change, found.num_iters, missed / largest_s)


def _start_block(
    where: str, key: PRNGKey, start: Array | None, width: int, x: Array, dim: int
) -> Array:
    """``[b, n, width]``: the rows given, filled up with random vectors across them."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    block = jax.random.normal(key, (1, dim, width), dtype)
    block = vary_like(jnp.broadcast_to(block, (x.shape[0], dim, width)), x)
    if start is None:
        return block
    if start.ndim != 3 or start.shape[0] != x.shape[0] or start.shape[2] != dim:
        expected = f"[b, r, n] = ({x.shape[0]}, r, {dim})"
        raise fail(where, "wrong shape of start", expected, start.shape, "vt of an earlier call")
    # A random column stays: from an invariant subspace no other direction would ever be seen.
    given = jnp.swapaxes(start, -1, -2).astype(dtype)[..., : max(width - 1, 1)]
    sound = jnp.all(jnp.isfinite(given), axis=(1, 2), keepdims=True)
    given = jnp.where(sound, given, block[..., : given.shape[-1]])
    return jnp.concatenate([given, block[..., given.shape[-1] :]], axis=-1)


def jacobian_spectrum(
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    *,
    mask: Any = None,
    chunk: int = 64,
    symmetric: bool = False,
) -> Float[Array, "b m"]:
    """Return all ``m = min(n, out)`` singular values of the Jacobian of ``fn`` at each example.

    Builds the dense Jacobian from basis vectors of its shorter side, ``chunk`` at a time off one
    linearization, then takes its singular values: memory ``b n out``, time ``b n out min(n, out)``.
    For n beyond a few thousand use :func:`jacobian_svd`.

    Args:
        fn: ``[b, *data] -> [b, *out]``, each example alone.
        x: ``[b, *data]``.
        mask: ``[*out]`` or ``[b, *out]``, entries of the output to look at; None takes all.
        chunk: vectors pushed through at once; bounds the memory of the network's pass.
        symmetric: take ``(J + J^T) / 2``, without a mask.

    Returns:
        ``[b, m]``, descending.

    Examples:
        >>> import jax.numpy as jnp
        >>> jacobian_spectrum(lambda x: x**2, jnp.array([[1.0, 3.0]])).tolist()
        [[6.0, 2.0]]
    """
    where = "jacobian_spectrum"
    check_int(where, "chunk", chunk)
    matmat, rmatmat, dim, out_shape = _linearize(where, fn, x, mask, chunk, symmetric)
    out = math.prod(out_shape[1:])
    product, side = (matmat, dim) if dim <= out else (rmatmat, out)

    def column(i: Array) -> Array:
        unit = jax.nn.one_hot(i, side, dtype=jnp.promote_types(x.dtype, jnp.float32))
        return product(jnp.broadcast_to(unit[None, :, None], (x.shape[0], side, 1)))[..., 0]

    jacobian = jax.lax.map(column, jnp.arange(side), batch_size=min(chunk, side))
    return jnp.linalg.svd(jnp.moveaxis(jacobian, 0, -1), compute_uv=False)


def jacobian_frobenius(
    key: PRNGKey,
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    *,
    num_probes: int = 32,
    mask: Any = None,
    without: Float[Array, "b r n"] | None = None,
) -> Float[Array, " b"]:
    r"""Return an estimate of the Frobenius norm of the Jacobian of ``fn`` at each example.

    .. math:: \|J\|_F^2 = n\, E\|J z\|^2, \qquad z \text{ uniform on the unit sphere},

    averaged over ``num_probes`` vectors that are uniform on the sphere and mutually orthogonal
    (columns of a random frame): never noisier than independent ones, and exact, being a whole
    basis, from ``num_probes = n`` on. The square of the result is unbiased.

    Args:
        key: draws the probes, the same for every example.
        fn: ``[b, *data] -> [b, *out]``, each example alone.
        x: ``[b, *data]``.
        num_probes: forward products per example; more than n count as n.
        mask: ``[*out]`` or ``[b, *out]``, entries of the output to look at; None takes all.
        without: ``[b, r, n]`` orthonormal rows V: the norm of ``J (I - V^T V)``. With the leading
            right singular vectors this is the tail, and ``sqrt(sum s_i^2 + tail^2)`` is a far less
            noisy estimate of the whole.

    Returns:
        ``[b]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda x: x * jnp.array([[3.0, 4.0]])
        >>> jacobian_frobenius(jax.random.key(0), fn, jnp.ones((1, 2)), num_probes=2).tolist()
        [5.0]

    References:
        Hutchinson 1990 (probes); Meyer et al. 2021, arXiv 2010.09649 (without the leading part);
        Li et al. 2024, arXiv 2410.21088 (the identity for a denoiser).
    """
    where = "jacobian_frobenius"
    check_int(where, "num_probes", num_probes)
    matmat, _, dim, _ = _linearize(where, fn, x, mask)
    z = _probes(key, x, dim, num_probes)
    if without is not None:
        if without.shape[::2] != (x.shape[0], dim):
            expected = f"[b, r, n] = ({x.shape[0]}, r, {dim})"
            raise fail(where, "wrong shape of without", expected, without.shape)
        mm = lambda a, b: jnp.matmul(a, b, precision="highest")
        z = z - mm(jnp.swapaxes(without, 1, 2), mm(without, z)).astype(z.dtype)
    return jnp.sqrt(dim * jnp.mean(jnp.sum(matmat(z) ** 2, axis=1), axis=-1))


def jacobian_asymmetry(
    key: PRNGKey,
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    *,
    num_probes: int = 32,
) -> Float[Array, " b"]:
    r"""Return ``||J - J^T||_F / ||J + J^T||_F`` of the Jacobian of ``fn`` at each example.

    The Jacobian of every exact denoiser is symmetric (it is a covariance up to scale), that of a
    network only as far as it has learned to be: 0 is symmetric, 1 typical of a matrix with
    independent entries, infinity antisymmetric. Subspaces read off an asymmetric Jacobian are not
    those of the data's density: in the gauge of :func:`gauged` at strength c the right singular
    vectors turn by about c, those of the symmetric part (``jacobian_svd(..., symmetric=True)``) by
    half of that, the left ones by c squared. Their number stays.

    Args:
        key: draws the probes, as in :func:`jacobian_frobenius`.
        fn: ``[b, *data] -> [b, *data]``, each example alone.
        x: ``[b, *data]``.
        num_probes: forward and reverse products per example; exact from n on.

    Returns:
        ``[b]``, at least 0; 0 for a Jacobian that is zero.

    Raises:
        ValueError: if output and input differ in size.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> turn = lambda x: jnp.stack([x[:, 0] + x[:, 1], x[:, 1]], axis=1)
        >>> float(jacobian_asymmetry(jax.random.key(0), turn, jnp.ones((1, 2)))[0])
        0.447...

    References:
        Horvat & Pfister 2024 (what asymmetry does to local geometry); Chen et al. 2024, arXiv
        2409.02374 (symmetry of learned Jacobians).
    """
    where = "jacobian_asymmetry"
    check_int(where, "num_probes", num_probes)
    matmat, rmatmat, dim, out_shape = _linearize(where, fn, x)
    if math.prod(out_shape[1:]) != dim:
        raise fail(where, "the Jacobian is not square", f"outputs of size {dim}", out_shape)
    z = _probes(key, x, dim, num_probes)
    forward, backward = matmat(z), rmatmat(z)
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axis=(1, 2)))
    odd, even = norm(forward - backward), norm(forward + backward)
    return jnp.where(odd + even == 0, 0, odd / jnp.where(odd + even == 0, 1, even))


def _probes(key: PRNGKey, x: Array, dim: int, count: int) -> Array:
    """``[b, n, count]``: orthonormal columns, the same for every example."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frame = orthonormalize(jax.random.normal(key, (dim, min(count, dim)), dtype))
    return jnp.broadcast_to(frame[None], (x.shape[0], *frame.shape))
