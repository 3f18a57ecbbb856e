r"""Singular values of data matrices and of a denoiser's Jacobian, and the rank read off them.

The Jacobian ``J = d x0_hat / d x_t`` of the posterior mean is ``(alpha / sigma^2) Cov[x_0 | x_t]``:
its leading singular vectors span the directions in which the clean image can still change, and its
rank counts them. For data near a union of subspaces the rank is small except at the lowest noise.

Everything here takes a batched function ``fn: [b, *data] -> [b, *out]`` that treats each example
alone, as a denoiser with its time bound does, and never forms more than it returns: one
linearization is shared by all vectors and all examples.

References:
    Wang et al. 2024, arXiv 2409.02426, eq. (52) (numerical rank, Jacobian study);
    Chen et al. 2024, arXiv 2409.02374 (spectra along sampling trajectories, power method);
    Halko, Martinsson & Tropp 2011, arXiv 0909.4061 (subspace iteration).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, Int, PRNGKey, Scalar, Schedule
from lowdim_diffusion.linalg import block_power


def pca(x: Float[Array, "num_samples n"], rank: int) -> Float[Array, "n rank"]:
    r"""Return the leading ``rank`` principal directions of the rows of ``x``, uncentred.

    The columns maximise ``sum_i ||U^T x_i||^2`` over orthonormal U; subspaces through the origin
    are meant, so no mean is removed (pass ``x - x.mean(0)`` for the usual centred analysis). With
    fewer samples than ``rank``, or dependent ones, the frame is completed by arbitrary directions.

    Args:
        x: ``[num_samples, n]``, one example per row.
        rank: 1 <= rank <= n.

    Returns:
        ``[n, rank]`` with orthonormal columns, by descending singular value; signs are arbitrary.

    Raises:
        ValueError: if ``rank`` exceeds n or there are no samples.

    Examples:
        >>> import jax.numpy as jnp
        >>> abs(pca(jnp.array([[3.0, 0.0], [-2.0, 0.1]]), 1)).round(2).tolist()
        [[1.0], [0.01...]]
    """
    check_int("pca", "rank", rank)
    num_samples, dim = x.shape
    if num_samples == 0:
        raise fail("pca", "no samples", "at least one row", x.shape)
    if rank > dim:
        raise fail("pca", "rank too large", f"at most the data's dimension {dim}", rank)
    x = jnp.pad(x, ((0, max(rank - num_samples, 0)), (0, 0)))
    return jnp.linalg.svd(x, full_matrices=False)[2][:rank].T


def numerical_rank(s: Float[Array, "*k m"], energy: Scalar = 0.99) -> Int[Array, "*k"]:
    r"""Return the smallest r whose leading singular values hold the given root-energy share.

    .. math:: \min\{ r : \sqrt{\textstyle\sum_{i \le r} s_i^2 / \sum_i s_i^2} > \eta \}

    Note the root: with ``energy = 0.99`` the kept part has 98.01 % of the squared energy. That is
    the rule behind the published rank curves; other rules give other ranks.

    Args:
        s: ``[..., m]`` singular values, >= 0, in any order. All of them: the share is taken of
            their own sum. NaN anywhere gives m.
        energy: eta in (0, 1).

    Returns:
        ``[...]`` int32 in 0 .. m; 0 only for an all-zero spectrum.

    Examples:
        >>> import jax.numpy as jnp
        >>> int(numerical_rank(jnp.array([3.0, 1.0, 0.1])))
        2

    References:
        Wang et al. 2024, arXiv 2409.02426, eq. (52); Chen et al. 2024, arXiv 2409.02374, sec. 3.
    """
    check_range("numerical_rank", "energy", energy, 0, 1, low_open=True, high_open=True)
    s = -jnp.sort(-s, axis=-1)
    top = s[..., :1]
    energies = jnp.cumsum((s / jnp.where(top > 0, top, 1)) ** 2, axis=-1)  # scaled: no overflow
    total = energies[..., -1:]
    share = jnp.sqrt(energies / jnp.where(total == 0, 1, total))
    rank = 1 + jnp.sum(~(share > energy), axis=-1, dtype=jnp.int32)
    return jnp.where(top[..., 0] == 0, 0, jnp.minimum(rank, s.shape[-1]))


class JacobianInfo(NamedTuple):
    """How the iteration of :func:`jacobian_svd` ended."""

    change: Float[Array, " b"]
    """Sine by which the leading subspace still turned at the end; converged if <= tol."""
    num_iters: Int[Array, ""]
    """Iterations run, the same for the whole batch."""


def _linearize(fn: Callable[[Array], Array], x: Array) -> tuple[Any, Any, int, tuple[int, ...]]:
    """Products of the flattened Jacobian with ``[b, n, w]`` and of its transpose, off one pass."""
    y, jvp = jax.linearize(fn, x)
    if y.ndim == 0 or y.shape[0] != x.shape[0]:
        raise fail("jacobian", "fn must keep the batch axis", f"({x.shape[0]}, ...)", y.shape)
    transposed = jax.linear_transpose(jvp, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)  # QR and SVD know no half precision

    def columns(product: Callable[[Array], Array], like: Array) -> Callable[[Array], Array]:
        def run(v: Array) -> Array:
            v = jnp.moveaxis(v, -1, 0)
            v = v.reshape(v.shape[:1] + like.shape).astype(like.dtype)
            # Equal branches: only tells shard_map that v varies over the devices as the data does.
            v = jnp.where(like[None] == 0, v, v)
            out = jax.vmap(product)(v)
            return jnp.moveaxis(out.reshape((*out.shape[:2], -1)), 0, -1).astype(wide)

        return run

    matmat = columns(jvp, x)
    rmatmat = columns(lambda v: transposed(v)[0], y)
    return matmat, rmatmat, math.prod(x.shape[1:]), y.shape


def jacobian_svd(
    fn: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    rank: int,
    *,
    key: PRNGKey,
    max_iters: int = 50,
    tol: float = 1e-4,
    oversample: int = 8,
    return_info: bool = False,
) -> Any:
    r"""Return the leading singular triplets of the Jacobian of ``fn`` at each example of ``x``.

    Block subspace iteration on one ``jax.linearize`` of ``fn``, transposed once, all vectors of all
    examples batched; the Jacobian is never formed. Stops when every example's leading right
    subspace turns by less than ``tol`` (see :func:`lowdim_diffusion.linalg.block_power`).

    Args:
        fn: ``[b, *data] -> [b, *out]``, each example alone, e.g. ``lambda x: denoise_fn(x, t)``.
        x: ``[b, *data]``, where to differentiate.
        rank: number of triplets, 1 <= rank <= min(n, out) of the flattened sizes.
        key: draws the start block, the same for every example, so results do not depend on the
            rest of the batch but for the common number of iterations.
        max_iters: bound on iterations; each costs ``rank + oversample`` forward and as many
            reverse products per example.
        tol: sine of the angle; singular values are accurate to about its square.
        oversample: extra vectors that speed up convergence.
        return_info: also return :class:`JacobianInfo`, which says whether it converged.

    Returns:
        ``(u, s, vt)``: ``u [b, out, rank]``, ``s [b, rank]`` descending, ``vt [b, rank, n]``, over
        flattened data; with ``return_info`` ``((u, s, vt), info)``. Signs, and directions inside
        equal singular values, are arbitrary. Not differentiable.

    Raises:
        ValueError: if ``rank`` exceeds the Jacobian's sides or ``fn`` changes the batch axis.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([5.0, 3.0, 1.0, 0.0])
        >>> x = jnp.ones((2, 4))
        >>> u, s, vt = jacobian_svd(lambda x: x * scale[None], x, 2, key=jax.random.key(0))
        >>> bool(jnp.allclose(s, jnp.array([[5.0, 3.0]] * 2)))
        True

    References:
        Chen et al. 2024, arXiv 2409.02374, algorithm 1 (generalized power method, the same idea).
    """
    check_int("jacobian_svd", "rank", rank)
    check_int("jacobian_svd", "oversample", oversample, low=0)
    matmat, rmatmat, dim, out_shape = _linearize(fn, x)
    largest = min(dim, math.prod(out_shape[1:]))
    if rank > largest:
        raise fail("jacobian_svd", "rank too large", f"at most {largest}, min(n, out)", rank)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    start = jax.random.normal(key, (1, dim, min(rank + oversample, largest)), dtype)
    start = jnp.broadcast_to(start, (x.shape[0], *start.shape[1:]))
    found = block_power(matmat, rmatmat, start, rank=rank, max_iters=max_iters, tol=tol)
    svd = (found.u, found.s, jnp.swapaxes(found.v, -1, -2))
    return (svd, JacobianInfo(found.change, found.num_iters)) if return_info else svd


def jacobian_spectrum(
    fn: Callable[[Array], Array], x: Float[Array, "b *data"], *, chunk: int = 64
) -> Float[Array, "b m"]:
    """Return all ``m = min(n, out)`` singular values of the Jacobian of ``fn`` at each example.

    Builds the dense Jacobian from basis vectors of its shorter side, ``chunk`` at a time off one
    linearization, then takes its singular values: memory ``b n out``, time ``b n out min(n, out)``.
    For n beyond a few thousand use :func:`jacobian_svd`.

    Args:
        fn: ``[b, *data] -> [b, *out]``, each example alone.
        x: ``[b, *data]``.
        chunk: vectors pushed through at once; bounds the memory of the network's pass.

    Returns:
        ``[b, m]``, descending.

    Examples:
        >>> import jax.numpy as jnp
        >>> jacobian_spectrum(lambda x: x**2, jnp.array([[1.0, 3.0]])).tolist()
        [[6.0, 2.0]]
    """
    check_int("jacobian_spectrum", "chunk", chunk)
    matmat, rmatmat, dim, out_shape = _linearize(fn, x)
    out = math.prod(out_shape[1:])
    product, side = (matmat, dim) if dim <= out else (rmatmat, out)

    def column(i: Array) -> Array:
        unit = jax.nn.one_hot(i, side, dtype=jnp.promote_types(x.dtype, jnp.float32))
        return product(jnp.broadcast_to(unit[None, :, None], (x.shape[0], side, 1)))[..., 0]

    jacobian = jax.lax.map(column, jnp.arange(side), batch_size=min(chunk, side))
    return jnp.linalg.svd(jnp.moveaxis(jacobian, 0, -1), compute_uv=False)


def trajectory_spectra(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    trajectory_x: Float[Array, "T b *data"],
    ts: Float[Array, " num_times"],
    *,
    rank: int | None = None,
    key: PRNGKey | None = None,
    chunk: int = 64,
    max_iters: int = 50,
    tol: float = 1e-4,
) -> Float[Array, "T b m"]:
    r"""Return the singular values of the denoiser's Jacobian at every noise level of a trajectory.

    The derivative is taken with respect to ``x_t / alpha(t)``, EDM's variable, so that spectra of
    different schedules agree: ``alpha(t)`` times ``d x0_hat / d x_t``, whose rank is the same. One
    compiled program: noise levels run one after the other, examples and vectors together.

    Args:
        denoise_fn: ``(x_t [b, *data], t scalar) -> x0_hat [b, *data]``.
        schedule: gives ``alpha(t)``.
        trajectory_x: ``[T, b, *data]``, states x_t as a sampler saves them, or clean data with
            noise added at each level.
        ts: ``[T]``, their times; leave out t = 0, where the denoiser is the identity.
        rank: None for all ``m = n`` singular values by :func:`jacobian_spectrum` (n up to about a
            thousand), else the leading ``m = rank`` by :func:`jacobian_svd`.
        key: start block, needed with ``rank``.
        chunk: vectors at once in the full spectrum.
        max_iters: as in :func:`jacobian_svd`.
        tol: as in :func:`jacobian_svd`.

    Returns:
        ``[T, b, m]``, descending along the last axis. ``numerical_rank(.) / n`` against
        ``alpha / sigma`` is the published rank curve; it needs the full spectrum.

    Raises:
        ValueError: if the lengths differ, or ``rank`` comes without a ``key``.

    References:
        Wang et al. 2024, arXiv 2409.02426, Jacobian figure; Chen et al. 2024, arXiv 2409.02374.
    """
    where = "trajectory_spectra"
    if trajectory_x.shape[0] != ts.shape[0]:
        raise fail(where, "one time per state", f"{trajectory_x.shape[0]} times", ts.shape[0])
    if rank is not None and key is None:
        raise fail(where, "rank needs a key", "key=jax.random.key(...)", None)

    def level(state: tuple[Array, Array]) -> Array:
        x, t = state
        fn = lambda x: denoise_fn(x, t)
        if rank is None or key is None:
            s = jacobian_spectrum(fn, x, chunk=chunk)
        else:
            s = jacobian_svd(fn, x, rank, key=key, max_iters=max_iters, tol=tol)[1]
        return s * schedule.alpha(t).astype(s.dtype)

    return jax.lax.map(level, (trajectory_x, ts))
