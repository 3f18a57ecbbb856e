r"""Do samples cover the data, and only the data? Precision, recall, density, coverage; Frechet.

Around each real example ``y_i`` lies the ball that reaches to its k-th nearest real neighbour, of
radius ``r_i``; around each sample ``x_j`` likewise one among samples, of radius ``q_j``:

===========  ===================================================  ==============================
precision    share of samples inside a real ball                   fidelity, upset by outliers
density      real balls that hold a sample, on average, over k     fidelity; can exceed 1
recall       share of real examples inside a sample's ball         diversity, upset by outliers
coverage     share of real balls that hold a sample                diversity
===========  ===================================================  ==============================

For equal distributions density tends to 1 and coverage to ``1 - 2^-k``. A model that copies its
training set passes all four with honours: look at the scores of copying as well.

The Frechet distance is that of the Gaussians with the means and covariances of the two sets:

.. math::
    \|m_1 - m_2\|^2 + \mathrm{tr}\, (C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})
    = \|m_1 - m_2\|^2 + \min_{W^T W = I} \|R_1 - W R_2\|_F^2, \qquad R_i^T R_i = C_i.

The right side is what is computed, R from the QR of the centred data and W from one SVD. No matrix
root is taken and nothing cancels, so that it is never negative, exact for singular covariances
(fewer examples than dimensions) and accurate in float32.

References:
    Kynkaanniemi et al. 2019, arXiv 1904.06991 (precision and recall); Naeem et al. 2020,
    arXiv 2002.09797 (density and coverage); Heusel et al. 2017, arXiv 1706.08500 (Frechet
    distance); Bhatia, Jain & Lim 2019, arXiv 1712.01504 (its form with W).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array, ArrayLike, Float
from lowdim_diffusion.generalization._inputs import check_examples
from lowdim_diffusion.generalization.embeddings import Embedding, no_embedding
from lowdim_diffusion.neighbors import _flat, nearest


class Quality(NamedTuple):
    """How samples and real examples lie among each other."""

    precision: Float[Array, ""]
    """In [0, 1]."""
    recall: Float[Array, ""]
    """In [0, 1]."""
    density: Float[Array, ""]
    """At least 0, about 1 for equal distributions."""
    coverage: Float[Array, ""]
    """In [0, 1], about ``1 - 2^-k`` for equal distributions."""


def precision_recall(
    samples: ArrayLike,
    real: ArrayLike,
    k: int = 5,
    *,
    embed: Embedding = no_embedding,
    block: int = 4096,
    query_block: int = 1024,
) -> Quality:
    """Return precision, recall, density and coverage of ``samples`` against ``real``.

    Memory beyond the inputs is about ``query_block (block + 10 n)`` numbers. The values depend on
    the sizes of the two sets: compare at equal sizes only.

    Args:
        samples: ``[b, *data]``, generated, b > k.
        real: ``[N, *data]``, N > k.
        k: the neighbour, itself not counted, to which a ball reaches. A point on its surface, up
            to rounding, is outside.
        embed: ``[b, *data] -> [b, *features]``; distances are Euclidean between features.
        block: examples compared at once.
        query_block: with so many.

    Examples:
        >>> import jax.numpy as jnp
        >>> real = jnp.array([[0.0], [1.0], [3.0]])
        >>> precision_recall(jnp.array([[0.5], [9.0]]), real, k=1).precision.tolist()
        0.5
    """
    where = "precision_recall"
    check_int(where, "k", k)
    check_int(where, "block", block)
    check_int(where, "query_block", query_block)
    check_examples(where, samples=samples, real=real)
    x, y = _flat(embed(jnp.asarray(samples))), _flat(embed(jnp.asarray(real)))
    for name, set_ in (("samples", x), ("real", y)):
        if set_.shape[0] <= k:
            raise fail(where, f"too few {name}", f"more than k = {k}", set_.shape[0])
    _check_widths(where, x, y)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    sizes: Any = {"block": block, "query_block": query_block}
    reach = lambda z: nearest(z, z, k + 1, **sizes).distance[:, -1]
    radius = reach(y)
    holding = _balls_holding(x, y, radius, **sizes)
    sampled = _balls_holding(y, x, reach(x), **sizes)
    covered = nearest(y, x, **sizes).distance[:, 0] < radius
    share = lambda of: jnp.mean(of.astype(dtype))
    return Quality(
        share(holding > 0), share(sampled > 0), jnp.mean(holding.astype(dtype)) / k, share(covered)
    )


def _balls_holding(
    x: Array, centers: Array, radius: Array, *, block: int, query_block: int
) -> Array:
    """How many balls hold each row of ``x``, surfaces not counted."""
    eps = jnp.finfo(x.dtype).eps
    middle = centers.mean(0, keepdims=True)
    x, centers = x - middle, centers - middle

    def blocks(a: Array, size: int) -> Array:
        count = math.ceil(a.shape[0] / size)
        size = math.ceil(a.shape[0] / count)
        spare = count * size - a.shape[0]
        a = jnp.pad(a, ((0, spare),) + ((0, 0),) * (a.ndim - 1), constant_values=-1)
        return a.reshape(count, size, *a.shape[1:])

    balls = blocks(centers, block), blocks(radius, block)  # those that fill up have radius -1

    def of_queries(x: Array) -> Array:
        def more(count: Array, ball: tuple[Array, Array]) -> tuple[Array, None]:
            y, r = ball
            sizes = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
            squared = sizes - 2 * jnp.matmul(x, y.T, precision="highest")
            rounding = 4 * eps * sizes
            inside = (squared + rounding < r[None, :] ** 2) & (r[None, :] > 0)
            return count + inside.sum(1, dtype=jnp.int32), None

        return jax.lax.scan(more, jnp.zeros(x.shape[0], jnp.int32), balls)[0]

    return jax.lax.map(of_queries, blocks(x, query_block)).reshape(-1)[: x.shape[0]]


def frechet_distance(
    a: ArrayLike, b: ArrayLike, *, embed: Embedding = no_embedding
) -> Float[Array, ""]:
    """Return the Frechet distance (squared, as FID is) between the Gaussians of two sets.

    With Inception features it is FID; with the pixels, the default, it needs no weights and still
    sees means and covariances. It is biased upward by about ``1 / b``: always compare equal sizes,
    and with its value between two halves of the data.

    Args:
        a: ``[b, *data]``, two or more.
        b: ``[m, *data]``, two or more; covariances are divided by ``m - 1``.
        embed: ``[b, *data] -> [b, *features]``. Costs ``n^3`` for n features.

    Examples:
        >>> import jax.numpy as jnp
        >>> a = jnp.array([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])
        >>> float(frechet_distance(a, 2 * a + 5)).__round__(3)  # means 72, deviations 4
        76.0
    """
    check_examples("frechet_distance", a=a, b=b)
    sets = []
    for name, x in (("a", a), ("b", b)):
        if jnp.shape(x)[0] < 2:
            raise fail("frechet_distance", f"too few examples in {name}", "at least 2", 1)
        sets.append(_flat(embed(jnp.asarray(x))))
    _check_widths("frechet_distance", *sets)
    means = [x.mean(0) for x in sets]
    roots = [
        jnp.linalg.qr((x - m[None]) / (x.shape[0] - 1) ** 0.5, mode="r")
        for x, m in zip(sets, means, strict=True)
    ]
    rows = max(len(r) for r in roots)
    one, two = (jnp.pad(r, ((0, rows - len(r)), (0, 0))) for r in roots)
    product = jnp.matmul(one, two.T, precision="highest")
    u, _, vt = jnp.linalg.svd(jax.lax.stop_gradient(product), full_matrices=False)
    turned = jnp.matmul(jnp.matmul(u, vt, precision="highest"), two, precision="highest")
    return jnp.sum((means[0] - means[1]) ** 2) + jnp.sum((one - turned) ** 2)


def _check_widths(where: str, x: Array, y: Array) -> None:
    if x.shape[1] != y.shape[1]:
        expected = f"{y.shape[1]} for both sets"
        raise fail(where, "width of the embedding", expected, x.shape[1])
