r"""The plane through three noises, coloured by which of their images each of its noises gives.

.. math:: \varepsilon(a, b) = a (\varepsilon_2 - \varepsilon_1) + b (\varepsilon_3 - \varepsilon_1)
    + \varepsilon_1

Models that agree divide the plane in the same way.

References:
    Zhang et al. 2023, arXiv 2310.05264 (the map of the noise space).
"""

import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, Int
from lowdim_diffusion.generalization._inputs import check_finite
from lowdim_diffusion.generalization.embeddings import Embedding, default_embedding, unit


def noise_plane(
    eps1: ArrayLike,
    eps2: ArrayLike,
    eps3: ArrayLike,
    num: int = 100,
    *,
    span: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "num num *data"]:
    """Return the noises of a square grid in the plane of three; they are the corners of it.

    ``out[i, j] = eps(a_i, b_j)``, so with the default span ``eps1, eps2, eps3`` are at ``[0, 0]``,
    ``[-1, 0]`` and ``[0, -1]``. Flatten the first two axes to sample from them.

    Args:
        eps1: ``[*data]``, one noise, as :func:`lowdim_diffusion.sampling.sample` takes it.
        eps2: ``[*data]``.
        eps3: ``[*data]``.
        num: points a side, at least 2.
        span: first and last value of both a and b.

    Examples:
        >>> import jax.numpy as jnp
        >>> e = jnp.eye(3)
        >>> noise_plane(e[0], e[1], e[2], 3)[1, 1].tolist()
        [0.0, 0.5, 0.5]
    """
    check_int("noise_plane", "num", num, 2)
    low, high = span
    if not low < high:
        raise fail("noise_plane", "span", "a first value below the last", span)
    shape = jnp.shape(eps1)
    for name, eps in (("eps2", eps2), ("eps3", eps3)):
        check_shape("noise_plane", name, eps, shape, "the three noises share one shape")
    first, a, b = (jnp.asarray(eps) for eps in (eps1, eps2, eps3))
    steps = jnp.linspace(low, high, num, dtype=first.dtype)
    along = lambda eps: steps.reshape(num, *(1,) * len(shape)) * (eps - first)[None]
    return along(a)[:, None] + along(b)[None, :] + first[None, None]


def noise_plane_labels(
    images: ArrayLike, anchors: ArrayLike, *, embed: Embedding = default_embedding
) -> Int[Array, "*grid"]:
    """Return which anchor each image resembles most, by the cosine of their embeddings.

    Args:
        images: ``[num, num, *data]``, made from the noises of :func:`noise_plane`.
        anchors: ``[k, *data]``, made from its three noises. To compare models give each its own.
        embed: ``[b, *data] -> [b, *features]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> anchors = jnp.eye(3)
        >>> noise_plane_labels(noise_plane(*anchors, 2), anchors, embed=lambda x: x).tolist()
        [[0, 2], [1, 1]]
    """
    where = "noise_plane_labels"
    shape, wanted = jnp.shape(images), jnp.shape(anchors)
    grid = shape[: len(shape) - len(wanted) + 1]
    if not wanted or wanted[0] == 0 or shape[len(grid) :] != wanted[1:]:
        fix = "the last axes of images are those of one anchor"
        raise fail(where, "shape of images", f"(num, num, *{wanted[1:]})", shape, fix)
    check_finite(where, "images", images)
    check_finite(where, "anchors", anchors)
    a = unit(embed(jnp.asarray(images).reshape(-1, *wanted[1:])))
    b = unit(embed(jnp.asarray(anchors)))
    cosine = jnp.matmul(a, b.T, precision="highest")
    return jnp.argmax(cosine, axis=-1).reshape(grid).astype(jnp.int32)
