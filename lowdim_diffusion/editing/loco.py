r"""Local edits by singular vectors of the denoiser's Jacobian (LOCO), without text or training.

At a noise level where the image is decided but its details are not, the denoiser
``f(x_t) = x0_hat`` is nearly linear in x_t with a Jacobian of low rank. With ``P_Omega`` the
entries inside a mask, ``J_in`` and ``J_out`` the Jacobians of f inside and outside of it,

1. the image is carried up to x_t by the sampler's ODE (:func:`~lowdim_diffusion.sampling.invert`);
2. the leading right singular vectors v of ``J_in`` change the region most;
3. ``v_p = (I - V_out V_out^T) v``, normalised, leaves the rest alone to first order;
4. sampling from ``x_t + lambda v_p`` gives the edited image, from ``-lambda`` its opposite.

A direction found on one image works on others at the same level, and directions add up: sums of
them are directions too.

References:
    Chen et al. 2024, arXiv 2409.02374, algorithms 1-2 and sec. 4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import sampling, subspaces
from lowdim_diffusion._checks import check_int, check_shape, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.editing.masks import check_mask
from lowdim_diffusion.sharding import vary_like
from lowdim_diffusion.solvers import Solver


class Directions(NamedTuple):
    """Directions in x_t and what a small step along each does to the predicted image."""

    v: Float[Array, "b rank *data"]
    """Unit vectors to go along."""
    inside: Float[Array, "b rank"]
    """``||J_in v||``, change inside the mask per unit step."""
    outside: Float[Array, "b rank"]
    """``||J_out v||``, change outside the mask per unit step."""
    raw: Float[Array, "b rank *data"]
    """Unit vectors before the projection; right singular vectors of J_in."""
    raw_inside: Float[Array, "b rank"]
    """``||J_in raw||``; the singular values."""
    raw_outside: Float[Array, "b rank"]
    """``||J_out raw||``."""
    kept: Float[Array, "b rank"]
    """``||(I - V_out V_out^T) raw||``; near 0 nothing acts on the region alone, and v is 0 where
    only rounding is left."""
    change: Float[Array, " b"]
    """Sine by which the subspaces searched for, inside or outside, still turned at the end: they
    have converged if it is at most ``tol``; 0 where there was no search."""


def find_directions(
    key: PRNGKey,
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    mask: Any,
    rank: int = 5,
    *,
    null_rank: int = 5,
    max_iters: int = 50,
    tol: float = 1e-3,
    chunk: int | None = None,
) -> Directions:
    r"""Return the ``rank`` directions that change the region most and the rest least.

    Args:
        key: starts the search.
        fn: ``[b, *data] -> [b, *data]``, the denoiser with its time bound:
            ``lambda x: denoise_fn(x, t)``. For a latent model, decode in it.
        x: ``[b, *data]`` noisy examples x_t.
        mask: ``[h, w]``, ``[*data]`` or ``[b, *data]``; not zero inside the region.
        rank: directions wanted, at most the entries inside the mask.
        null_rank: leading directions of the outside to keep clear of (the paper's r'); 0 for none.
            With more of them less of the outside changes, down to what lies beyond their span.
        max_iters: as in :func:`~lowdim_diffusion.subspaces.jacobian_svd`.
        tol: as there.
        chunk: as there; twice as many vectors are pushed at once, for inside and outside.

    Returns:
        :class:`Directions` by descending ``raw_inside``; signs are arbitrary. ``change`` says
        whether the search has converged.

    Raises:
        ValueError: for a mask of another size or without a pixel, or a rank above its pixels.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> gains = jnp.array([5.0, 1.0, 2.0, 0.0])
        >>> fn = lambda x: x * gains[None]  # every coordinate acts on itself alone
        >>> mask, x = jnp.array([0, 1, 1, 0]), jnp.ones((1, 4))
        >>> found = find_directions(jax.random.key(0), fn, x, mask, rank=1, null_rank=1)
        >>> abs(found.v).round(2).tolist(), found.inside.round(2).tolist()
        ([[[0.0, 0.0, 1.0, 0.0]]], [[2.0]])

    References:
        Chen et al. 2024, arXiv 2409.02374, algorithm 2.
    """
    where = "find_directions"
    check_int(where, "rank", rank)
    check_int(where, "null_rank", null_rank, low=0)
    inside = _mask(where, mask, x)
    return _measured(
        fn, x, inside, *_spaces(key, fn, x, inside, rank, null_rank, max_iters, tol, chunk)
    )


def supervised_direction(
    key: PRNGKey,
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    score_fn: Callable[[Array], Array],
    mask: Any = None,
    *,
    null_rank: int = 5,
    max_iters: int = 50,
    tol: float = 1e-3,
    chunk: int | None = None,
) -> Directions:
    r"""Return the direction that raises a score of the predicted image fastest.

    .. math:: v \propto J^T P_\Omega \nabla_{\hat x_0}\, \mathrm{score}(\hat x_0),

    one reverse product, then the same projection as in :func:`find_directions`. The score may be
    anything differentiable: brightness of a region, a classifier's logit, the product with a
    difference image (which gives the text-supervised direction of the paper).

    Args:
        key: starts the search for the outside's directions.
        fn: as in :func:`find_directions`.
        x: ``[b, *data]`` noisy examples x_t.
        score_fn: ``[b, *data] -> [b]``, each example alone.
        mask: region to act in; None for everywhere, without projection.
        null_rank: as in :func:`find_directions`.
        max_iters: as there.
        tol: as there.
        chunk: as there.

    Returns:
        :class:`Directions` with ``rank = 1``; a positive step raises the score.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda x: x * jnp.array([[2.0, 1.0]])
        >>> brighter = lambda image: image.sum(1)
        >>> found = supervised_direction(jax.random.key(0), fn, jnp.ones((1, 2)), brighter)
        >>> [f"{x:.3f}" for x in found.v[0, 0]]
        ['0.894', '0.447']

    References:
        Chen et al. 2024, arXiv 2409.02374, algorithm 3 (T-LOCO), here for any score.
    """
    where = "supervised_direction"
    check_int(where, "null_rank", null_rank, low=0)
    inside = np.ones(x.shape, bool) if mask is None else _mask(where, mask, x)
    y, pull = jax.vjp(fn, x)
    slope = jax.grad(lambda y: jnp.sum(score_fn(y)))(y)
    v = pull(jnp.where(inside, slope, 0))[0].reshape(x.shape[0], 1, -1)
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    vt = v / jnp.where(norm > 0, norm, 1)
    _, out, change = _spaces(key, fn, x, inside, 0, null_rank, max_iters, tol, chunk)
    return _measured(fn, x, inside, vt, out, change)


def given_directions(
    fn: Callable[[Array], Array], x: Float[Array, "b *data"], mask: Any, v: Float[Array, "*shape"]
) -> Directions:
    """Return directions found elsewhere, with what they do here.

    Args:
        fn: as in :func:`find_directions`.
        x: ``[b, *data]`` noisy examples x_t.
        mask: as in :func:`find_directions`.
        v: ``[b, rank, *data]``, or ``[rank, *data]`` for the same on every image: directions of
            another image (a transfer), or weighted sums of some (a composition). Of any length;
            unit vectors along them are taken.

    Examples:
        >>> import jax.numpy as jnp
        >>> fn, x = lambda x: x * jnp.array([[3.0, 4.0]]), jnp.ones((1, 2))
        >>> found = given_directions(fn, x, jnp.array([1, 0]), jnp.array([[2.0, 2.0]]))
        >>> [f"{float(a[0, 0]):.3f}" for a in (found.inside, found.outside)]
        ['2.121', '2.828']
    """
    where = "given_directions"
    inside = _mask(where, mask, x)
    if v.ndim == x.ndim:
        v = v[None]
    if v.ndim != x.ndim + 1 or v.shape[2:] != x.shape[1:] or v.shape[0] not in (1, len(x)):
        expected = f"[{len(x)}, rank, *data] or [rank, *data], data {x.shape[1:]}"
        raise fail(where, "wrong shape of v", expected, v.shape)
    rows = jnp.broadcast_to(v.reshape(*v.shape[:2], -1), (len(x), v.shape[1], x[0].size))
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows / jnp.where(norm > 0, norm, 1)
    return _measured(fn, x, inside, rows, rows[:, :0], _no_search(x))


def random_directions(
    key: PRNGKey, fn: Callable[[Array], Array], x: Float[Array, "b *data"], mask: Any, rank: int = 5
) -> Directions:
    """Return random orthonormal directions, the control that every edit is to be held against."""
    check_int("random_directions", "rank", rank)
    inside = _mask("random_directions", mask, x)
    vt = _random_rows(key, x, rank)
    return _measured(fn, x, inside, vt, vt[:, :0], _no_search(x))


def edit(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_t: Float[Array, "b *data"],
    direction: Float[Array, "*shape"],
    strengths: Any,
    *,
    solver: Solver,
    batch_size: int | None = None,
) -> Float[Array, "num_strengths b *data"]:
    r"""Return the images that sampling makes of ``x_t + strength * step_length * direction``.

    Strengths are relative (see :func:`~lowdim_diffusion.subspaces.step_length`), so that the same
    number means the same at every image size and schedule; the published range of lambda, 15 either
    way for 256x256x3 faces, is 0.034. Strength 0 gives the round trip without an edit.

    Args:
        key: only used by a stochastic solver; every strength then sees the same noise.
        denoise_fn: ``(x_t, t) -> x0_hat``.
        schedule: noise schedule.
        ts: times from that of x_t down to data, as for :func:`~lowdim_diffusion.sampling.sample`.
            With two entries the edited image is predicted in one step.
        x_t: ``[b, *data]`` noisy examples at ``ts[0]``.
        direction: ``[b, *data]``, or ``[*data]`` for the same on every image (a transfer); of unit
            length, or a weighted sum of such (a composition).
        strengths: ``[num_strengths]``, either sign.
        solver: from ``lowdim_diffusion.solvers``.
        batch_size: strengths to run at once; all by default.

    Returns:
        ``[num_strengths, b, *data]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> x_t, v = jnp.zeros((1, 4)), jnp.array([1.0, 0, 0, 0])
        >>> images = edit(
        ...     jax.random.key(0), white, schedules.VE(), [1.0, 0.0], x_t, v, [-1.0, 0.5],
        ...     solver=solvers.heun(),
        ... )  # steps of -2 sqrt(2) and sqrt(2), halved by the denoiser
        >>> [f"{x:.3f}" for x in images[:, 0, 0]]
        ['-1.414', '0.707']
    """
    strengths = _strengths("edit", strengths, x_t)
    if direction.shape == x_t.shape[1:]:
        direction = direction[None]
    if direction.shape != (1, *x_t.shape[1:]):
        check_shape("edit", "direction", direction, x_t.shape, "or one for all, [*data]")
    moves = strengths.reshape((-1,) + (1,) * x_t.ndim) * direction[None]
    return _sample_moved(key, denoise_fn, schedule, ts, x_t, moves, solver, batch_size)


def _strengths(where: str, strengths: Any, x_t: Array) -> Array:
    strengths = jnp.asarray(strengths, x_t.dtype)
    if strengths.ndim != 1 or not strengths.size:
        raise fail(where, "wrong shape of strengths", "[num_strengths]", strengths.shape)
    return strengths


def _sample_moved(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_t: Array,
    moves: Array,
    solver: Solver,
    batch_size: int | None,
) -> Array:
    """Sample from ``x_t`` plus each relative move ``[M, b, *data]``."""
    unit = subspaces.step_length(schedule, jnp.asarray(ts)[0], x_t.shape[1:]).astype(x_t.dtype)

    def one(move: Array) -> Array:
        moved = x_t + unit * move
        return sampling.sample(key, denoise_fn, schedule, ts, moved, solver=solver).x

    # Equal batches: a remainder would be compiled as a second program.
    if batch_size is not None:
        check_int("edit", "batch_size", batch_size)
    count = len(moves)
    batches = math.ceil(count / (batch_size or count))
    size = math.ceil(count / batches)
    rest = jnp.zeros((batches * size - count, *moves.shape[1:]), moves.dtype)
    return jax.lax.map(one, jnp.concatenate([moves, rest]), batch_size=size)[:count]


class Edits(NamedTuple):
    """All that :func:`loco` did."""

    x_t: Float[Array, "b *data"]
    """The inverted examples."""
    reconstruction: Float[Array, "b *data"]
    """The round trip without an edit."""
    directions: Directions
    """Found; the last ``num_random`` of them are random."""
    images: Float[Array, "directions num_strengths b *data"]
    """Edited examples."""


def loco(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    x_0: Float[Array, "b *data"],
    mask: Any,
    strengths: Any,
    *,
    solver: Solver,
    rank: int = 5,
    null_rank: int = 5,
    num_random: int = 0,
    max_iters: int = 50,
    tol: float = 1e-3,
    chunk: int | None = None,
    batch_size: int | None = None,
) -> Edits:
    """Return local edits of clean examples: inversion, directions, and a sweep of strengths.

    One program for all of it; ``jit`` it whole.

    Args:
        key: starts the search.
        denoise_fn: ``(x_t, t) -> x0_hat``.
        schedule: noise schedule.
        ts: times from the edit's noise level, ``ts[0]``, down to data; the same for both ways.
        x_0: ``[b, *data]`` clean examples.
        mask: the region, as in :func:`find_directions`.
        strengths: ``[num_strengths]``, as in :func:`edit`.
        solver: deterministic.
        rank: directions per example.
        null_rank: as in :func:`find_directions`.
        num_random: random directions to add to them, the control of the experiment.
        max_iters: as in :func:`find_directions`.
        tol: as there.
        chunk: as there.
        batch_size: directions times strengths to sample at once; those of one direction by default.
    """
    where = "loco"
    strengths = _strengths(where, strengths, x_0)
    check_int(where, "rank", rank)
    check_int(where, "null_rank", null_rank, low=0)
    check_int(where, "num_random", num_random, low=0)
    inside = _mask(where, mask, x_0)
    x_t = sampling.invert(denoise_fn, schedule, ts, x_0, solver=solver)
    t = jnp.asarray(ts, x_t.dtype)[0]
    fn = lambda x: denoise_fn(x, t)
    vt, out, change = _spaces(key, fn, x_t, inside, rank, null_rank, max_iters, tol, chunk)
    chance = _random_rows(jax.random.fold_in(key, 1), x_t, num_random)
    found = _measured(fn, x_t, inside, vt, out, change, chance)
    v = jnp.moveaxis(found.v, 1, 0)[:, None]
    moves = strengths.reshape((1, -1) + (1,) * x_t.ndim) * v
    moves = moves.reshape(-1, *x_t.shape)
    moves = jnp.concatenate([jnp.zeros_like(moves[:1]), moves])
    size = batch_size or len(strengths)
    images = _sample_moved(key, denoise_fn, schedule, ts, x_t, moves, solver, size)
    edited = images[1:].reshape(len(v), len(strengths), *x_t.shape)
    return Edits(x_t, images[0], found, edited)


def _mask(where: str, mask: Any, x: Array) -> Any:
    """``[b, *data]``, true inside; numpy's if its entries are known."""
    if jnp.shape(mask) == x.shape:
        each = [check_mask(where, one, x.shape[1:]) for one in mask]
        return (np if all(map(_known, each)) else jnp).stack(each)
    inside = check_mask(where, mask, x.shape[1:])[None]
    return (np if _known(inside) else jnp).broadcast_to(inside, x.shape)


def _known(inside: Any) -> bool:
    return isinstance(inside, np.ndarray)


def _spaces(
    key: PRNGKey,
    fn: Callable[[Array], Array],
    x: Array,
    inside: Any,
    rank: int,
    null_rank: int,
    max_iters: int,
    tol: float,
    chunk: int | None,
) -> tuple[Array, Array, Array]:
    """Leading right singular rows ``[b, rank, n]`` of J_in and of J_out, and how far they turned.

    Rows of J_out are zero where J_out is.
    """
    count = null_rank
    if _known(inside):
        pixels = inside.reshape(len(inside), -1).sum(1)
        if rank > pixels.min():
            expected = f"at most {pixels.min()}, the entries inside the mask"
            raise fail("find_directions", "rank too large", expected, rank, "or widen the mask")
        count = min(null_rank, int(x[0].size - pixels.max()))

    def rows(inside: Array) -> tuple[Array, Array, Array]:
        most = max(rank, count)
        options: Any = {"mask": inside, "max_iters": max_iters, "tol": tol, "chunk": chunk}
        options["return_info"] = True
        (_, s, vt), info = subspaces.jacobian_svd(fn, x, most, key=key, **options)
        return s, vt, info.change

    # Both searches are one program: the products of one linearization, for two masks.
    parts = [inside] * (rank > 0) + [~inside] * (count > 0)
    if not parts:
        none = jnp.zeros((len(x), 0, x[0].size))
        return none, none, _no_search(x)
    s, vt, change = jax.vmap(rows)(jnp.stack(parts))
    alive = s > 100 * jnp.finfo(s.dtype).eps * s[..., :1]
    outside = jnp.where(alive[..., None], vt, 0)[-1, :, :count]
    return vt[0, :, :rank], outside, change.max(axis=0)


def _no_search(x: Array) -> Array:
    return jnp.zeros_like(x, shape=x.shape[:1])


def _random_rows(key: PRNGKey, x: Array, count: int) -> Array:
    """``[b, count, n]`` orthonormal rows."""
    if count > x[0].size:
        raise fail("random_directions", "rank too large", f"at most {x[0].size}", count)
    draws = jax.random.normal(key, (x.shape[0], x[0].size, count), x.dtype)
    return jnp.swapaxes(jnp.linalg.qr(vary_like(draws, x))[0], 1, 2)


def _measured(
    fn: Callable[[Array], Array],
    x: Array,
    inside: Any,
    raw: Array,
    out: Array,
    change: Array,
    chance: Array | None = None,
) -> Directions:
    """Project unit rows ``raw: [b, rank, n]`` off ``out``, add ``chance``, measure all effects."""
    mm = lambda a, b: jnp.matmul(a, b, precision="highest")
    v = raw - mm(mm(raw, jnp.swapaxes(out, 1, 2)), out)
    kept = jnp.linalg.norm(v, axis=-1)
    left = kept > 100 * jnp.finfo(v.dtype).eps  # below, rounding is all that is left
    v = jnp.where(left[..., None], v / jnp.where(left, kept, 1)[..., None], 0)
    if chance is not None:
        v, raw = (jnp.concatenate([a, chance.astype(a.dtype)], axis=1) for a in (v, raw))
        kept = jnp.concatenate([kept, jnp.ones(chance.shape[:2], kept.dtype)], axis=1)
    both = jnp.concatenate([v, raw], axis=1).reshape(x.shape[0], -1, *x.shape[1:])
    product = jax.linearize(fn, x)[1]
    effect = jax.vmap(product, in_axes=1, out_axes=1)(both.astype(x.dtype))
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axis=tuple(range(2, a.ndim))))
    within = jnp.split(norm(jnp.where(inside[:, None], effect, 0)), 2, axis=1)
    rest = jnp.split(norm(jnp.where(inside[:, None], 0, effect)), 2, axis=1)
    v, raw = jnp.split(both, 2, axis=1)
    return Directions(v, within[0], rest[0], raw, within[1], rest[1], kept, change)
