r"""Exact nearest neighbours by blocked matrix products, in bounded memory.

Candidates are ranked by ``||y||^2 - 2 <x, y>`` on centred data, one matrix product per pair of
blocks. In floating point that difference loses what is small beside ``||x||^2``, so a few more
candidates than asked for are kept, and their distances are computed again from ``x - y``. Where
the last candidate is so near that rounding may have hidden a nearer point (clusters far apart,
crowds of near duplicates), that query is searched again by differences alone, which is slower.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, Int
from lowdim_diffusion.linalg import safe_sqrt

_SPARE = 8  # candidates beyond k, so that rounding in the ranking costs no true neighbour
_FEW = 16  # numbers per example up to which differences cost no more than a matrix product


class Nearest(NamedTuple):
    """Nearest reference points of each query, nearest first."""

    distance: Float[Array, "b k"]
    """Euclidean distances, ascending."""
    index: Int[Array, "b k"]
    """Rows of the reference."""


def _flat(x: Any) -> Array:
    x = jnp.asarray(x)
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def nearest(
    x: ArrayLike, reference: ArrayLike, k: int = 1, *, block: int = 4096, query_block: int = 1024
) -> Nearest:
    """Return the ``k`` nearest points of ``reference`` to each example of ``x``, by Euclid.

    Exact up to rounding of ``x - y`` even where the data carry a large offset, lie in clusters far
    apart or hold near duplicates. Memory beyond the inputs is about ``query_block (block + 10 n)``
    numbers. Equal distances are ordered by index. A point of ``x`` that is itself in ``reference``
    is its own neighbour.

    Args:
        x: ``[b, *data]``, floats or integers (pixels).
        reference: ``[N, *data]``.
        k: number of neighbours, 1 <= k <= N.
        block: reference points compared at once.
        query_block: examples compared at once.

    Returns:
        ``(distance [b, k], index [b, k])``, nearest first.

    Raises:
        ValueError: if the example shapes differ, or ``k`` exceeds the number of points.

    Examples:
        >>> import jax.numpy as jnp
        >>> nearest(jnp.array([[0.9]]), jnp.array([[0.0], [1.0], [3.0]]), k=2).index.tolist()
        [[1, 0]]
    """
    check_int("nearest", "k", k)
    check_int("nearest", "block", block)
    check_int("nearest", "query_block", query_block)
    shape, wanted = jnp.shape(x)[1:], jnp.shape(reference)[1:]
    if shape != wanted:
        raise fail("nearest", "shape of an example", f"the reference's {wanted}", shape)
    num = jnp.shape(reference)[0]
    if k > num:
        raise fail("nearest", "k too large", f"at most the {num} reference points", k)
    x, reference = _flat(x), _flat(reference)
    dtype = jnp.promote_types(x.dtype, reference.dtype)
    x, reference = x.astype(dtype), reference.astype(dtype)
    if x.shape[0] == 0:
        return Nearest(jnp.zeros((0, k), dtype), jnp.zeros((0, k), jnp.int32))

    dim, eps = x.shape[-1], jnp.finfo(dtype).eps
    num_blocks = math.ceil(num / block)
    block = math.ceil(num / num_blocks)
    queries, points = jax.lax.stop_gradient(x), jax.lax.stop_gradient(reference)
    center = points.mean(0)
    farthest = jnp.max(jnp.sum((points - center[None]) ** 2, axis=-1))
    blocks = jnp.pad(points, ((0, num_blocks * block - num), (0, 0)))
    blocks = blocks.reshape(num_blocks, block, dim)
    keep, keep_block = min(k + _SPARE, num), min(k + _SPARE, block)

    def search(query: Array, direct: bool) -> tuple[Array, Array]:
        """Indices of the k nearest, and whether rounding may have hidden a nearer point."""
        shifted = query - center
        size = jnp.sum(shifted**2)

        def of_block(args: tuple[Array, Array]) -> tuple[Array, Array]:
            y, start = args
            if direct:
                closeness = -jnp.sum((y - query[None]) ** 2, axis=-1)
            else:
                y = y - center[None]
                inner = jnp.matmul(y, shifted, precision="highest")
                closeness = 2 * inner - jnp.sum(y**2, axis=-1)
            real = start + jnp.arange(block) < num
            values, places = jax.lax.top_k(jnp.where(real, closeness, -jnp.inf), keep_block)
            return values, start + places

        values, places = jax.lax.map(of_block, (blocks, jnp.arange(num_blocks) * block))
        values, chosen = jax.lax.top_k(values.reshape(-1), keep)
        index = jnp.minimum(places.reshape(-1)[chosen], num - 1)
        squared = jnp.sum((query[None] - points[index]) ** 2, axis=-1)
        squared, index = jax.lax.sort((squared, index), num_keys=2)
        # No point left out is nearer than this; measured rounding is a tenth of what is allowed.
        others = size - values[-1] - 4 * dim**0.5 * eps * (size + farthest)
        doubtful = (squared[k - 1] > others) & (squared[k - 1] > 0) & (keep < num)
        return index[:k].astype(jnp.int32), doubtful

    direct, size = dim <= _FEW, min(query_block, x.shape[0])
    index, doubtful = jax.lax.map(lambda query: search(query, direct), queries, batch_size=size)
    if not direct:

        def repair(state: tuple[Array, Array]) -> tuple[Array, Array]:
            doubtful, index = state
            i = jnp.argmax(doubtful)
            return doubtful.at[i].set(False), index.at[i].set(search(queries[i], True)[0])

        _, index = jax.lax.while_loop(lambda s: jnp.any(s[0]), repair, (doubtful, index))

    def distances(args: tuple[Array, Array]) -> Array:
        query, index = args
        squared = jnp.sum((query[None] - reference[index]) ** 2, axis=-1)
        return jnp.where(jnp.isnan(squared), jnp.nan, safe_sqrt(squared))

    return Nearest(jax.lax.map(distances, (x, index), batch_size=size), index)
