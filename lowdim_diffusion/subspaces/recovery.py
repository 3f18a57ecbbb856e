"""Did training find the subspaces? Components matched, and energy outside what should hold it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, Float, Int
from lowdim_diffusion.subspaces._assignment import assign
from lowdim_diffusion.subspaces.angles import projector_distance

_HIGHEST = jax.lax.Precision.HIGHEST


class Matching(NamedTuple):
    """Which learned component stands for which true one."""

    perm: Int[Array, " num_true"]
    """``perm[i]`` is the index of the learned component matched to the true component i."""
    distance: Float[Array, " num_true"]
    """Projector distance of each matched pair."""


def match_components(
    true_bases: Float[Array, "num_true n d"], bases: Float[Array, "num_learned n2 r"]
) -> Matching:
    """Return the one-to-one matching of components with the smallest sum of projector distances.

    Exact (the Hungarian method), and runs inside ``jit`` and ``vmap``.

    Args:
        true_bases: ``[num_true, n, d]``, full-rank frames; zero columns count as absent.
        bases: ``[num_learned, n, r]``, ``num_learned >= num_true``; surplus ones stay unmatched.

    Returns:
        ``(perm, distance)``, both ``[num_true]``. ``distance / sqrt(2 d)`` lies in [0, 1].

    Raises:
        ValueError: if there are fewer learned components than true ones, or as
            :func:`principal_angles`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> bases = jnp.eye(6).reshape(3, 2, 6).swapaxes(1, 2)
        >>> jax.jit(match_components)(bases, bases[jnp.array([2, 0, 1])]).perm.tolist()
        [1, 2, 0]
    """
    if bases.shape[0] < true_bases.shape[0]:
        raise fail(
            "match_components",
            "too few components",
            f"at least {true_bases.shape[0]}",
            bases.shape[0],
            "swap the arguments to match the learned ones to a part of the true ones",
        )
    distances = projector_distance(true_bases[:, None], bases[None, :])
    perm = assign(distances)
    return Matching(perm, jnp.take_along_axis(distances, perm[:, None], axis=1)[:, 0])


def off_span_energy(
    x: Float[Array, "*b n"], bases: Float[Array, "num_components n2 d"]
) -> Float[Array, "*b"]:
    r"""Return the share of each vector's energy outside the sum of the subspaces.

    .. math:: 1 - \lVert P x \rVert^2 / \lVert x \rVert^2, \qquad
        P \text{ the projector onto } \mathrm{span}[U_1 \dots U_K].

    Of generated samples this is the noise that a model adds off its data; :func:`off_union_energy`
    also counts samples that mix two subspaces.

    Args:
        x: ``[..., n]``; a zero vector has share 0.
        bases: ``[K, n, d]``, any frames; they may overlap.

    Examples:
        >>> import jax.numpy as jnp
        >>> bases = jnp.eye(3)[:, :2].T[:, :, None]  # the lines along e_1 and e_2
        >>> off_span_energy(jnp.array([[1.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), bases).tolist()
        [0.0, 0.6...]
    """
    _check_space("off_span_energy", x, bases)
    side_by_side = jnp.concatenate(list(bases), axis=-1)
    return _share_outside(x, _basis(side_by_side))


def off_union_energy(
    x: Float[Array, "*b n"], bases: Float[Array, "num_components n2 d"]
) -> Float[Array, "*b"]:
    r"""Return the share of each vector's energy outside the nearest of the subspaces.

    .. math:: 1 - \max_k \lVert U_k^T x \rVert^2 / \lVert x \rVert^2.

    Args:
        x: ``[..., n]``; a zero vector has share 0.
        bases: ``[K, n, d]``, any frames.

    Examples:
        >>> import jax.numpy as jnp
        >>> bases = jnp.eye(3)[:, :2].T[:, :, None]  # the lines along e_1 and e_2
        >>> off_union_energy(jnp.array([[1.0, 1.0, 0.0], [0.0, 3.0, 4.0]]), bases).tolist()
        [0.5, 0.6...]
    """
    _check_space("off_union_energy", x, bases)
    return jnp.min(jnp.stack([_share_outside(x, _basis(b)) for b in bases]), axis=0)


def _check_space(where: str, x: Array, bases: Array) -> None:
    if x.shape[-1] != bases.shape[-2]:
        raise fail(where, "ambient dimensions differ", f"{bases.shape[-2]} in x", x.shape[-1])


def _basis(a: Array) -> Array:
    """Orthonormal basis of the span of the columns, zero columns standing for missing rank."""
    largest = jnp.max(jnp.abs(a), axis=-2, keepdims=True)
    a = a / jnp.where(largest > 0, largest, 1)  # so that the squares neither over- nor underflow
    norms = jnp.linalg.norm(a, axis=-2, keepdims=True)
    u, s, _ = jnp.linalg.svd(a / jnp.where(norms > 0, norms, 1), full_matrices=False)
    tol = max(a.shape) * jnp.finfo(s.dtype).eps
    return jnp.where((s <= tol * s[0])[None, :], 0, u)  # NaN stays


def _share_outside(x: Array, basis: Array) -> Array:
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    inside = jnp.matmul(x, basis, precision=_HIGHEST)
    outside = jnp.sum((x - jnp.matmul(inside, basis.T, precision=_HIGHEST)) ** 2, axis=-1)
    total = jnp.sum(x**2, axis=-1)
    return outside / jnp.where(total > 0, total, 1)
