r"""Principal angles between subspaces and the distances built on them.

For frames U ``[n, p]`` and V ``[n, q]`` with m = min(p, q), the principal angles are
``0 <= t_1 <= ... <= t_m <= pi/2`` with ``cos t = svd(U^T V)`` and, seen from the smaller frame,
``sin t = svd((I - VV^T) U)``. The cosine cannot tell angles below ``sqrt(eps)`` from zero, and the
sine those near ``pi/2``, so each angle is read off whichever is accurate there.

======================  ==============================================  =====================
distance                formula                                         range
======================  ==============================================  =====================
``projector_distance``  ``||P_U - P_V||_F = sqrt(|p-q| + 2 sum sin^2)``  [0, sqrt(2m + |p-q|)]
``spectral_distance``   ``||P_U - P_V||_2 = sin t_m``, 1 if p != q       [0, 1]
``chordal_distance``    ``||sin t||_2``                                  [0, sqrt(m)]
``geodesic_distance``   ``||t||_2``                                      [0, sqrt(m) pi/2]
``affinity``            ``sqrt(mean cos^2 t)``                           [0, 1]
======================  ==============================================  =====================

All take *any* full-rank frames ``[..., n, rank]``: columns need not be orthonormal, and their
scales do not matter. Leading axes broadcast, and the result has them.

References:
    Bjorck & Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3; Knyazev & Argentati 2002,
    doi:10.1137/S1064827500377332; Ye & Lim 2016, arXiv 1407.0900 (unequal dimensions).
"""

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import fail, is_concrete
from lowdim_diffusion._types import Array, Float, Int
from lowdim_diffusion.linalg import column_space, safe_sqrt

_HIGHEST = jax.lax.Precision.HIGHEST


def _same_space(where: str, names: tuple[str, str], u: Array, v: Array) -> tuple[Array, Array]:
    """Both in one floating dtype; refuses frames of different ambient dimension."""
    for name, a in zip(names, (u, v), strict=True):
        if a.ndim < 2:
            fix = "a single vector is a[:, None]"
            raise fail(where, f"wrong shape of {name}", "[..., n, rank]", a.shape, fix)
    if u.shape[-2] != v.shape[-2]:
        expected = f"{u.shape[-2]} rows in {names[1]}"
        raise fail(where, "ambient dimensions differ", expected, v.shape[-2])
    dtype = jnp.promote_types(jnp.result_type(u, v), jnp.float32)
    return u.astype(dtype), v.astype(dtype)


def _spanned(where: str, name: str, a: Array, columns: Array | int) -> Array:
    """Orthonormal basis of the span of ``a``; refuses or marks with NaN one of lower dimension."""
    dim, rank = a.shape[-2:]
    if rank > dim or rank == 0:
        raise fail(where, f"wrong number of columns in {name}", f"1 to {dim} (its rows)", rank)
    basis = column_space(a)
    ok = jnp.all(jnp.isfinite(basis), axis=(-2, -1)) & (_num_nonzero(basis) == columns)
    if is_concrete(ok) and not bool(jnp.all(ok)):
        raise fail(
            where,
            f"the columns of {name} are not linearly independent",
            f"rank {rank}",
            "a lower rank, or entries that are not finite",
            "drop zero and repeated columns",
        )
    return jnp.where(ok[..., None, None], basis, jnp.nan)


def _num_nonzero(a: Array) -> Int[Array, "*k"]:
    """How many columns are not zero."""
    return jnp.sum(jnp.any(a != 0, axis=-2), axis=-1)


def principal_angles(
    u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]
) -> Float[Array, "*k3 m"]:
    r"""Return the principal angles between the spans of ``u`` and ``v``, in radians, ascending.

    Accurate to rounding at both ends: from 0 (where ``arccos`` alone has a floor of 1.5e-8 in
    float64 and 3e-4 in float32) to pi/2. Where an angle is 0 or pi/2 the derivative does not
    exist and a finite one is returned; losses are better built on the squared chordal distance.

    Args:
        u: ``[..., n, p]``, any frame of full column rank.
        v: ``[..., n, q]``, likewise; leading axes broadcast against those of ``u``.

    Returns:
        ``[..., min(p, q)]`` in [0, pi/2]. Under ``jit``, where values cannot raise, a frame whose
        columns are linearly dependent gives NaN instead of the error.

    Raises:
        ValueError: if the ambient dimensions differ, or a frame has more columns than rows or
            (outside ``jit``) linearly dependent columns.

    Examples:
        >>> import jax.numpy as jnp
        >>> u = jnp.array([[1.0], [0.0], [0.0]])
        >>> v = jnp.array([[1e6], [1.0], [0.0]])
        >>> print(f"{principal_angles(u, v)[0]:.3g}")
        1e-06
    """
    return _angles("principal_angles", u, v)


def _angles(where: str, u: Array, v: Array) -> Array:
    u, v = _same_space(where, ("u", "v"), u, v)
    u, v = (_spanned(where, name, a, a.shape[-1]) for name, a in (("u", u), ("v", v)))
    if u.shape[-1] > v.shape[-1]:
        u, v = v, u
    lead = jnp.broadcast_shapes(u.shape[:-2], v.shape[:-2])
    u = jnp.broadcast_to(u, lead + u.shape[-2:])
    v = jnp.broadcast_to(v, lead + v.shape[-2:])
    vt = jnp.swapaxes(v, -1, -2)
    outside = lambda x: x - jnp.matmul(v, jnp.matmul(vt, x, precision=_HIGHEST), precision=_HIGHEST)
    cos = jnp.linalg.svd(jnp.matmul(vt, u, precision=_HIGHEST), compute_uv=False)
    sin = jnp.linalg.svd(outside(outside(u)), compute_uv=False)[..., ::-1]
    wide = cos**2 < 0.5
    by_cos = jnp.arccos(jnp.where(wide, cos, 0.5))
    by_sin = jnp.arcsin(jnp.clip(jnp.where(wide, 0.5, sin), 0, 1))
    # NaN cosines fall to the sine's branch, which is NaN as well. Rounding may swap neighbours.
    return jnp.sort(jnp.where(wide, by_cos, by_sin), axis=-1)


def projector_distance(
    u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]
) -> Float[Array, "*k3"]:
    r"""Return ``||P_U - P_V||_F``, which is 0 for equal spans and sqrt(p + q) for orthogonal ones.

    This is the recovery error of the subspace-learning experiments. With p = q = d its largest
    value is ``sqrt(2 d)`` (where n >= 2d). It is computed from ``(I - VV^T) U``, so that it is
    accurate for tiny distances and differentiable away from 0. Columns that are zero count as
    absent: p and q are the numbers of the others, as in a mixture of unequal ranks. Otherwise
    arguments and errors are those of :func:`principal_angles`.

    Examples:
        >>> import jax.numpy as jnp
        >>> eye = jnp.eye(4)
        >>> float(projector_distance(eye[:, :2], eye[:, :3]))
        1.0
    """
    return named_projector_distance("projector_distance", ("u", "v"), u, v)


def named_projector_distance(where: str, names: tuple[str, str], u: Array, v: Array) -> Array:
    """:func:`projector_distance`, with errors in the name of the function that calls it."""
    u, v = _same_space(where, names, u, v)
    p, q = _num_nonzero(u), _num_nonzero(v)
    u, v = _spanned(where, names[0], u, p), _spanned(where, names[1], v, q)
    lead = jnp.broadcast_shapes(p.shape, q.shape)
    p, q = jnp.broadcast_to(p, lead), jnp.broadcast_to(q, lead)

    def outside(x: Array, y: Array) -> Array:
        """Squared sines of the angles from the span of ``x`` to that of ``y``."""
        yt = jnp.swapaxes(y, -1, -2)
        x = jnp.broadcast_to(x, lead + x.shape[-2:])
        for _ in range(2):
            x = x - jnp.matmul(y, jnp.matmul(yt, x, precision=_HIGHEST), precision=_HIGHEST)
        return jnp.sum(x**2, axis=(-2, -1))

    sines = jnp.where(p <= q, outside(u, v), outside(v, u))
    return safe_sqrt(jnp.abs(p - q) + 2 * sines)


def spectral_distance(
    u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]
) -> Float[Array, "*k3"]:
    """Return ``||P_U - P_V||_2``, the sine of the largest angle, or 1 if ``p != q`` (the "gap").

    Arguments and errors as in :func:`principal_angles`.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(spectral_distance(jnp.eye(3)[:, :1], jnp.array([[3.0], [4.0], [0.0]])))
        0.8...
    """
    largest = jnp.sin(_angles("spectral_distance", u, v)[..., -1])
    return largest if u.shape[-1] == v.shape[-1] else jnp.where(jnp.isnan(largest), largest, 1)


def chordal_distance(u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]) -> Float[Array, "*k3"]:
    """Return ``||sin t||_2``, the projector distance divided by sqrt(2) when ``p = q``.

    With unequal dimensions this is the distance to the nearest subspace of the larger one.
    Arguments and errors as in :func:`principal_angles`.
    """
    return safe_sqrt(jnp.sum(jnp.sin(_angles("chordal_distance", u, v)) ** 2, axis=-1))


def geodesic_distance(
    u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]
) -> Float[Array, "*k3"]:
    """Return ``||t||_2``, the arc length between the subspaces on the Grassmannian.

    With unequal dimensions this is the distance to the nearest subspace of the larger one.
    Arguments and errors as in :func:`principal_angles`.
    """
    return safe_sqrt(jnp.sum(_angles("geodesic_distance", u, v) ** 2, axis=-1))


def affinity(u: Float[Array, "*k n p"], v: Float[Array, "*k2 n2 q"]) -> Float[Array, "*k3"]:
    """Return ``sqrt(mean cos^2 t) = ||U^T V||_F / sqrt(min(p, q))``: 1 contained, 0 orthogonal.

    Arguments and errors as in :func:`principal_angles`.

    References:
        Soltanolkotabi & Candes 2012, arXiv 1112.4258, definition 1.2.
    """
    return safe_sqrt(jnp.mean(jnp.cos(_angles("affinity", u, v)) ** 2, axis=-1))
