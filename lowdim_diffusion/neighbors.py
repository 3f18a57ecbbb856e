r"""Exact nearest neighbours by blocked matrix products, in bounded memory.

Candidates are ranked by ``||y||^2 - 2 <x, y>`` on centred data, one matrix product per pair of
blocks. In floating point that difference loses what is small beside ``||x||^2``, so a few more
candidates than asked for are kept, and their distances are computed again from ``x - y``.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, Int
from lowdim_diffusion.linalg import safe_sqrt

_SPARE = 8  # candidates beyond k, so that rounding in the ranking costs no true neighbour


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

    Exact up to rounding of ``x - y`` even where the data carry a large offset or near duplicates.
    Memory beyond the inputs is about ``query_block * (block + 10 n)`` numbers. Equal distances
    are ordered by index. A point of ``x`` that is itself in ``reference`` is its own neighbour.

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

    Example:
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

    center = jax.lax.stop_gradient(reference.mean(0))
    num_blocks = math.ceil(num / block)
    block = math.ceil(num / num_blocks)
    padded = jnp.pad(reference, ((0, num_blocks * block - num), (0, 0)))
    blocks = jax.lax.stop_gradient(padded).reshape(num_blocks, block, -1)
    keep, keep_block = min(k + _SPARE, num), min(k + _SPARE, block)

    def of_query(query: Array) -> tuple[Array, Array]:
        shifted = jax.lax.stop_gradient(query) - center

        def of_block(args: tuple[Array, Array]) -> tuple[Array, Array]:
            points, start = args
            points = points - center[None]
            inner = jnp.matmul(points, shifted, precision="highest")
            closeness = 2 * inner - jnp.sum(points**2, axis=-1)
            real = start + jnp.arange(block) < num
            values, places = jax.lax.top_k(jnp.where(real, closeness, -jnp.inf), keep_block)
            return values, start + places

        values, places = jax.lax.map(of_block, (blocks, jnp.arange(num_blocks) * block))
        _, chosen = jax.lax.top_k(values.reshape(-1), keep)
        index = places.reshape(-1)[chosen]
        squared = jnp.sum((query[None] - reference[jnp.minimum(index, num - 1)]) ** 2, axis=-1)
        squared, index = jax.lax.sort((squared, index), num_keys=2)
        return safe_sqrt(squared[:k]), index[:k].astype(jnp.int32)

    return Nearest(*jax.lax.map(of_query, x, batch_size=min(query_block, x.shape[0])))
