r"""Exact nearest neighbours by blocked matrix products, in bounded memory.

Candidates are ranked by ``||y||^2 - 2 <x, y>`` on centred data, one matrix product per pair of
blocks. In floating point that difference loses what is small beside ``||x||^2``, so a few more
candidates than asked for are kept, and their distances are computed again from ``x - y``, to twice
the working precision. Where the last candidate is so near that rounding may have hidden a nearer
point (clusters far apart, crowds of near duplicates), that query is searched again by differences
alone, which is slower.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from lowdim_diffusion._checks import check_int, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.sharding import AXIS

_SPARE = 8  # candidates beyond k, so that rounding in the ranking costs no true neighbour
_FEW = 16  # numbers per example up to which differences cost no more than a matrix product
_GROUP = 32  # scores that one maximum stands for while candidates are looked for
_AGAIN = 16  # doubtful queries searched together; a pass over the reference costs more than they do
_BLOCK_NUMBERS = 2**26  # numbers in a block, however large an example is
_REFINED_NUMBERS = 2**22  # numbers in the differences that are held at once
_CHUNK_BYTES = 2**28  # of a reference on the host, on the device at once


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


class _Found(NamedTuple):
    """Squared distances ``[b, k]``, ascending, as unevaluated sums, and rows of the reference."""

    squared: Array
    rest: Array
    index: Array


def nearest(
    x: ArrayLike,
    reference: ArrayLike,
    k: int = 1,
    *,
    block: int = 16384,
    query_block: int = 1024,
    mesh: Mesh | None = None,
) -> Nearest:
    """Return the ``k`` nearest points of ``reference`` to each example of ``x``, by Euclid.

    The answer of a search in float64 (of pixels, in integers), also where the data carry a large
    offset, lie in clusters far apart or hold near duplicates; only where more than eight points
    lie within 1e-6 of the k-th distance, others of them may be returned. Equal distances are
    ordered by index. A point of ``x`` that is itself in ``reference`` is its own neighbour.

    Neither set is copied: integers (pixels) become floats block by block, and a reference on the
    host (a numpy array, memory-mapped or not) visits the device in chunks of 256 MB, so that it may
    be larger than the device's memory; inside ``jit`` or under a derivative it has to fit. Memory
    beyond the inputs is about ``block (n + query_block)`` numbers, 270 MB with the defaults for
    CIFAR images; blocks of larger examples are smaller.

    Args:
        x: ``[b, *data]``, floats or integers (pixels).
        reference: ``[N, *data]``.
        k: number of neighbours, 1 <= k <= N.
        block: reference points compared at once.
        query_block: examples compared at once.
        mesh: one-axis mesh ``("data",)`` from ``sharding.data_mesh``: the examples of ``x`` are
            split over its devices, each of which holds (its part of) the reference.

    Returns:
        ``(distance [b, k], index [b, k])``, nearest first. The distance is differentiable.

    Raises:
        ValueError: if the example shapes differ, the reference is empty, ``k`` exceeds the number
            of points, or a value is not finite. Inside ``jit`` values are not known: there an
            example with NaN has NaN distances, and a reference point with NaN is nobody's
            neighbour while there are others.

    Examples:
        >>> import jax.numpy as jnp
        >>> nearest(jnp.array([[0.9]]), jnp.array([[0.0], [1.0], [3.0]]), k=2).index.tolist()
        [[1, 0]]
    """
    check_int("nearest", "k", k)
    check_int("nearest", "block", block)
    check_int("nearest", "query_block", query_block)
    x = jnp.asarray(x)
    reference = reference if hasattr(reference, "shape") else np.asarray(reference)
    shape, wanted, num = x.shape[1:], reference.shape[1:], reference.shape[0]
    if shape != wanted:
        raise fail("nearest", "shape of an example", f"the reference's {wanted}", shape)
    if num == 0:
        raise fail("nearest", "empty reference", "at least one point", reference.shape)
    if k > num:
        raise fail("nearest", "k too large", f"at most the {num} reference points", k)
    x = x.reshape(len(x), math.prod(shape))
    _check_finite("x", x)
    dtype = jnp.result_type(x.dtype, jax.dtypes.canonicalize_dtype(reference.dtype), jnp.float32)
    if len(x) == 0:
        return Nearest(jnp.zeros((0, k), dtype), jnp.zeros((0, k), jnp.int32))

    search = functools.partial(_search, dtype=dtype, block=block, query_block=query_block)
    if mesh is not None:
        search = functools.partial(_split_search, search, mesh)
    if isinstance(reference, jax.Array) or not is_concrete(x):
        reference = jnp.asarray(reference).reshape(num, x.shape[1])
        _check_finite("reference", reference)
        found = search(jax.lax.stop_gradient(x), jax.lax.stop_gradient(reference), k)
        return Nearest(_distance(x, reference, found.index, found.squared), found.index)

    size = math.prod(shape) * reference.dtype.itemsize
    num_chunks = math.ceil(num * size / _CHUNK_BYTES) or 1
    chunk, found = math.ceil(num / num_chunks), None
    for start in range(0, num, chunk):
        rows = jnp.asarray(reference[start : start + chunk]).reshape(-1, x.shape[1])
        _check_finite("reference", rows)
        part = search(x, rows, min(k, len(rows)))
        part = part._replace(index=part.index + start)
        found = part if found is None else _merge(found, part, k)
    assert found is not None
    return Nearest(safe_sqrt(found.squared), found.index)


@jax.jit
def _num_bad(x: Array) -> Array:
    return jnp.sum(~jnp.all(jnp.isfinite(x), axis=1))


def _check_finite(name: str, x: Array) -> None:
    if not (is_concrete(x) and jnp.issubdtype(x.dtype, jnp.floating)):
        return
    with jax.ensure_compile_time_eval():  # a known array, perhaps while something else is traced
        bad = int(_num_bad(x))
    if bad:
        got = f"NaN or infinity in {bad} of {len(x)} examples"
        raise fail("nearest", f"values of {name}", "finite numbers", got, "remove those examples")


@functools.partial(jax.jit, static_argnums=2)
def _merge(a: _Found, b: _Found, k: int) -> _Found:
    both = (jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))
    return _Found(*(part[:, :k] for part in jax.lax.sort(tuple(both), num_keys=3)))


def _split_search(search: Any, mesh: Mesh, x: Array, reference: Array, k: int) -> _Found:
    """``search`` with the queries split over the devices."""
    num = len(x)
    x = jnp.pad(x, ((0, -num % mesh.size), (0, 0)), mode="edge")
    each, split = PartitionSpec(), PartitionSpec(AXIS)
    run = jax.shard_map(
        lambda x, reference: search(x, reference, k),
        mesh=mesh,
        in_specs=(split, each),
        out_specs=split,
        check_vma=False,
    )
    return _Found(*(part[:num] for part in run(x, reference)))


# Compiled here, so that a search outside jit is compiled once for all calls of equal shapes.
@functools.partial(jax.jit, static_argnames=("k", "dtype", "block", "query_block"))
def _search(
    x: Array, reference: Array, k: int, *, dtype: Any, block: int, query_block: int
) -> _Found:
    num, dim = reference.shape
    keep, direct = min(k + _SPARE, num), dim <= _FEW
    block = min(block, max(_BLOCK_NUMBERS // dim, 256))
    query_block = min(query_block, max(_BLOCK_NUMBERS // dim, 16))
    # Any center is right; that of a thousand points is as good as that of all.
    center = jnp.mean(reference[:: max(num // 1024, 1)].astype(dtype), axis=0)
    center = jnp.where(jnp.isfinite(center), center, 0)

    def candidates(queries: Array, direct: bool) -> tuple[Array, Array]:
        """Scores, falling, and rows of the best ``keep``; a score is ``||q - c||^2 - d^2``."""
        steps, rows = _cover(num, block)
        (query_firsts, query_starts), width = _cover(len(queries), query_block)

        def fold(state: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], None]:
            first, start = step
            y = jax.lax.dynamic_slice_in_dim(reference, start, rows).astype(dtype)
            places = start + jnp.arange(rows, dtype=jnp.int32)
            y = y if direct else y - center[None]
            size = jnp.sum(y**2, axis=-1)
            wanted = (places >= first) & jnp.isfinite(size)

            def of_queries(args: Any) -> tuple[Array, Array]:
                start, values, index = args
                q = jax.lax.dynamic_slice_in_dim(queries, start, width).astype(dtype)
                if direct:
                    scores = -jnp.sum((q[:, None] - y[None]) ** 2, axis=-1)
                else:
                    inner = jnp.matmul(q - center[None], y.T, precision="highest")
                    scores = 2 * inner - size[None]
                scores = jnp.where(wanted[None], scores, -jnp.inf)
                best, at = _largest(scores, min(keep, rows))
                values = jnp.concatenate([values, best], axis=1)
                index = jnp.concatenate([index, places[at]], axis=1)
                values, at = jax.lax.top_k(values, keep)
                return values, jnp.take_along_axis(index, at, axis=1)

            return jax.lax.map(of_queries, (query_starts, *state)), None

        shape = (len(query_starts), width, keep)
        state = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32))
        state, _ = jax.lax.scan(fold, state, steps)
        fresh = query_starts[:, None] + np.arange(width) >= query_firsts[:, None]
        own = np.flatnonzero(fresh)
        values, index = (part.reshape(-1, keep)[own] for part in state)
        return values, index

    def refine(args: tuple[Array, Array]) -> _Found:
        query, index = args
        squared, rest = _sum_of_squares(query.astype(dtype)[None] - reference[index].astype(dtype))
        return _Found(*jax.lax.sort((squared, rest, index), num_keys=3))

    together = max(_REFINED_NUMBERS // (keep * dim), 1)
    refine_all = lambda x, index: jax.lax.map(refine, (x, index), batch_size=min(together, len(x)))

    values, index = candidates(x, direct)
    found = refine_all(x, index)
    if not direct and keep < num:
        size = jax.lax.map(
            lambda x: jnp.sum((x.astype(dtype) - center) ** 2), x, batch_size=query_block
        )
        farthest = found.squared[:, k - 1]
        # A point left out that is nearer has at most this rounding in its score: only such a one
        # matters, and it is no farther from the center than query and distance together. What was
        # measured is a tenth of it.
        largest = size + (jnp.sqrt(size) + jnp.sqrt(farthest)) ** 2
        slack = 4 * dim**0.5 * jnp.finfo(dtype).eps * largest
        doubtful = (farthest > size - values[:, -1] - slack) & (farthest > 0)

        def repair(state: tuple[Array, _Found]) -> tuple[Array, _Found]:
            doubtful, found = state
            _, i = jax.lax.top_k(doubtful.astype(jnp.int32), min(_AGAIN, len(x)))
            better = refine_all(x[i], candidates(x[i], True)[1])
            found = _Found(*(a.at[i].set(b) for a, b in zip(found, better, strict=True)))
            return doubtful.at[i].set(False), found

        _, found = jax.lax.while_loop(lambda s: jnp.any(s[0]), repair, (doubtful, found))
    return _Found(*(part[:, :k] for part in found))


def _cover(total: int, size: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Blocks of equal size that cover ``range(total)``: what each is to add and where it starts.

    The last one reaches back over some that the one before has had, instead of beyond the end.
    """
    count = math.ceil(total / size)
    size = math.ceil(total / count)
    first = np.arange(count, dtype=np.int32) * size
    return (first, np.minimum(first, total - size)), size


def _largest(scores: Array, keep: int) -> tuple[Array, Array]:
    """``top_k`` of ``scores [b, m]``: of groups by their maxima first, then inside those chosen."""
    batch, count = scores.shape
    if count < 2 * keep * _GROUP:
        values, places = jax.lax.top_k(scores, keep)
        return values, places
    width = math.ceil(count / _GROUP)
    padding = ((0, 0), (0, width * _GROUP - count))
    groups = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(batch, _GROUP, width)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=1), keep)
    inside = jnp.take_along_axis(groups, chosen[:, None], axis=2).reshape(batch, -1)
    places = chosen[:, None] + width * jnp.arange(_GROUP, dtype=jnp.int32)[None, :, None]
    values, at = jax.lax.top_k(inside, keep)
    places = jnp.take_along_axis(places.reshape(batch, -1), at, axis=1)
    return values, jnp.minimum(places, count - 1)


def _sum_of_squares(d: Array) -> tuple[Array, Array]:
    """``sum d^2`` over the last axis as an unevaluated sum of two floats, the larger first.

    In float32 the rounding of the sum is far below that of its terms, and the same in whatever
    order it is taken: squares are cut at a unit so large that the sum of their upper parts is
    exact (of pixels, all of it).
    """
    plain = jnp.sum(d**2, axis=-1)
    if d.dtype != jnp.float32:
        return plain, jnp.zeros_like(plain)
    _, exponent = jnp.frexp(plain)
    cut = jnp.ldexp(jnp.full_like(plain, 1.5), jnp.clip(exponent + 1, -100, 126))[..., None]
    upper = (d**2 + cut) - cut  # rounded to cut's last place
    lower = jnp.sum(d**2 - upper, axis=-1)
    upper = jnp.sum(upper, axis=-1)
    total = upper + lower
    return total, lower - (total - upper)


@jax.custom_jvp
def _distance(x: Array, reference: Array, index: Array, squared: Array) -> Array:
    """``||x - reference[index]||``, whose squares are known already."""
    return safe_sqrt(squared)


def _distance_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, reference, index, squared = primals
    moving_x, moving_reference = (
        None if isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0 else t
        for t in tangents[:2]
    )
    distance = safe_sqrt(squared)

    @jax.checkpoint
    def of(args: Any) -> Array:
        query, index, distance, moving = args
        direction = query[None].astype(distance.dtype) - reference[index].astype(distance.dtype)
        change = jnp.zeros_like(direction)
        if moving is not None:
            change = change + moving[None].astype(change.dtype)
        if moving_reference is not None:
            change = change - moving_reference[index].astype(change.dtype)
        slope = jnp.sum(direction * change, axis=-1)
        return jnp.where(distance > 0, slope / jnp.where(distance > 0, distance, 1), 0)

    size = min(max(_REFINED_NUMBERS // max(index.shape[1] * x.shape[1], 1), 1), len(x))
    return distance, jax.lax.map(of, (x, index, distance, moving_x), batch_size=size)


_distance.defjvp(_distance_jvp, symbolic_zeros=True)
