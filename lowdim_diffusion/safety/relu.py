r"""When a two-layer ReLU autoencoder memorizes and when it generalizes, in closed form.

With ``f(y) = W ReLU(W^T y)``, trained to denoise n examples at one noise level,

.. math:: L = \tfrac1n \sum_i E \| f(x_i + \sigma\epsilon) - x_i \|^2 + 2 \lambda \|W\|_F^2,

let the examples form clusters that are tight and point away from each other (negative cosines).
Then the optimum falls into blocks, ``W = [W_1 .. W_M]``, up to a term exponentially small in
``1/sigma^2``: only the units of its own cluster answer an example, and among them all do. There
``f`` is linear and each block solves a ridge problem with the cluster's uncentred second moment
``S_k``, whose eigenvectors are ``u_i`` and eigenvalues ``l_i``:

.. math:: W_k W_k^T = \sum_{i \le p_k} s_i u_i u_i^T, \qquad
    s_i = \frac{(l_i - n\lambda/n_k)_+}{l_i + \sigma^2},

the Wiener filter of rank ``p_k``. A cluster of one example, or of its copies, has one direction: a
single unit stores it, ``w = r x``, and its code is a *spike*. A rich cluster spreads over its
``p_k`` units and has a *balanced* code: that is what ``representation_spread`` sees.

References:
    Zhang et al. 2025, "Generalization of Diffusion Models Arises with a Balanced Representation
    Space", arXiv 2512.20963. The paper allows two matrices; at its minimizer they are equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Bool, Float, Scalar


class ReluAutoencoder(NamedTuple):
    """A tied two-layer ReLU autoencoder, and its loss as the theory gives it."""

    weights: Float[Array, "n p"]
    """One column per unit, cluster after cluster."""
    loss: Float[Array, ""]
    """Denoising loss without the decay, if all is as the theory assumes."""
    separated: Bool[Array, ""]
    """Whether it is: each example excites all units of its cluster that do anything, no others."""

    def code(self, y: ArrayLike) -> Float[Array, "b p"]:
        """Return the hidden code ``ReLU(W^T y)`` of ``y: [b, n]``."""
        return jax.nn.relu(jnp.asarray(y) @ self.weights)

    def __call__(self, y: ArrayLike) -> Float[Array, "b n"]:
        """Return ``W ReLU(W^T y)``, the examples ``[b, n]`` denoised."""
        return self.code(y) @ self.weights.T


def relu_autoencoder(
    clusters: ArrayLike,
    num_units: Sequence[int],
    sigma: Scalar,
    *,
    weight_decay: Scalar = 0.0,
) -> ReluAutoencoder:
    """Return the optimal autoencoder of the theory for examples in clusters.

    Args:
        clusters: a list with one array ``[n_k, n]`` per cluster; a single example, ``[1, n]``, is
            memorized.
        num_units: units ``p_k`` of each cluster, at most n; units beyond the cluster's rank stay
            silent.
        sigma: noise level, > 0.
        weight_decay: lambda >= 0.

    Returns:
        A :class:`ReluAutoencoder` with ``sum(num_units)`` units. Codes are turned within a cluster
        so that its mean excites all its units alike.

    Raises:
        ValueError: for no clusters, an empty one, another dimension, or a wrong number of units.

    Examples:
        >>> import jax.numpy as jnp
        >>> net = relu_autoencoder([jnp.eye(3)[:1], -jnp.ones((1, 3))], [1, 1], 0.1)
        >>> net.code(jnp.eye(3)[:1]).round(2).tolist()
        [[1.0, 0.0]]
    """
    where = "relu_autoencoder"
    check_range(where, "sigma", sigma, 0, low_open=True)
    check_range(where, "weight_decay", weight_decay, 0)
    if not len(clusters) or len(num_units) != len(clusters):
        expected = f"one per cluster, of which there are {len(clusters)} (at least 1 is needed)"
        raise fail(where, "wrong number of num_units", expected, len(num_units))
    arrays = [jnp.asarray(x, jnp.result_type(float, x)) for x in clusters]
    dim, total = jnp.shape(arrays[0])[-1], sum(len(x) for x in arrays)
    for k, (x, units) in enumerate(zip(arrays, num_units, strict=True)):
        check_shape(where, f"cluster {k}", x, (None, dim), "one example per row, of equal size")
        check_int(where, "num_units entry", units)
        if not len(x):
            raise fail(where, f"cluster {k} is empty", "one or more examples", 0)
        if units > dim:
            what, expected = f"too many units for cluster {k}", f"at most the {dim} dimensions"
            raise fail(where, what, expected, units)
    columns, owners, loss = [], [], jnp.zeros((), arrays[0].dtype)
    for k, (x, units) in enumerate(zip(arrays, num_units, strict=True)):
        # Squared singular values of the rows are the eigenvalues of the second moment.
        rows = jnp.pad(x / len(x) ** 0.5, ((0, max(units - len(x), 0)), (0, 0)))
        _, singular, vt = jnp.linalg.svd(rows, full_matrices=False)
        power, frame = singular[:units] ** 2, vt[:units].T
        share = len(x) / total
        power = jnp.where(power > dim * jnp.finfo(x.dtype).eps * power[0], power, 0)  # its rank
        gain = jnp.maximum(power - weight_decay / share, 0) / (power + sigma**2)
        loss += share * jnp.sum(singular**2)
        loss += share * jnp.sum(gain**2 * (power + sigma**2) - 2 * gain * power)
        along = frame * jnp.where(jnp.sum(x @ frame, axis=0) < 0, -1, 1)[None]
        columns.append(along * jnp.sqrt(gain)[None] @ _turn(gain > 0))
        owners.append(jnp.where(gain > 0, k, -1))
    weights = jnp.concatenate(columns, axis=1)
    labels = jnp.repeat(
        jnp.arange(len(arrays)), jnp.array([len(x) for x in arrays]), total_repeat_length=total
    )
    excited = jnp.concatenate(arrays) @ weights > 0
    separated = jnp.all(excited == (labels[:, None] == jnp.concatenate(owners)[None]))
    return ReluAutoencoder(weights, loss, separated)


def _turn(active: Array) -> Array:
    """An orthogonal matrix whose first row is constant over the active units: a reflection."""
    size = active.shape[0]
    axis = active / jnp.sqrt(jnp.maximum(jnp.sum(active), 1)) - jnp.eye(1, size)[0]
    length = jnp.sum(axis**2)
    return jnp.eye(size) - 2 * axis[:, None] * axis[None] / jnp.where(length > 0, length, 1)
