r"""The low-rank denoising autoencoder of the theory, with trainable subspaces.

For ``x = x_0 + sigma eps`` and frames ``U_k``

.. math::
    \hat x_0 = \frac{1}{1+\sigma^2} \sum_k w_k U_k U_k^T x,\qquad
    w = \mathrm{softmax}_k\bigl(\varphi \lVert U_k^T x\rVert^2\bigr),\quad
    \varphi = \frac{1}{2\sigma^2(1+\sigma^2)},

the exact posterior mean of an equal mixture of ``N(0, U_k U_k^T)``. With *hard* assignment ``w`` is
the indicator of the largest ``||U_k^T .||``, taken of the clean example in training.

With ``cross_std`` delta > 0 and jointly orthonormal frames it is that of the noisy mixture, whose
examples also have noise delta in the subspaces of the other components
(:meth:`lowdim_diffusion.distributions.MoLRG.noisy`):

.. math::
    \hat x_0 = \sum_k \bigl(\xi + (\zeta - \xi) w_k\bigr) U_k U_k^T x,\quad
    \zeta = \frac1{1+\sigma^2},\quad \xi = \frac{\delta^2}{\delta^2+\sigma^2},\quad
    \varphi = \frac{1-\delta^2}{2(\delta^2+\sigma^2)(1+\sigma^2)}.

Its one tap ``gated``, ``[b, K, d]``, holds the example's coordinates ``U_k^T x``, gated by its
component: times ``w_k / (1 + sigma^2)`` or ``xi + (zeta - xi) w_k``. They make up the output,
``sum_k U_k gated_k``.

References:
    Wang, Zhang, Zhang, Chen, Ma, Qu 2024, "Diffusion Models Learn Low-Dimensional Distributions via
    Subspace Clustering", arXiv 2409.02426, lemma 1 and theorems 1-4. Li et al. 2025, arXiv
    2502.05743, proposition 1 (the noisy mixture).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, Float, Params
from lowdim_diffusion.linalg import orthonormalize, polar, random_frames
from lowdim_diffusion.networks._network import Network, check_data_shape, check_key, checked

_ORTHONORMAL = ("qr", "polar", "none")
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("lowrank", ...)``.

    Attributes:
        data_shape: shape of one example; ``n`` is its number of entries.
        num_components: K, number of subspaces.
        rank: d, dimension of each.
        orthonormal: how the free parameter becomes frames: ``"qr"``, ``"polar"`` (the nearest
            frame) or ``"none"``.
        joint: make ``[U_1 .. U_K]`` orthonormal together, as theorem 3 assumes; needs ``K d <= n``.
        assignment: ``"soft"`` (soft-max) or ``"hard"`` weights.
        cross_std: delta in [0, 1), noise of the data in the other components' subspaces; above 0 it
            needs ``joint``.
    """

    data_shape: tuple[int, ...]
    num_components: int = 1
    rank: int = 1
    orthonormal: str = "qr"
    joint: bool = False
    assignment: str = "soft"
    cross_std: float = 0.0


def frames(
    bases: Float[Array, "*s k n d"], *, orthonormal: str = "qr", joint: bool = False
) -> Float[Array, "*s k n d"]:
    """Return the frames ``U_k`` that the free parameter ``params["bases"]`` stands for.

    Args:
        bases: ``[..., K, n, d]``.
        orthonormal: as the network was built.
        joint: as the network was built.

    Examples:
        >>> import jax
        >>> u = frames(jax.random.normal(jax.random.key(0), (2, 6, 2)), joint=True)
        >>> bool(abs(u[0].T @ u[1]).max() < 1e-6)
        True
    """
    check_choice("lowrank.frames", "orthonormal", orthonormal, _ORTHONORMAL)
    if orthonormal == "none":
        return bases
    nearest = orthonormalize if orthonormal == "qr" else polar
    if not joint:
        return nearest(bases)
    *lead, k, n, d = bases.shape
    side_by_side = jnp.moveaxis(bases, -3, -2).reshape(*lead, n, k * d)
    return jnp.moveaxis(nearest(side_by_side).reshape(*lead, n, k, d), -2, -3)


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(config, data_shape=check_data_shape("lowrank", config.data_shape))
    data_shape = config.data_shape
    dim = math.prod(data_shape)
    check_int("lowrank", "num_components", config.num_components)
    check_int("lowrank", "rank", config.rank)
    check_choice("lowrank", "orthonormal", config.orthonormal, _ORTHONORMAL)
    check_choice("lowrank", "assignment", config.assignment, ("soft", "hard"))
    check_range("lowrank", "cross_std", config.cross_std, 0, 1, high_open=True)
    if config.cross_std and not config.joint:
        fix = "noise in the other subspaces needs orthogonal ones"
        raise fail("lowrank", f"cross_std {config.cross_std}", "joint=True", "joint=False", fix)
    if config.rank > dim:
        raise fail("lowrank", "rank too large", f"at most {dim}, the size of data", config.rank)
    if config.joint and config.orthonormal == "none":
        fix = 'pass orthonormal="qr" or "polar"'
        raise fail("lowrank", "joint=True", "orthonormal frames", 'orthonormal="none"', fix)
    if config.joint and config.num_components * config.rank > dim:
        raise fail(
            "lowrank",
            "no room for mutually orthogonal subspaces",
            f"num_components * rank <= {dim}",
            config.num_components * config.rank,
            "lower the rank or pass joint=False",
        )

    def init(key: Any) -> Params:
        check_key("lowrank.init", key)
        k, d = config.num_components, config.rank
        return {"bases": random_frames(key, k, dim, d, orthogonal=config.joint)}

    def bases_of(params: Params, dtype: Any) -> Array:
        bases = params["bases"].astype(dtype)
        return frames(bases, orthonormal=config.orthonormal, joint=config.joint)

    def gated(bases: Array, x: Array, c_noise: Array, clean: Array | None) -> Array:
        inside = lambda y: jnp.einsum(
            "knd,bn->bkd", bases, y.reshape(y.shape[0], -1), precision=_HIGHEST
        )
        coefficients = inside(x)
        var = jnp.exp(8 * c_noise).astype(x.dtype)
        if config.assignment == "soft":
            if clean is not None:
                raise fail("lowrank.apply", "unexpected clean", "None with soft assignment", "x0")
            energy = jnp.sum(coefficients**2, axis=-1)
            weights = _soft_weights(energy, c_noise.astype(x.dtype), config.cross_std)
        else:
            if clean is not None:
                check_shape("lowrank.apply", "clean", clean, x.shape)
            chosen = coefficients if clean is None else inside(jnp.asarray(clean, x.dtype))
            best = jnp.argmax(jnp.sum(chosen**2, axis=-1), axis=-1)
            weights = jax.nn.one_hot(best, config.num_components, dtype=x.dtype)
        own, other = 1 / (1 + var), config.cross_std**2 / (config.cross_std**2 + var)
        gain = other[:, None] + (own - other)[:, None] * weights
        return gain[..., None] * coefficients

    def forward(
        params: Params,
        x: Array,
        c_noise: Array,
        cond: Array | None,
        keys: Array | None,
        clean: Array | None = None,
    ) -> Array:
        del cond, keys
        bases = bases_of(params, x.dtype)
        parts = gated(bases, x, c_noise, clean)
        return jnp.einsum("knd,bkd->bn", bases, parts, precision=_HIGHEST).reshape(x.shape)

    def collect(params: Params, x: Array, c_noise: Array, *unused: Any) -> dict[str, Array]:
        del unused
        return {"gated": gated(bases_of(params, x.dtype), x, c_noise, None)}

    return Network(
        "lowrank",
        data_shape,
        init,
        checked("lowrank.apply", data_shape, forward),
        asdict(config),
        input_scale="clean",
        takes_clean=config.assignment == "hard",
        taps=("gated",),
        collect=checked("lowrank.features", data_shape, collect),
    )


def _soft_weights(energy: Array, c_noise: Array, cross_std: float) -> Array:
    """Return ``softmax(phi energy)`` over the last axis, finite from sigma 1e-4 to 1e3.

    Energies are compared before ``phi`` (up to 5e7) multiplies them, so that rounding enters
    through their difference only.
    """
    log_var = 8 * c_noise
    floor = 2 * math.log(cross_std) if cross_std else -math.inf
    log_phi = -jnp.logaddexp(log_var, floor) - jax.nn.softplus(log_var)
    phi = 0.5 * (1 - cross_std**2) * jnp.exp(log_phi)
    gap = energy - jax.lax.stop_gradient(jnp.max(energy, axis=-1, keepdims=True))
    return jax.nn.softmax(phi[:, None] * gap, axis=-1)
