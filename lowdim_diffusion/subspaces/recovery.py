"""Did training find the subspaces? Components matched, and energy outside what should hold it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, Float, Int
from lowdim_diffusion.linalg import column_space, project
from lowdim_diffusion.subspaces._assignment import assign
from lowdim_diffusion.subspaces.angles import named_projector_distance


class Matching(NamedTuple):
    """Which learned component stands for which true one."""

    perm: Int[Array, "*k num_true"]
    """``perm[..., i]`` is the index of the learned component matched to the true component i."""
    distance: Float[Array, "*k num_true"]
    """Projector distance of each matched pair."""


def match_components(
    true_bases: Float[Array, "*k num_true n d"], bases: Float[Array, "*k2 num_learned n2 r"]
) -> Matching:
    """Return the one-to-one matching of components with the smallest sum of projector distances.

    Exact (the Hungarian method), and runs inside ``jit`` and ``vmap``.

    Args:
        true_bases: ``[..., num_true, n, d]``, full-rank frames; zero columns count as absent.
        bases: ``[..., num_learned, n, r]``, ``num_learned >= num_true``, of which surplus ones stay
            unmatched; leading axes (restarts, seeds) broadcast against those of ``true_bases``.

    Returns:
        ``(perm, distance)``, both ``[..., num_true]``. ``distance / sqrt(2 d)`` lies in [0, 1].

    Raises:
        ValueError: if there are fewer learned components than true ones, or as
            :func:`principal_angles`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> bases = jnp.eye(6).reshape(3, 2, 6).swapaxes(1, 2)
        >>> jax.jit(match_components)(bases, bases[jnp.array([2, 0, 1])]).perm.tolist()
        [1, 2, 0]
    """
    where, names = "match_components", ("true_bases", "bases")
    for name, a in zip(names, (true_bases, bases), strict=True):
        if a.ndim < 3:
            fix = "one component is a[None]"
            raise fail(where, f"wrong shape of {name}", "[..., components, n, rank]", a.shape, fix)
    if bases.shape[-3] < true_bases.shape[-3]:
        raise fail(
            where,
            "too few components",
            f"at least {true_bases.shape[-3]}",
            bases.shape[-3],
            "swap the arguments to match the learned ones to a part of the true ones",
        )
    each, every = true_bases[..., :, None, :, :], bases[..., None, :, :, :]
    distances = named_projector_distance(where, names, each, every)
    perm = jnp.vectorize(assign, signature="(i,j)->(i)")(distances)
    return Matching(perm, jnp.take_along_axis(distances, perm[..., None], axis=-1)[..., 0])


def off_span_energy(
    x: Float[Array, "*b n"], bases: Float[Array, "*k num_components n2 d"]
) -> Float[Array, "*c"]:
    r"""Return the share of each vector's energy outside the sum of the subspaces.

    .. math:: 1 - \lVert P x \rVert^2 / \lVert x \rVert^2, \qquad
        P \text{ the projector onto } \mathrm{span}[U_1 \dots U_K].

    Of generated samples this is the noise that a model adds off its data; :func:`off_union_energy`
    also counts samples that mix two subspaces.

    Args:
        x: ``[..., n]``; a zero vector has share 0.
        bases: ``[..., K, n, d]``, any frames; they may overlap. Leading axes broadcast against
            those of ``x``, as in :func:`lowdim_diffusion.linalg.project`.

    Examples:
        >>> import jax.numpy as jnp
        >>> bases = jnp.eye(3)[:, :2].T[:, :, None]  # the lines along e_1 and e_2
        >>> off_span_energy(jnp.array([[1.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), bases).tolist()
        [0.0, 0.6...]
    """
    x, bases = _same_space("off_span_energy", x, bases)
    side_by_side = jnp.moveaxis(bases, -3, -2)
    return _share_outside(x, side_by_side.reshape(*side_by_side.shape[:-2], -1))


def off_union_energy(
    x: Float[Array, "*b n"], bases: Float[Array, "*k num_components n2 d"]
) -> Float[Array, "*c"]:
    r"""Return the share of each vector's energy outside the nearest of the subspaces.

    .. math:: 1 - \max_k \lVert U_k^T x \rVert^2 / \lVert x \rVert^2.

    Args:
        x: ``[..., n]``; a zero vector has share 0.
        bases: ``[..., K, n, d]``, any frames; leading axes as in :func:`off_span_energy`.

    Examples:
        >>> import jax.numpy as jnp
        >>> bases = jnp.eye(3)[:, :2].T[:, :, None]  # the lines along e_1 and e_2
        >>> off_union_energy(jnp.array([[1.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), bases).tolist()
        [0.5, 0.6...]
    """
    x, bases = _same_space("off_union_energy", x, bases)
    return jnp.min(_share_outside(x[..., None, :], bases), axis=-1)


def _same_space(where: str, x: Array, bases: Array) -> tuple[Array, Array]:
    if bases.ndim < 3:
        fix = "one frame is bases[None]"
        raise fail(where, "wrong shape of bases", "[..., K, n, d]", bases.shape, fix)
    if x.shape[-1] != bases.shape[-2]:
        raise fail(where, "ambient dimensions differ", f"{bases.shape[-2]} in x", x.shape[-1])
    dtype = jnp.promote_types(jnp.result_type(x, bases), jnp.float32)
    return x.astype(dtype), bases.astype(dtype)


def _share_outside(x: Array, frame: Array) -> Array:
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)  # so that no square over- or underflows
    inside = project(column_space(frame), x)
    outside = jnp.sum((jnp.broadcast_to(x, inside.shape) - inside) ** 2, axis=-1)
    total = jnp.sum(x**2, axis=-1)
    return outside / jnp.broadcast_to(jnp.where(total > 0, total, 1), outside.shape)
