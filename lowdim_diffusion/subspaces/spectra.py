r"""Principal components, and the rank read off a spectrum of singular values."""

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail, is_concrete
from lowdim_diffusion._types import Array, Float, Int, Scalar


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
        ValueError: if ``rank`` exceeds n, there are no samples, or (outside ``jit``) ``x`` holds
            NaN or infinity.

    Examples:
        >>> import jax.numpy as jnp
        >>> abs(pca(jnp.array([[3.0, 0.0], [-2.0, 0.1]]), 1)).round(2).tolist()
        [[1.0], [0.01...]]
    """
    check_int("pca", "rank", rank)
    num_samples, dim = x.shape
    if num_samples == 0:
        raise fail("pca", "no samples", "at least one row", x.shape)
    if is_concrete(x) and not np.all(np.isfinite(np.asarray(x))):
        raise fail("pca", "x is not finite", "finite numbers", "NaN or infinity")
    if rank > dim:
        raise fail("pca", "rank too large", f"at most the data's dimension {dim}", rank)
    x = jnp.pad(x, ((0, max(rank - num_samples, 0)), (0, 0)))
    return jnp.linalg.svd(x, full_matrices=False)[2][:rank].T


def numerical_rank(
    s: Float[Array, "*k m"], energy: Scalar = 0.99, *, total: Float[Array, "*k"] | None = None
) -> Int[Array, "*k"]:
    r"""Return the smallest r whose leading singular values hold the given root-energy share.

    .. math:: \min\{ r : \sqrt{\textstyle\sum_{i \le r} s_i^2 / \sum_i s_i^2} > \eta \}

    Note the root: with ``energy = 0.99`` the kept part has 98.01 % of the squared energy. That is
    the rule behind the published rank curves; other rules give other ranks.

    Args:
        s: ``[..., m]`` singular values, >= 0, in any order. Without ``total`` all of them: the
            share is taken of their own sum. NaN anywhere gives m (m + 1 with ``total``).
        energy: eta in (0, 1).
        total: ``[...]``, ``sum_i s_i^2`` over the whole spectrum (the squared Frobenius norm), if
            ``s`` holds only the leading values.

    Returns:
        ``[...]`` int32 in 0 .. m; 0 only for an all-zero spectrum. With ``total``, ``m + 1`` says
        that the rank is more than m.

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
    scale = jnp.where(top > 0, top, 1)
    energies = jnp.cumsum((s / scale) ** 2, axis=-1)  # scaled: no overflow
    whole = energies[..., -1:]
    if total is not None:
        whole = total[..., None] / scale / scale
    share = jnp.sqrt(energies / jnp.where(whole == 0, 1, whole))
    rank = 1 + jnp.sum(~(share > energy), axis=-1, dtype=jnp.int32)
    most = s.shape[-1] + (total is not None)
    return jnp.where(top[..., 0] == 0, 0, jnp.minimum(rank, most))
