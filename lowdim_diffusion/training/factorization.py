r"""Low-rank training: three-factor adapters of a trained network, and factors made small.

*Adapters.* A trained kernel W stays as it is and a product of small factors is trained beside it,

.. math:: W + F_1 F_2 F_3, \qquad F_1 \in R^{m \times r},\; F_2 \in R^{r \times r},\;
    F_3 \in R^{r \times n},

all beginning as orthonormal frames times a small scale (Deep LoRA; with two factors it is LoRA).
The depth makes the trained change low-rank by itself, whatever r: with few examples it overfits
less, and r matters less. An adapter is a tree of factors; :func:`merge_adapter` makes ordinary
parameters of both.

*Compression.* Gradient descent on ``loss(W_L ... W_1)`` from scaled orthogonal factors moves each
factor only inside a subspace of twice the rank r of the target, known from the gradient at zero.
:func:`compress` returns the ``2r x 2r`` factors that follow the same product at a fraction of the
cost.

References:
    Yaras, Wang, Balzano, Qu 2024, "Compressible dynamics in deep overparameterized low-rank
    learning & adaptation", arXiv 2406.04112.
"""

import fnmatch
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, Float, LossFn, Params, PRNGKey, Scalar
from lowdim_diffusion.linalg import column_space, random_frames
from lowdim_diffusion.training import _leaves

__all__ = [
    "Compressed",
    "adapter_loss",
    "compress",
    "factor_product",
    "init_adapter",
    "merge_adapter",
    "orthogonal_factors",
]


# ---- adapters -----------------------------------------------------------------------------------


def init_adapter(
    key: PRNGKey,
    params: Params,
    rank: int,
    *,
    paths: Sequence[str] = ("*kernel",),
    depth: int = 3,
    scale: float = 1e-3,
) -> Params:
    """Return the factors of an adapter for the chosen kernels of a network.

    Kernels of dense layers are ``[in, out]``; those of convolutions, ``[*window, in, out]``, are
    taken as matrices ``[window in, out]``. Where a side is shorter than ``rank`` it is the rank.

    Args:
        key: draws the factors.
        params: trained parameters of any of our networks.
        rank: r.
        paths: which leaves to adapt, patterns of ``a/b/kernel`` with ``*``; biases and other
            vectors stay as they are.
        depth: number of factors: 3 is Deep LoRA, 2 LoRA.
        scale: of each factor at the start; the change begins as ``scale^depth``, by default below
            the rounding of float32 kernels.

    Returns:
        ``{path: (factor, ...)}``, a tree to train: for :func:`adapter_loss`.

    Raises:
        ValueError: if a pattern matches no leaf of two or more axes; the leaves are then listed.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import networks
        >>> net = networks.make("mlp", data_shape=(8,), width=16, depth=1)
        >>> params = net.init(jax.random.key(0))
        >>> factors = init_adapter(jax.random.key(1), params, 4, paths=("first_*/kernel", "out/*"))
        >>> {path: [f.shape for f in fs] for path, fs in factors.items()}["out/zero_kernel"]
        [(16, 4), (4, 4), (4, 8)]

    References:
        Yaras, Wang, Balzano, Qu 2024, arXiv 2406.04112; Hu et al. 2021, arXiv 2106.09685 (LoRA).
    """
    where = "init_adapter"
    check_int(where, "rank", rank)
    check_int(where, "depth", depth, 2)
    check_range(where, "scale", scale, 0, low_open=True)
    kernels = {path: leaf for path, leaf in _leaves.flatten(params).items() if leaf.ndim > 1}
    for pattern in paths:
        if not fnmatch.filter(kernels, pattern):
            raise fail(where, "no kernel matches", f"some of {', '.join(kernels)}", repr(pattern))
    chosen = [p for p in kernels if any(fnmatch.fnmatchcase(p, pattern) for pattern in paths)]
    factors = {}
    for i, path in enumerate(chosen):
        leaf = kernels[path]
        sides = math.prod(leaf.shape[:-1]), leaf.shape[-1]
        r = min(rank, *sides)
        keys = jax.random.split(jax.random.fold_in(key, i), depth)
        shapes = [(sides[0], r), *[(r, r)] * (depth - 2), (r, sides[1])]
        frames = [_frame(k, shape, leaf.dtype) for k, shape in zip(keys, shapes, strict=True)]
        factors[path] = tuple(scale * frame for frame in frames)
    return factors


def _frame(key: PRNGKey, shape: tuple[int, int], dtype: Any) -> Array:
    """A matrix with orthonormal rows or columns, whichever are fewer."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frame = random_frames(key, 1, max(shape), min(shape), dtype=wide)[0]
    return frame if frame.shape == shape else frame.T


def merge_adapter(params: Params, factors: Params, *, strength: Scalar = 1.0) -> Params:
    """Return ``params`` with ``strength F_1 F_2 ...`` added to each adapted kernel.

    Args:
        params: the parameters that the adapter was made for.
        factors: from :func:`init_adapter`, trained.
        strength: how much of the change; 0 is the network as it was.

    Raises:
        ValueError: for factors of a leaf that is not there, or of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> factors = {"dense/kernel": (jnp.ones((2, 1)), jnp.ones((1, 1)), jnp.ones((1, 3)))}
        >>> merged = merge_adapter({"dense": {"kernel": jnp.zeros((2, 3))}}, factors)
        >>> merged["dense"]["kernel"].sum().item()
        6.0
    """
    where, leaves = "merge_adapter", _leaves.flatten(params)
    missing = sorted(factors.keys() - leaves.keys())
    if missing:
        raise fail(where, "no such kernel", f"some of {', '.join(leaves)}", missing[0])
    merged = []
    for path, leaf in leaves.items():
        if path in factors:
            change = functools.reduce(_mm, factors[path])
            sides = (math.prod(leaf.shape[:-1]), leaf.shape[-1])
            check_shape(where, f"the change of {path}", change, sides, "another network's adapter?")
            leaf = leaf + (strength * change).reshape(leaf.shape).astype(leaf.dtype)
        merged.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), merged)


def adapter_loss(loss_fn: LossFn, params: Params) -> LossFn:
    """Return the loss as a function of an adapter's factors, for everything that trains.

    Args:
        loss_fn: ``(params, batch, key) -> loss``, such as ``losses.make_loss(net, schedule)``.
        params: trained parameters, which stay.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowdim_diffusion import losses, networks, schedules, training
        >>> net = networks.make("mlp", data_shape=(4,), width=8, depth=1)
        >>> params, key = net.init(jax.random.key(0)), jax.random.key(1)
        >>> loss_fn = losses.make_loss(net, schedules.VE())
        >>> factors, metrics = training.fit(
        ...     key,
        ...     training.init_adapter(key, params, 2),
        ...     training.adapter_loss(loss_fn, params),
        ...     optax.adam(1e-2),
        ...     lambda key, step: {"x": jnp.ones((16, 4))},
        ...     20,
        ... )
        >>> tuned = training.merge_adapter(params, factors)
        >>> tuned.keys() == params.keys()
        True
    """
    return lambda factors, batch, key: loss_fn(merge_adapter(params, factors), batch, key)


# ---- compression --------------------------------------------------------------------------------


def orthogonal_factors(
    key: PRNGKey, dim: int, depth: int, scale: float, *, dtype: Any = jnp.float32
) -> tuple[Array, ...]:
    """Return ``(W_1, ..., W_L)``, random orthogonal ``[dim, dim]`` matrices times ``scale``."""
    check_int("orthogonal_factors", "dim", dim)
    check_int("orthogonal_factors", "depth", depth)
    return tuple(scale * random_frames(key, depth, dim, dim, dtype=dtype))


def factor_product(factors: Sequence[Array]) -> Array:
    """Return ``W_L ... W_1`` of ``(W_1, ..., W_L)``."""
    return functools.reduce(lambda done, w: _mm(w, done), factors)


class Compressed(NamedTuple):
    """Small factors between two frames: ``left W_L ... W_1 right^T`` is the whole product."""

    factors: tuple[Float[Array, "k k"], ...]
    """To be trained: ``W_l = scale I`` at the start, k = 2 rank."""
    left: Float[Array, "n k"]
    """Orthonormal columns, fixed."""
    right: Float[Array, "n k"]
    """Likewise."""

    def whole(self, factors: Sequence[Array]) -> Float[Array, "n n"]:
        """Return the ``[n, n]`` product that small factors stand for."""
        return _mm(_mm(self.left, factor_product(factors)), self.right.T)


def compress(factors: Sequence[Array], gradient: Float[Array, "n n"], rank: int) -> Compressed:
    r"""Return factors of side 2 rank whose gradient descent follows that of the given ones.

    With ``loss(W) = ||W - M||^2 / 2`` and M of rank r, the product of the small factors is equal to
    that of the large ones at every step, but for a part of size ``scale^L`` that does not move. For
    another loss, as far as its gradients stay in the row and column space of the first.

    Args:
        factors: ``(W_1, ..., W_L)`` at the start, orthogonal matrices times one scale.
        gradient: of the loss with respect to the product, at zero: ``jax.grad(loss)(zeros)``.
        rank: r, that of the gradient; a larger one is exact too, as long as ``2 rank <= n``.

    Raises:
        ValueError: for matrices of different sides, or a rank beyond n / 2.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> factors = orthogonal_factors(jax.random.key(0), 6, 3, 0.1)
        >>> target = jnp.zeros((6, 6)).at[0, 1].set(2.0)
        >>> small = compress(factors, -target, 1)
        >>> [f.shape for f in small.factors], small.whole(small.factors).shape
        ([(2, 2), (2, 2), (2, 2)], (6, 6))

    References:
        Yaras, Wang, Balzano, Qu 2024, arXiv 2406.04112, section 3.
    """
    where, dim = "compress", gradient.shape[0]
    check_int(where, "rank", rank)
    for w in factors:
        check_shape(where, "a factor", w, (dim, dim), "square matrices of one size")
    if 2 * rank > dim:
        raise fail(where, "rank too large", f"at most {dim // 2}, n / 2", rank)
    u, _, vt = jnp.linalg.svd(gradient)
    start = factor_product(factors)
    size = jnp.linalg.norm(start) / dim**0.5  # scale^L: the product is orthogonal times it
    moving = [vt[:rank].T, _mm(start.T, u[:, :rank]) / size]
    right = column_space(jnp.concatenate(moving, axis=1))
    scale = size ** (1 / len(factors))
    small = tuple(scale * jnp.eye(2 * rank, dtype=start.dtype) for _ in factors)
    return Compressed(small, _mm(start, right) / size, right)


def _mm(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
