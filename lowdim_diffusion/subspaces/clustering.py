r"""K-subspaces: the clustering that training a low-rank denoiser amounts to.

With hard assignment the denoising loss of ``[U_1 .. U_K]`` is, up to constants,

.. math:: -\sum_i \max_k \lVert U_k^T x_i \rVert^2,

over frames that are orthonormal one by one (*plain*) or all together (*orthogonal*, the setting of
theorem 3). Each iteration assigns every point to the frame that holds most of it and then moves the
frames uphill: ``U_k <- orth(S_k U_k)``, with ``S_k`` the scatter of the points of k, and in the
orthogonal case ``[U_1 .. U_K] <- polar([S_1 U_1 .. S_K U_K])``. Neither step can lower the sum.

The sum has many local optima, so the start decides. For a union of subspaces the Gram matrix ``G``
of the unit-length points holds the answer: ``G`` itself is block diagonal if the subspaces are
orthogonal, and the projector onto its range (the shape interaction matrix) if they are merely
independent. *Spectral* starts cluster the points by ``G (G + ridge I)^{-1}``, which lies
between the two, for several ridges; *random* ones draw frames inside the leading principal
directions.

References:
    Wang et al. 2024, arXiv 2409.02426, theorems 3 and 4;
    Bradley & Mangasarian 2000, doi:10.1023/A:1008324625522 (K-planes);
    Costeira & Kanade 1998, doi:10.1023/A:1008000628999 (shape interaction matrix);
    Lu et al. 2012, arXiv 1204.4537 (clustering by ridge self-expression);
    Damle, Minden & Ying 2019, arXiv 1708.07481 (labels from eigenvectors by pivoted QR).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import (
    check_choice,
    check_int,
    check_range,
    check_shape,
    fail,
    is_concrete,
)
from lowdim_diffusion._types import Array, Float, Int, PRNGKey
from lowdim_diffusion.linalg import check_frames, orthonormalize, polar, safe_sqrt

_HIGHEST = jax.lax.Precision.HIGHEST
STARTS = ("spectral", "random", "mixed")
RIDGES = (1e-3, 1e1)
"""Smallest and largest ridge of spectral starts, as multiples of the mean eigenvalue of ``G``."""


class KSubspaces(NamedTuple):
    """What :func:`k_subspaces` found."""

    bases: Float[Array, "num_components n rank"]
    """Frames of the best restart."""
    labels: Int[Array, " num_samples"]
    """Which frame holds most of each point."""
    loss: Float[Array, ""]
    """Mean squared distance of the points to their subspaces, rows of zeros not counted."""
    losses: Float[Array, " num_restarts"]
    """That of every restart; their spread tells how hard the problem is."""


def assign_points(
    x: Float[Array, "num_samples n"], bases: Float[Array, "num_components n2 rank"]
) -> Int[Array, " num_samples"]:
    """Return for each row of ``x`` the index of the frame that holds most of it.

    Args:
        x: ``[N, n]``.
        bases: ``[K, n, d]`` with orthonormal (or zero) columns.

    Raises:
        ValueError: outside ``jit``, if columns are neither, or ``x`` is not finite.
    """
    check_frames("assign_points", "bases", bases)
    check_finite("assign_points", x)
    return jnp.argmax(_energies(x, bases), axis=1).astype(jnp.int32)


def _energies(x: Array, bases: Array) -> Array:
    """``||U_k^T x_i||^2: [N, K]``."""
    return jnp.sum(jnp.einsum("bn,knd->bkd", x, bases, precision=_HIGHEST) ** 2, axis=-1)


def k_subspaces(
    key: PRNGKey,
    x: Float[Array, "num_samples n"],
    num_components: int,
    rank: int,
    *,
    orthogonal: bool = False,
    num_restarts: int = 1,
    start: Literal["spectral", "random", "mixed"] = "mixed",
    active_rank: Any = None,
    max_iters: int = 100,
) -> KSubspaces:
    r"""Return K subspaces of dimension d through the origin that fit the rows of ``x`` best.

    All restarts run side by side in one loop; the one with the smallest loss is returned. Nothing
    is centred. Rows of zeros weigh nothing, so sets of different size can be padded and mapped.

    Args:
        key: typed random key.
        x: ``[N, n]``, one example per row.
        num_components: K.
        rank: d.
        orthogonal: make the frames mutually orthogonal, as theorem 3 assumes; needs ``K d <= n``.
        num_restarts: how many starts.
        start: ``"spectral"``, ``"random"``, or ``"mixed"``: every other one random, a single one
            spectral.
        active_rank: if given, only so many columns of each frame are used and the others are zero;
            may be traced, so that one program serves every rank up to ``rank``.
        max_iters: bound on the iterations.

    Returns:
        A :class:`KSubspaces`.

    Raises:
        ValueError: if ``rank > n``, or ``K rank > n`` with ``orthogonal``, or there are fewer
            points than components, or x is not finite.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import distributions, linalg, subspaces
        >>> frame_key, sample_key, key = jax.random.split(jax.random.key(0), 3)
        >>> bases = linalg.random_frames(frame_key, 3, 48, 6, orthogonal=True)
        >>> x, labels = distributions.MoLRG(bases).sample(sample_key, 60)
        >>> found = k_subspaces(key, x, 3, 6, orthogonal=True)
        >>> bool(subspaces.match_components(bases, found.bases).distance.max() < 1e-3)
        True
    """
    where = "k_subspaces"
    check_problem(where, x, num_components, rank, orthogonal, num_restarts, start, active_rank)
    check_int(where, "max_iters", max_iters)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    num_samples, dim = x.shape
    lift = None
    if max(num_samples, num_components * rank) < dim:
        # An isometry onto the span of the points, or into as much room as the frames need.
        room = max(num_samples, num_components * rank)
        padded = jnp.pad(x, ((0, room - num_samples), (0, 0)))
        u, s, lift = jnp.linalg.svd(padded, full_matrices=False)
        x = (u * s[None, :])[:num_samples]
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1)
    x = x / scale  # fourth powers of the data are formed below
    mask = _mask(x, rank, active_rank)
    first = _starts(key, x, num_components, rank, num_restarts, start, orthogonal, mask)
    bases = _climb(x, first, mask, orthogonal, max_iters)
    losses = jax.vmap(lambda b: _loss(x, b))(bases) * scale**2
    best = jnp.nanargmin(losses)
    chosen = bases[best]
    labels = assign_points(x, chosen)
    if lift is not None:
        chosen = jnp.einsum("mn,kmd->knd", lift, chosen, precision=_HIGHEST)
    return KSubspaces(chosen, labels, losses[best], losses)


def starts(
    key: PRNGKey,
    x: Float[Array, "num_samples n"],
    num_components: int,
    rank: int,
    *,
    orthogonal: bool = False,
    num_restarts: int = 1,
    start: Literal["spectral", "random", "mixed"] = "mixed",
    active_rank: Any = None,
) -> Float[Array, "num_restarts num_components n rank"]:
    """Return the first frames of :func:`k_subspaces`, for other methods that need a start.

    Arguments and errors as there.
    """
    where = "starts"
    check_problem(where, x, num_components, rank, orthogonal, num_restarts, start, active_rank)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mask = _mask(x, rank, active_rank)
    return _starts(key, x, num_components, rank, num_restarts, start, orthogonal, mask)


def _mask(x: Array, rank: int, active_rank: Any) -> Array:
    if active_rank is None:
        return jnp.ones(rank, x.dtype)
    return (jnp.arange(rank) < active_rank).astype(x.dtype)


def check_problem(
    where: str,
    x: Any,
    num_components: int,
    rank: int,
    orthogonal: bool,
    num_restarts: int,
    start: str,
    active_rank: Any,
) -> None:
    """Raise, in the name of ``where``, unless the arguments of :func:`starts` make sense."""
    check_int(where, "num_components", num_components)
    check_int(where, "rank", rank)
    check_int(where, "num_restarts", num_restarts)
    check_choice(where, "start", start, STARTS)
    check_shape(where, "x", x, (None, None), "one example per row, flattened")
    num_samples, dim = x.shape
    if active_rank is not None:
        check_range(where, "active_rank", active_rank, 1, rank)
    if rank > dim:
        raise fail(where, "rank too large", f"at most the data's dimension {dim}", rank)
    if orthogonal and num_components * rank > dim:
        raise fail(
            where,
            "no room for mutually orthogonal subspaces",
            f"num_components * rank <= {dim}",
            num_components * rank,
            "lower the rank or pass orthogonal=False",
        )
    if num_samples < num_components:
        raise fail(where, "too few points", f"at least {num_components}", num_samples)
    check_finite(where, x)


def check_finite(where: str, x: Any) -> None:
    """Raise, in the name of ``where``, if a concrete ``x`` holds NaN or infinity."""
    if is_concrete(x) and not np.all(np.isfinite(np.asarray(x))):
        raise fail(where, "x is not finite", "finite numbers", "NaN or infinity")


def _loss(x: Array, bases: Array) -> Array:
    """Mean squared distance to the nearest frame, from the residuals: differences would cancel."""
    inside = jnp.einsum("bn,knd->bkd", x, bases, precision=_HIGHEST)
    best = jnp.argmax(jnp.sum(inside**2, axis=-1), axis=1)
    own = jax.nn.one_hot(best, bases.shape[0], dtype=x.dtype)[:, :, None] * inside
    residual = x - jnp.einsum("bkd,knd->bn", own, bases, precision=_HIGHEST)
    present = jnp.sum(jnp.any(x != 0, axis=1)).astype(x.dtype)  # rows of zeros are padding
    return jnp.sum(residual**2) / jnp.maximum(present, 1)


def _uphill(x: Array, labels: Array, bases: Array, mask: Array, orthogonal: bool) -> Array:
    """``orth(S_k U_k)``; old directions stay where the points of a frame have none of their own."""
    num_components, dim, rank = bases.shape
    own = jax.nn.one_hot(labels, num_components, dtype=x.dtype)
    inside = own[:, :, None] * jnp.einsum("bn,knd->bkd", x, bases, precision=_HIGHEST)
    moved = jnp.einsum("bn,bkd->knd", x, inside, precision=_HIGHEST)
    size = jnp.sqrt(jnp.sum(moved**2, axis=(-2, -1), keepdims=True))
    keep = 10 * jnp.finfo(x.dtype).eps
    moved = moved / jnp.where(size > 0, size, 1) + keep * bases
    if not orthogonal:
        return orthonormalize(moved) * mask[None, None, :]
    weights = size / jnp.maximum(jnp.max(size), jnp.finfo(x.dtype).tiny)
    side_by_side = jnp.moveaxis(moved * jnp.maximum(weights, keep), 0, 1)
    joint = polar(side_by_side.reshape(dim, num_components * rank))
    return jnp.moveaxis(joint.reshape(dim, num_components, rank), 1, 0) * mask[None, None, :]


def _climb(x: Array, starts: Array, mask: Array, orthogonal: bool, max_iters: int) -> Array:
    """Iterate all restarts ``[r, K, n, d]`` until none moves."""
    tol = 30 * jnp.finfo(x.dtype).eps

    def improve(bases: Array) -> Array:
        return _uphill(x, assign_points(x, bases), bases, mask, orthogonal)

    def turned(new: Array, old: Array) -> Array:
        held = jnp.einsum("knd,kne->kde", old, new, precision=_HIGHEST)
        outside = new - jnp.einsum("knd,kde->kne", old, held, precision=_HIGHEST)
        return jnp.max(jnp.sum(outside**2, axis=(-2, -1)))

    def step(carry: Any) -> Any:
        i, bases, _ = carry
        new = jax.vmap(improve)(bases)
        return i + 1, new, jnp.max(jax.vmap(turned)(new, bases))

    running = lambda carry: (carry[0] < max_iters) & (carry[2] > tol**2)
    far = jnp.asarray(jnp.inf, x.dtype) + 0 * x[0, 0]
    return jax.lax.while_loop(running, step, (jnp.asarray(0), starts, far))[1]


def _starts(
    key: Any,
    x: Array,
    num_components: int,
    rank: int,
    num_restarts: int,
    kind: str,
    orthogonal: bool,
    mask: Array,
) -> Array:
    """First frames ``[r, K, n, d]``."""
    num_spectral = {"spectral": num_restarts, "random": 0, "mixed": (num_restarts + 1) // 2}[kind]
    keys = jax.random.split(key, num_restarts)
    draw = lambda k: _random_frames(k, x, num_components, rank, orthogonal) * mask[None, None, :]
    frames = jax.vmap(draw)(keys)
    if not num_spectral:
        return frames
    ridges = np.geomspace(*RIDGES, num_spectral) if num_spectral > 1 else np.ones(1) * 0.1
    labels = spectral_labels(x, num_components, jnp.asarray(ridges, x.dtype))

    def settle(labels: Array, bases: Array) -> Array:
        # From random frames, so a few steps with the labels held.
        move = lambda _, b: _uphill(x, labels, b, mask, orthogonal)
        return jax.lax.fori_loop(0, 4, move, bases)

    return frames.at[:num_spectral].set(jax.vmap(settle)(labels, frames[:num_spectral]))


def _random_frames(key: Any, x: Array, num_components: int, rank: int, orthogonal: bool) -> Array:
    """Frames inside the leading K d principal directions, jointly orthonormal if there is room."""
    dim = x.shape[1]
    total = min(num_components * rank, dim)
    scatter = jnp.matmul(x.T, x, precision=_HIGHEST)
    lead = jnp.linalg.eigh(scatter)[1][:, ::-1][:, :total]
    if num_components * rank <= dim:
        turn = orthonormalize(jax.random.normal(key, (total, total), x.dtype))
        joint = jnp.matmul(lead, turn, precision=_HIGHEST)
        return jnp.moveaxis(joint.reshape(dim, num_components, rank), 1, 0)
    free = jax.random.normal(key, (num_components, total, rank), x.dtype)
    return orthonormalize(jnp.einsum("nm,kmd->knd", lead, free, precision=_HIGHEST))


def spectral_labels(
    x: Float[Array, "num_samples n"], num_clusters: int, ridges: Float[Array, " num_ridges"]
) -> Int[Array, "num_ridges num_samples"]:
    r"""Return labels from the affinity ``|G (G + ridge I)^{-1}|^2`` of the unit-length rows of x.

    ``G`` is their Gram matrix. The clusters are read off the leading eigenvectors of the normalised
    affinity by column-pivoted QR, without an iteration or a random start.

    Args:
        x: ``[N, n]``; rows of zeros get arbitrary labels.
        num_clusters: K.
        ridges: ``[m]``, > 0, as multiples of the mean eigenvalue of ``G`` that is not zero.

    References:
        See the module.
    """
    norms = safe_sqrt(jnp.sum(x**2, axis=1, keepdims=True))
    unit = x / jnp.where(norms > 0, norms, 1)
    values, vectors = jnp.linalg.eigh(jnp.matmul(unit, unit.T, precision=_HIGHEST))
    values = jnp.maximum(values, 0)
    mean = jnp.sum(values) / jnp.maximum(jnp.sum(values > 1e-5 * values[-1]), 1)

    def one(ridge: Array) -> Array:
        gains = values / (values + ridge * mean + jnp.finfo(x.dtype).tiny)
        affinity = jnp.matmul(vectors * gains[None, :], vectors.T, precision=_HIGHEST) ** 2
        affinity = affinity * (1 - jnp.eye(len(x), dtype=x.dtype))
        degree = jnp.sum(affinity, axis=1)
        scale = jnp.where(degree > 0, 1 / jnp.sqrt(jnp.where(degree > 0, degree, 1)), 0)
        normalised = scale[:, None] * affinity * scale[None, :]
        return _pivoted_labels(jnp.linalg.eigh(normalised)[1][:, -num_clusters:])

    return jax.lax.map(one, ridges)


def _pivoted_labels(embedding: Array) -> Array:
    """Clusters of the rows of ``[N, K]`` eigenvectors: K pivots, then the nearest pivot's axis."""
    num_clusters = embedding.shape[1]

    def pick(rest: Array, _: None) -> tuple[Array, Array]:
        pivot = jnp.argmax(jnp.sum(rest**2, axis=1))
        direction = rest[pivot] / jnp.maximum(
            jnp.linalg.norm(rest[pivot]), jnp.finfo(rest.dtype).tiny
        )
        along = jnp.matmul(rest, direction, precision=_HIGHEST)
        return rest - along[:, None] * direction[None, :], pivot

    _, pivots = jax.lax.scan(pick, embedding, None, length=num_clusters)
    turn = polar(embedding[pivots].T)
    coordinates = jnp.abs(jnp.matmul(embedding, turn, precision=_HIGHEST))
    return jnp.argmax(coordinates, axis=1).astype(jnp.int32)
