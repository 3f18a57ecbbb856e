r"""Does a direction act alike on other images, add up with others, and reverse with its sign?

With ``D(x, v) = f(x + v) - f(x)`` the change that a step makes in the predicted image, a denoiser
that is linear across the images where it is used has

.. math:: D(x, v) \parallel D(y, v), \qquad D(x, u + v) = D(x, u) + D(x, v), \qquad
    D(x, -v) = -D(x, v).

At high noise all three hold; where the component of the mixture is being decided (noise about as
large as the data) they fail most.

References:
    Chen et al. 2024, arXiv 2409.02374, sec. 4 (homogeneity, linearity, composability).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowdim_diffusion._types import Array, Float

Fn = Callable[[Array], Array]


def transfer_cosine(
    fn: Fn, x: Float[Array, "b *data"], y: Float[Array, "b *data"], step: Float[Array, "b *data"]
) -> Float[Array, " b"]:
    """Return the cosine between the changes that one step makes at ``x`` and at ``y``.

    Args:
        fn: ``[b, *data] -> [b, *out]``, e.g. ``lambda x: denoise_fn(x, t)``.
        x: ``[b, *data]``, where the direction was found.
        y: ``[b, *data]``, other examples at the same noise level.
        step: ``[b, *data]``, length times direction.

    Examples:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2))
        >>> transfer_cosine(lambda x: 3 * x, one, -one, 0.5 * one).round(3).tolist()
        [1.0]
    """
    a, b = _change(fn, x, step), _change(fn, y, step)
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / jnp.maximum(norms, jnp.finfo(a.dtype).tiny)


def additivity_error(
    fn: Fn, x: Float[Array, "b *data"], u: Float[Array, "b *data"], v: Float[Array, "b *data"]
) -> Float[Array, " b"]:
    """Return ``||D(x, u + v) - D(x, u) - D(x, v)|| / ||D(x, u + v)||`` for two steps.

    Examples:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2))
        >>> additivity_error(lambda x: x**2, 0 * one, one, one).tolist()  # (4 - 1 - 1) / 4
        [0.5]
    """
    both = _change(fn, x, u + v)
    return _relative(both - _change(fn, x, u) - _change(fn, x, v), both)


def sign_error(
    fn: Fn, x: Float[Array, "b *data"], step: Float[Array, "b *data"]
) -> Float[Array, " b"]:
    """Return ``||D(x, v) + D(x, -v)|| / ||D(x, v)||``; 2 if the sign makes no difference.

    Examples:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2))
        >>> sign_error(lambda x: x**2, 0 * one, one).tolist()
        [2.0]
    """
    ahead = _change(fn, x, step)
    return _relative(ahead + _change(fn, x, -step), ahead)


def _change(fn: Fn, x: Array, step: Array) -> Array:
    y, moved = jax.vmap(fn)(jnp.stack([x, x + step]))
    return (moved - y).reshape(x.shape[0], -1)


def _relative(error: Array, size: Array) -> Array:
    norm = jnp.linalg.norm(size, axis=1)
    return jnp.linalg.norm(error, axis=1) / jnp.maximum(norm, jnp.finfo(size.dtype).tiny)
