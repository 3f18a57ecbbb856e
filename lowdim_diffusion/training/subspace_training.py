r"""Training in a random subspace of the parameters, which measures how hard an objective is.

.. math:: \theta = \theta_0 + P\, \theta_d, \qquad P \in R^{D \times d}
    \text{ fixed, random, with columns of unit norm.}

The smallest d at which training reaches (90 % of) what full training does is the *intrinsic
dimension* of the objective: D minus the dimension of the set of solutions, where that is a linear
space. Three kinds of P: dense, and two that need no ``D d`` memory: sparse with ``sqrt(D)`` entries
in each column, and Fastfood, products of Hadamard matrices, a permutation and diagonal ones.

References:
    Li, Farkhoor, Liu, Yosinski 2018, "Measuring the intrinsic dimension of objective landscapes",
    arXiv 1804.08838; Le, Sarlos, Smola 2013, "Fastfood", arXiv 1408.3060.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lowdim_diffusion._checks import check_choice, check_int, fail
from lowdim_diffusion._types import Array, Float, Params, PRNGKey

__all__ = ["ProjectionKind", "random_subspace"]

ProjectionKind = Literal["dense", "sparse", "fastfood"]


def random_subspace(
    key: PRNGKey, params: Params, dim: int, *, kind: ProjectionKind = "sparse"
) -> Callable[[Float[Array, " dim"]], Params]:
    """Return ``theta: [dim] -> params + P theta``, to train theta in place of the parameters.

    ``expand(zeros)`` is ``params``. A loss of the parameters becomes one of theta, and everything
    that trains takes it::

        expand = random_subspace(key, params, 100)
        small_loss = lambda theta, batch, key: loss_fn(expand(theta), batch, key)
        theta, _ = training.fit(key, jnp.zeros(100), small_loss, optimizer, batch_fn, num_steps)

    Args:
        key: draws P. Dense and sparse subspaces of one key are nested: the first columns of a
            larger one are those of a smaller.
        params: where theta = 0 is, a tree of D floating-point numbers.
        dim: d, at most D.
        kind: ``"dense"`` holds ``D d`` numbers, columns uniform on the sphere; ``"sparse"``
            ``d sqrt(D)``, each column with one entry of either sign in each of ``sqrt(D)`` equal
            parts of the parameters; ``"fastfood"`` 3 D, columns orthogonal up to ``D^{-1/2}`` and
            with norms as near to 1, ``D log D`` operations.

    Raises:
        ValueError: if ``dim`` is larger than D, or for another kind.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
        >>> expand = random_subspace(jax.random.key(0), params, 2, kind="dense")
        >>> moved = expand(jnp.array([3.0, 0.0]))
        >>> change = sum(jnp.sum((moved[k] - params[k]) ** 2) for k in params)
        >>> print(f"{change:.3f}")  # 3 along a column of unit norm
        9.000

    References:
        Li et al. 2018, arXiv 1804.08838.
    """
    where = "random_subspace"
    check_int(where, "dim", dim)
    check_choice(where, "kind", kind, ("dense", "sparse", "fastfood"))
    origin, unravel = ravel_pytree(params)
    if dim > origin.size:
        raise fail(where, "dim too large", f"at most {origin.size}, all parameters", dim)
    make = {"dense": _dense, "sparse": _sparse, "fastfood": _fastfood}[kind]
    project = make(key, origin.size, dim, origin.dtype)
    return lambda theta: unravel(origin + project(theta.astype(origin.dtype)))


_Project = Callable[[Array], Array]


def _column_keys(key: PRNGKey, dim: int) -> Array:
    return jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(dim))


def _dense(key: PRNGKey, size: int, dim: int, dtype: Any) -> _Project:
    draw = lambda k: jax.random.normal(k, (size,), dtype)
    rows = jax.lax.map(draw, _column_keys(key, dim))
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return lambda theta: jnp.matmul(theta, rows, precision="highest")


def _sparse(key: PRNGKey, size: int, dim: int, dtype: Any) -> _Project:
    count = math.isqrt(size - 1) + 1
    edges = np.arange(count + 1) * size // count  # one entry in each part: none falls on another
    low, width = jnp.asarray(edges[:-1]), jnp.asarray(np.diff(edges))

    def draw(k: Array) -> tuple[Array, Array]:
        place_key, sign_key = jax.random.split(k)
        places = low + jax.random.randint(place_key, (count,), 0, width)
        return places, jax.random.rademacher(sign_key, (count,), dtype)

    places, signs = jax.vmap(draw)(_column_keys(key, dim))
    values = signs / count**0.5

    def project(theta: Array) -> Array:
        return jnp.zeros(size, dtype).at[places].add(values * theta[:, None])

    return project


def _fastfood(key: PRNGKey, size: int, dim: int, dtype: Any) -> _Project:
    padded = 1 << (size - 1).bit_length()
    keys = jax.random.split(key, 3)
    signs = jax.random.rademacher(keys[0], (dim,), dtype)
    order = jax.random.permutation(keys[1], padded)
    gains = jax.random.normal(keys[2], (padded,), dtype)
    # The mean norm of a column: those of all rows are equal, and a share of the rows is kept.
    norm = jnp.linalg.norm(gains) * size**0.5

    def project(theta: Array) -> Array:
        v = jnp.zeros(padded, dtype).at[:dim].set(signs * theta)
        v = gains * _hadamard(v)[order]
        return _hadamard(v)[:size] / norm

    return project


def _hadamard(v: Float[Array, " m"]) -> Float[Array, " m"]:
    """The Walsh-Hadamard transform, entries +-1, of a vector whose length is a power of two."""
    size, half = v.shape[0], 1
    while half < size:
        pairs = v.reshape(-1, 2, half)
        v = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return v
