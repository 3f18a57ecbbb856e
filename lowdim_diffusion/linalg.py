r"""Small linear algebra that the rest builds on: frames, projectors, polar factors.

A *frame* is an array ``[..., dim, rank]`` with orthonormal columns; it stands for the subspace
that its columns span. Everything here broadcasts over leading axes and keeps the dtype.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail, is_concrete
from lowdim_diffusion._types import Array, Float, Int, PRNGKey

_HIGHEST = jax.lax.Precision.HIGHEST


def expand_right(a: Any, ndim: int) -> Array:
    """Return ``a`` with trailing axes of length 1 appended until it has ``ndim`` axes.

    Times and scales of shape ``()`` or ``[b]`` then broadcast against examples ``[b, *data]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> expand_right(jnp.ones(4), 3).shape
        (4, 1, 1)
        >>> expand_right(2.0, 3).shape
        ()
    """
    a = jnp.asarray(a)
    return a if a.ndim == 0 else a.reshape(a.shape + (1,) * (ndim - a.ndim))


def orthonormalize(a: Float[Array, "*k dim rank"]) -> Float[Array, "*k dim rank"]:
    r"""Return the orthonormal factor Q of ``a = QR`` with a positive diagonal of R.

    With that sign convention Q is a smooth function of a full-rank ``a``, and a Gaussian ``a``
    gives a uniformly distributed frame (Mezzadri 2007, math-ph/0609050). A rank-deficient ``a``
    gives a frame whose surplus directions are arbitrary.

    Args:
        a: ``[..., dim, rank]`` with ``dim >= rank``.

    Raises:
        ValueError: if there are more columns than rows.
    """
    if a.shape[-2] < a.shape[-1]:
        raise fail("orthonormalize", "too many columns", f"at most {a.shape[-2]}", a.shape[-1])
    q, r = jnp.linalg.qr(a)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    sign = jnp.where(diagonal < 0, -1, 1).astype(a.dtype)
    return q * sign[..., None, :]


def column_space(a: Float[Array, "*k dim rank"]) -> Float[Array, "*k dim m"]:
    r"""Return an orthonormal basis of the column space, padded with zero columns.

    Zero and dependent columns of ``a`` add no dimension: that many of the ``m = min(dim, rank)``
    returned columns are zero, the last ones. Scales do not matter, neither that of ``a`` nor those
    of its columns. The basis is ``A W`` with ``W = V S^{-1}`` from the singular value decomposition
    of ``A`` with unit columns; among all bases of the moving space the derivative is that of the
    one which does not turn inside it,

    .. math:: dU = (I - U U^T)\, dA\, W,

    so that what depends on the space alone has its true gradient, also where singular values
    coincide, and a finite one where columns are zero or dependent.

    Args:
        a: ``[..., dim, rank]``, any columns, in any number.

    Examples:
        >>> import jax.numpy as jnp
        >>> abs(column_space(jnp.array([[3.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=-2, keepdims=True))
    a = jnp.where(largest == 0, 0, a / jnp.where(largest == 0, 1, largest))
    norm = jax.lax.stop_gradient(jnp.linalg.norm(a, axis=-2, keepdims=True))
    return _column_space(a / jnp.where(norm == 0, 1, norm))[0]


@jax.custom_jvp
def _column_space(a: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(a)
    left, s, right = jnp.linalg.svd(r, full_matrices=False)
    tol = 10 * max(a.shape[-2:]) * jnp.finfo(s.dtype).eps
    there = ~(s <= tol * s[..., :1])[..., None, :]  # NaN stays
    u = jnp.where(there, jnp.matmul(q, left, precision=_HIGHEST), 0)
    w = jnp.where(there, jnp.swapaxes(right, -1, -2) / jnp.where(there, s[..., None, :], 1), 0)
    return u, w


@_column_space.defjvp
def _column_space_jvp(primals: tuple[Any], tangents: tuple[Any]) -> Any:
    u, w = _column_space(*primals)
    mm = lambda x, y: jnp.matmul(x, y, precision=_HIGHEST)
    moved = mm(tangents[0], w)
    inside = mm(jnp.swapaxes(u, -1, -2), moved)
    return (u, w), (moved - mm(u, inside), -mm(w, inside))


def check_frames(where: str, name: str, bases: Any) -> None:
    """Raise unless the columns of concrete ``bases [..., dim, rank]`` are orthonormal or zero.

    Zero columns stand for directions that a frame does not have. Inside ``jit`` values are not
    known, and nothing is checked.
    """
    if not is_concrete(bases):
        return
    frames = np.asarray(bases, np.float64)
    gram = np.swapaxes(frames, -1, -2) @ frames
    here = np.any(frames != 0, axis=-2)
    error = np.abs(gram - here[..., None, :] * np.eye(frames.shape[-1])).max(initial=0)
    if not error < 1e-3:
        expected = "orthonormal columns (or zero ones)"
        fix = "linalg.orthonormalize makes a frame of independent columns"
        raise fail(where, f"{name} is no frame", expected, f"U^T U off by {error:.2g}", fix)


def random_frames(
    key: PRNGKey,
    num_components: int,
    dim: int,
    rank: int,
    *,
    orthogonal: bool = False,
    dtype: Any = jnp.float32,
) -> Float[Array, "num_components dim rank"]:
    """Return ``num_components`` uniformly random frames, mutually orthogonal if asked.

    Args:
        key: typed random key.
        num_components: K.
        dim: ambient dimension n.
        rank: subspace dimension d <= n.
        orthogonal: make the subspaces mutually orthogonal, which needs ``K d <= n``.
        dtype: floating dtype of the result.

    Examples:
        >>> import jax
        >>> random_frames(jax.random.key(0), 2, 48, 6, orthogonal=True).shape
        (2, 48, 6)
    """
    check_int("random_frames", "num_components", num_components)
    check_int("random_frames", "rank", rank)
    if rank > dim:
        raise fail("random_frames", "rank too large", f"at most dim = {dim}", rank)
    if not orthogonal:
        return orthonormalize(jax.random.normal(key, (num_components, dim, rank), dtype))
    if num_components * rank > dim:
        raise fail(
            "random_frames",
            "no room for mutually orthogonal subspaces",
            f"num_components * rank <= dim = {dim}",
            num_components * rank,
            "lower the rank or pass orthogonal=False",
        )
    joint = orthonormalize(jax.random.normal(key, (dim, num_components * rank), dtype))
    return joint.reshape(dim, num_components, rank).transpose(1, 0, 2)


def project(basis: Float[Array, "*k dim rank"], x: Float[Array, "*b dim"]) -> Array:
    """Return ``U U^T x`` for each vector ``x: [..., dim]``, without forming the projector.

    Leading axes of ``basis`` and ``x`` broadcast against each other.
    """
    coefficients = jnp.einsum("...nd,...n->...d", basis, x, precision=_HIGHEST)
    return jnp.einsum("...nd,...d->...n", basis, coefficients, precision=_HIGHEST)


def polar(a: Float[Array, "*k dim rank"]) -> Float[Array, "*k dim rank"]:
    r"""Return the orthonormal factor of the polar decomposition, the frame nearest to ``a``.

    ``polar(A) = A (A^T A)^{-1/2}`` minimises ``||A - Q||_F`` over orthonormal Q. Its derivative is
    written out below because differentiating the SVD breaks down when singular values coincide,
    which they do at every orthonormal A:

    .. math:: dQ = Q V [ (V^T (Q^T dA - dA^T Q) V)_{ij} / (s_i + s_j) ] V^T + (I - QQ^T) dA P^{-1}.

    Args:
        a: ``[..., dim, rank]`` of full column rank, ``dim >= rank``.
    """
    if a.shape[-2] < a.shape[-1]:
        raise fail("polar", "too many columns", f"at most {a.shape[-2]}", a.shape[-1])
    return _polar(a)


@jax.custom_jvp
def _polar(a: Array) -> Array:
    u, _, vt = jnp.linalg.svd(a, full_matrices=False)
    return jnp.matmul(u, vt, precision=_HIGHEST)


@_polar.defjvp
def _polar_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    (a,), (da,) = primals, tangents
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    mm = lambda x, y: jnp.matmul(x, y, precision=_HIGHEST)
    t = lambda x: jnp.swapaxes(x, -1, -2)
    q = mm(u, vt)
    b = mm(t(u), mm(da, t(vt)))  # in the singular frames: U^T dA V
    tiny = jnp.finfo(a.dtype).tiny
    inner = (b - t(b)) / jnp.maximum(s[..., :, None] + s[..., None, :], tiny)
    normal = da - mm(q, mm(t(q), da))
    outer = mm(mm(normal, t(vt)) / jnp.maximum(s, tiny)[..., None, :], vt)
    return q, mm(u, mm(inner, vt)) + outer


def conjugate_gradient(
    matvec: Callable[[Array], Array],
    b: Float[Array, "b *data"],
    x: Float[Array, "b *data"],
    *,
    num_iters: int,
) -> Float[Array, "b *data"]:
    r"""Return ``x`` after ``num_iters`` steps of conjugate gradients towards ``M x = b``.

    M is symmetric and positive semi-definite, and acts on each example alone: every example has its
    own step lengths. One whose residual is rounding, or whose direction M sees as no more than
    rounding, stays where it is: there may be more steps than M has rank, and ``b`` may lie partly
    outside of its range. Gradients pass through the steps.

    Args:
        matvec: ``[b, *data] -> [b, *data]``, the product with M.
        b: ``[b, *data]``.
        x: ``[b, *data]``, where to start.
        num_iters: number of steps, each with one product, and one more at the start.

    Examples:
        >>> import jax.numpy as jnp
        >>> twice = lambda x: 2 * x
        >>> b = jnp.ones((1, 3))
        >>> conjugate_gradient(twice, b, 0 * b, num_iters=10).tolist()
        [[0.5, 0.5, 0.5]]
    """
    check_int("conjugate_gradient", "num_iters", num_iters)
    axes = tuple(range(1, b.ndim))
    dot = lambda u, v: jnp.sum(u * v, axes, keepdims=True)
    residual = b - matvec(x)
    square = dot(residual, residual)
    scale = jax.lax.stop_gradient(dot(b, b) + square)
    eps = jnp.finfo(b.dtype).eps

    def step(state: Any, _: Any) -> tuple[Any, None]:
        x, residual, direction, square, largest = state
        moved = matvec(direction)
        curvature, length = dot(direction, moved), dot(direction, direction)
        going = (square > eps**2 * scale) & (curvature > 10 * eps * largest * length)
        ratio = lambda top, bottom: jnp.where(going, top / jnp.where(going, bottom, 1), 0)
        x = x + ratio(square, curvature) * direction
        residual = residual - ratio(square, curvature) * moved
        new = dot(residual, residual)
        direction = residual + ratio(new, square) * direction
        largest = jax.lax.stop_gradient(jnp.maximum(largest, ratio(curvature, length)))
        return (x, residual, direction, new, largest), None

    start = (x, residual, residual, square, 0 * scale)
    return jax.lax.scan(step, start, length=num_iters)[0][0]


def gmres(
    matvec: Callable[[Array], Array], b: Float[Array, "b *data"], *, num_iters: int
) -> Float[Array, "b *data"]:
    r"""Return the ``x`` of least ``||b - M x||`` in ``span(b, M b, ..., M^{k-1} b)``: full GMRES.

    M need not be symmetric nor positive, and acts on each example alone; the residual never grows
    with ``k = num_iters``. It holds ``k + 1`` vectors, made orthogonal twice, for which Krylov
    directions that are rounding are left out. Gradients pass through.

    Args:
        matvec: ``[b, *data] -> [b, *data]``, the product with M.
        b: ``[b, *data]``.
        num_iters: number of products, small.

    Examples:
        >>> import jax.numpy as jnp
        >>> turn = lambda x: jnp.stack([-x[:, 1], x[:, 0]], axis=1)
        >>> print(gmres(turn, jnp.array([[1.0, 2.0]]), num_iters=2).round(5))
        [[ 2. -1.]]

    References:
        Saad & Schultz 1986, SIAM J. Sci. Stat. Comput. 7(3), algorithm 4.
    """
    check_int("gmres", "num_iters", num_iters)
    shape, flat = b.shape, lambda v: v.reshape(len(b), -1)
    eps = jnp.finfo(b.dtype).eps
    rows = jnp.arange(num_iters + 1)[None]

    def unit(v: Array, least: Array) -> tuple[Array, Array]:
        norm = safe_sqrt(jnp.sum(v**2, axis=-1))
        good = norm > least
        return jnp.where(good[:, None], v / jnp.where(good, norm, 1)[:, None], 0), norm * good

    first, size = unit(flat(b), jnp.zeros(len(b), b.dtype))
    basis = jnp.zeros((len(b), num_iters + 1, first.shape[1]), b.dtype).at[:, 0].set(first)

    def step(basis: Array, j: Array) -> tuple[Array, Array]:
        moved = flat(matvec(basis[:, j].reshape(shape)))
        length = safe_sqrt(jnp.sum(moved**2, axis=-1))
        column = jnp.zeros((len(b), num_iters + 1), b.dtype)
        for _ in range(2):
            inner = jnp.einsum("bkn,bn->bk", basis, moved, precision="highest")
            moved = moved - jnp.einsum("bkn,bk->bn", basis, inner, precision="highest")
            column = column + inner
        following, norm = unit(moved, 10 * eps * length)
        column = jnp.where(rows == j + 1, norm[:, None], column)
        return basis.at[:, j + 1].set(following), column

    basis, columns = jax.lax.scan(step, basis, jnp.arange(num_iters))
    hessenberg = jnp.moveaxis(columns, 0, 2)  # [b, k + 1, k]
    target = size[:, None] * (rows == 0)
    weights = jax.vmap(lambda h, t: jnp.linalg.pinv(h, rcond=100 * eps) @ t)(hessenberg, target)
    return jnp.einsum("bkn,bk->bn", basis[:, :-1], weights, precision="highest").reshape(shape)


def largest_divisor(total: int, limit: int) -> int:
    """Return the largest divisor of ``total`` that is at most ``limit``."""
    return next(d for d in range(min(total, max(limit, 1)), 0, -1) if total % d == 0)


def safe_sqrt(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return ``sqrt(max(x, 0))`` with derivative 0, not infinity, where ``x <= 0``; NaN stays."""
    positive = ~(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def log_2pi() -> float:
    """Return ``log(2 pi)``."""
    return math.log(2 * math.pi)


class BlockSVD(NamedTuple):
    """Leading singular triplets of a linear map and how far the iteration that found them came."""

    u: Float[Array, "*k out rank"]
    s: Float[Array, "*k rank"]
    v: Float[Array, "*k dim rank"]
    change: Float[Array, "*k"]
    """How far the right subspace still turned in the last iteration (a sine); compare with tol."""
    num_iters: Int[Array, ""]


_BLOCKS = 6
"""Blocks in a Krylov space, which bound its memory; two more save few iterations."""


class _Krylov(NamedTuple):
    """State of :func:`block_krylov`: the space, and the triplets that it gives."""

    filled: Array
    direction: Array
    left: Array
    right: Array
    coupling: Array
    u: Array
    s: Array
    v: Array
    change: Array


def block_krylov(
    matmat: Callable[[Array], Array],
    rmatmat: Callable[[Array], Array],
    start: Float[Array, "*k dim width"],
    *,
    rank: int,
    max_iters: int = 50,
    tol: float = 1e-4,
) -> BlockSVD:
    r"""Return the leading singular triplets of a linear map A known only by its products.

    Block Golub-Kahan-Lanczos with full reorthogonalization, for a stack of maps at once. Each
    iteration adds one block to a left and a right basis and solves the small problem in them:

    .. math:: Q_i R = (I - Q Q^T) A P_{i-1}, \quad A^T Q = P B, \quad B = O S W^T, \quad
        U \leftarrow Q W,\; s \leftarrow S,\; V \leftarrow P O.

    After a few blocks the space starts anew from its leading ``width`` vectors. With room for one
    block this is subspace iteration, whose error falls by ``(s_{width+1} / s_rank)^2`` each time;
    the polynomial in A^T A that more blocks stand for falls with the square root of the gap, so
    slowly decaying values need far fewer products. Errors of the singular values are the square of
    the angle's. Directions that are mere rounding are dropped, so the rank of A may be lower than
    the block's.

    Iteration stops when the leading ``rank`` vectors of every map lie within ``tol`` (a sine) of
    the previous leading *block*: rotations inside equal singular values do not count, nor do turns
    within rounding, which are up to about ``100 eps s_1 / s_i`` for the i-th direction.

    Args:
        matmat: ``[..., dim, width] -> [..., out, width]``, A applied to each column.
        rmatmat: ``[..., out, width] -> [..., dim, width]``, the transpose of A.
        start: ``[..., dim, width]``, full rank; a random or a neighbouring problem's V. Under
            ``shard_map`` it has to vary over the devices as the products do.
        rank: number of triplets wanted, <= width.
        max_iters: bound on the iterations, each with one product by A and one by its transpose.
        tol: see above, > 0.

    References:
        Golub, Luk & Overton 1981 (block Lanczos for singular values); Musco & Musco 2015, arXiv
        1504.05477 (why it needs no gap); Halko, Martinsson & Tropp 2011, arXiv 0909.4061.
    """
    check_int("block_krylov", "rank", rank)
    check_int("block_krylov", "max_iters", max_iters)
    check_range("block_krylov", "tol", tol, 0, low_open=True)
    width = start.shape[-1]
    if rank > width:
        raise fail("block_krylov", "rank too large", f"at most width = {width}", rank)
    mm = lambda x, y: jnp.matmul(x, y, precision=_HIGHEST)
    t = lambda x: jnp.swapaxes(x, -1, -2)
    rounding = 100 * jnp.finfo(start.dtype).eps
    direction = jnp.linalg.qr(start)[0]
    out = jax.eval_shape(matmat, start).shape[-2]
    side = min(start.shape[-2], out)
    blocks = max(min(_BLOCKS, side // width), 1)

    def beside(basis: Array, a: Array) -> Array:
        """Orthonormal columns for what ``a`` has beside the basis; zeros where that is nothing."""
        largest = jnp.max(jnp.linalg.norm(a, axis=-2), axis=-1)
        q, r = jnp.linalg.qr(a - mm(basis, mm(t(basis), a)))
        left, s, _ = jnp.linalg.svd(r)
        q = mm(q, left) * (s > rounding / 10 * largest[..., None])[..., None, :]
        # What was rounding lies in the basis again; nothing sound follows it.
        q = q - mm(basis, mm(t(basis), q))
        kept = jnp.cumprod(jnp.linalg.norm(q, axis=-2) > 0.5, axis=-1)[..., None, :]
        return jnp.linalg.qr(q * kept)[0] * kept

    def put(basis: Array, block: Array, i: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(basis, block, i * width, axis=-1)

    def iterate(k: _Krylov) -> _Krylov:
        q = beside(k.left, matmat(k.direction))
        pulled = rmatmat(q)
        p = beside(k.right, pulled)
        left, right = put(k.left, q, k.filled), put(k.right, p, k.filled)
        coupling = put(k.coupling, mm(t(right), pulled), k.filled)
        inner, s, outer = jnp.linalg.svd(coupling)
        u, v = mm(left, t(outer)[..., :width]), mm(right, inner[..., :width])
        s = s[..., :width]
        lead, s_lead = v[..., :rank], s[..., :rank]
        turned = jnp.linalg.norm(lead - mm(k.v, mm(t(k.v), lead)), axis=-2)
        lost = turned * s_lead <= rounding * s_lead[..., :1]
        change = jnp.max(jnp.where(lost, 0, turned), axis=-1)
        whole = jnp.sum(left**2, axis=(-2, -1)) > side - 0.5  # nothing is outside
        change = jnp.where(whole, 0, change)
        filled = k.filled + 1
        anew = filled == blocks
        empty = lambda a: jnp.where(anew, 0, a)
        return _Krylov(
            jnp.where(anew, 0, filled),
            jnp.where(anew, v, p),
            empty(left),
            empty(right),
            empty(coupling),
            u,
            s,
            v,
            change,
        )

    def running(carry: Any) -> Array:
        step, k = carry
        return (step < max_iters) & jnp.any(k.change > tol)

    # Zeros that vary over devices as the start does; products are compiled once, in the loop.
    nothing = 0 * direction[..., :1, :1]
    zeros = lambda rows, columns: jnp.broadcast_to(nothing, (*start.shape[:-2], rows, columns))
    dim, size = start.shape[-2], blocks * width
    first = _Krylov(
        jnp.asarray(0),
        direction,
        zeros(out, size),
        zeros(dim, size),
        zeros(size, size),
        zeros(out, width),
        zeros(1, width)[..., 0, :],
        direction,
        zeros(1, 1)[..., 0, 0] + jnp.inf,
    )
    num_iters, k = jax.lax.while_loop(
        running, lambda carry: (carry[0] + 1, iterate(carry[1])), (jnp.asarray(0), first)
    )
    # Vectors of values that are zero may be missing.
    u, v = (orthonormalize(a[..., :rank]) for a in (k.u, k.v))
    return BlockSVD(u, k.s[..., :rank], v, k.change, num_iters)
