r"""Gauge fields: what may be added to a score without changing any marginal, and how to see it.

The probability-flow ODE of a field ``s + R`` has the marginals of that of the score ``s`` wherever

.. math:: \nabla \cdot (p R) = 0 \iff \nabla \cdot R + R \cdot s = 0 .

A network trained to denoise is free to learn such an R where it is not trained to the end. Samples
and likelihoods stay right, but the denoiser's Jacobian is then no covariance any more: it is not
symmetric, and its leading singular vectors turn away from the tangent space of the data. How far
can be tried out with fields known to be of this kind, for any constant antisymmetric A and scalar
function psi:

.. math:: R = A (\nabla \psi + \psi s), \qquad p R = A \nabla (p \psi) .

References:
    Horvat & Pfister 2024, "On gauge freedom, conservativity and intrinsic dimensionality estimation
    in diffusion models", arXiv 2402.03845.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.likelihood import jacobian_trace
from lowdim_diffusion.linalg import expand_right

__all__ = ["gauge_residual", "gauge_scores", "gauged"]


def gauged(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    antisymmetric: ArrayLike,
    *,
    strength: Any = 1.0,
    potential: Callable[[Array], Array] | None = None,
) -> DenoiseFn:
    r"""Return the denoiser whose score has the gauge field ``c A (grad psi + psi s)`` on top.

    .. math:: D'(x) = D(x) + c\, A \Big( \frac{\sigma^2}{\alpha} \nabla \psi(x)
        + \psi(x) \big(D(x) - x / \alpha\big) \Big).

    Its samples follow the same law, its Jacobian is no longer symmetric. To find out what that
    does to whatever reads geometry from a Jacobian.

    Args:
        denoise_fn: an exact denoiser; for others the field is a gauge as far as their score is one.
        schedule: the noise schedule that ``t`` refers to; alpha(t) > 0.
        antisymmetric: A, ``[n, n]`` over flattened examples.
        strength: c.
        potential: psi, ``[b, *data] -> [b]``; -1 everywhere if None, which gives a Gaussian
            ``R = A Sigma^{-1} (x - m)``.

    Raises:
        ValueError: for a matrix of another size, or one that is not antisymmetric.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> ve, p = schedules.VE(), distributions.Gaussian(jnp.zeros(2), jnp.eye(2))
        >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> gauged(p.denoiser(ve), ve, turn)(jnp.array([[2.0, 0.0]]), 1.0).tolist()
        [[1.0, -1.0]]

    References:
        Horvat & Pfister 2024, arXiv 2402.03845.
    """
    where = "gauged"
    matrix = jnp.asarray(antisymmetric)
    check_shape(where, "antisymmetric", matrix, (matrix.shape[:1] or (None,)) * 2)
    if is_concrete(matrix) and not bool(jnp.allclose(matrix, -matrix.T, atol=1e-6)):
        raise fail(where, "the matrix is not antisymmetric", "A = -A^T", "another", "(G - G.T) / 2")

    def fn(x_t: Array, t: Any) -> Array:
        dim = math.prod(x_t.shape[1:])
        check_shape(where, "antisymmetric", matrix, (dim, dim), "n is the size of an example")
        wide = lambda c: expand_right(jnp.asarray(c, x_t.dtype), x_t.ndim)
        alpha, sigma = wide(schedule.alpha(t)), wide(schedule.sigma(t))
        x0_hat = denoise_fn(x_t, t)
        moved = x0_hat - x_t / alpha  # sigma^2 / alpha times the score
        if potential is None:
            vector = -moved
        else:
            values, pullback = jax.vjp(potential, x_t)
            (slope,) = pullback(jnp.ones_like(values))
            vector = sigma**2 / alpha * slope + wide(values) * moved
        turned = jnp.matmul(vector.reshape(len(x_t), dim), matrix.T, precision="highest")
        return x0_hat + (strength * turned).reshape(x_t.shape).astype(x_t.dtype)

    return fn


def gauge_residual(
    field: Callable[[Array], Array],
    score: Callable[[Array], Array],
    x: Float[Array, "b *data"],
    *,
    probes: Float[Array, "m b *data"] | None = None,
    chunk: int = 64,
) -> Float[Array, " b"]:
    r"""Return ``div R + R . s`` at each example: zero everywhere if R changes no marginal.

    Args:
        field: R, ``[b, *data] -> [b, *data]``, each example alone.
        score: s of the noisy law at the same level, likewise.
        x: ``[b, *data]``.
        probes: for Hutchinson's estimate of the divergence, from n of a few hundred on; None for
            the exact one from n Jacobian products.
        chunk: Jacobian products computed at once.

    Returns:
        ``[b]``; compare its size with that of ``R . s`` alone.

    Examples:
        >>> import jax.numpy as jnp
        >>> score, turn = lambda x: -x, lambda x: jnp.stack([x[:, 1], -x[:, 0]], axis=1)
        >>> x = jnp.array([[1.0, 2.0]])
        >>> gauge_residual(turn, score, x).tolist(), gauge_residual(score, score, x).tolist()
        ([0.0], [3.0])

    References:
        Horvat & Pfister 2024, arXiv 2402.03845.
    """
    check_int("gauge_residual", "chunk", chunk)
    values, traces = jacobian_trace(field, x, probes, chunk=chunk)
    inner = jnp.sum((values * score(x)).reshape(len(x), -1), axis=1)
    return jnp.mean(traces, axis=0) + inner


def gauge_scores(
    key: PRNGKey,
    values: Float[Array, "b *data"],
    x: Float[Array, "b *data"],
    *,
    num_tests: int = 32,
    scale: float = 1.0,
) -> Float[Array, " num_tests"]:
    r"""Return standard scores of ``E[R . grad f] = 0``, the gauge condition on samples.

    Integrated against any f, ``div(p R) = 0`` says that this mean vanishes; no score and no
    derivative of R is needed. Here ``f(x) = sin(w . x + b)`` with normal w, several of them.

    Args:
        key: draws the functions.
        values: ``[b, *data]``, R at the samples.
        x: ``[b, *data]``, independent samples of p.
        num_tests: how many functions.
        scale: size of w, in units of one over the root mean square of ``x - E x``.

    Returns:
        ``[num_tests]``, each about standard normal for a gauge field, and growing as ``sqrt(b)``
        otherwise.

    Raises:
        ValueError: for fewer than two samples, or values of another shape.

    Examples:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (4000, 2))
        >>> turned, shrunk = x[:, ::-1] * jax.numpy.array([[1.0, -1.0]]), -x
        >>> of = lambda values: abs(gauge_scores(jax.random.key(1), values, x)).mean()
        >>> bool(of(turned) < 1.5), bool(of(shrunk) > 5)
        (True, True)

    References:
        Horvat & Pfister 2024, arXiv 2402.03845.
    """
    where = "gauge_scores"
    check_shape(where, "values", values, x.shape, "the field at the samples")
    check_int(where, "num_tests", num_tests)
    check_range(where, "scale", scale, 0, low_open=True)
    if len(x) < 2:
        raise fail(where, "too few samples", "at least 2", len(x))
    x, values = x.reshape(len(x), -1), values.reshape(len(x), -1)
    frequency_key, phase_key = jax.random.split(key)
    size = jnp.sqrt(jnp.mean(jnp.sum((x - x.mean(0)[None]) ** 2, axis=1)))
    shape = (x.shape[1], num_tests)
    w = jax.random.normal(frequency_key, shape, x.dtype) * scale / jnp.where(size > 0, size, 1)
    phase = jax.random.uniform(phase_key, (1, num_tests), x.dtype, 0, 2 * jnp.pi)
    matmul = lambda a, b: jnp.matmul(a, b, precision="highest")
    terms = matmul(values, w) * jnp.cos(matmul(x, w) + phase)
    spread = jnp.std(terms, axis=0, ddof=1)
    return jnp.mean(terms, axis=0) * len(x) ** 0.5 / jnp.where(spread > 0, spread, 1)
