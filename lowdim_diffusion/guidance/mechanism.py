r"""What classifier-free guidance is made of: a mean shift and two contrastive parts.

For two Gaussians with means m and covariances C the denoisers are affine with the Jacobians
``A = a C (a^2 C + s^2 I)^{-1}``, and the guidance is

.. math::
    D_c(x) - D_u(x) = \underbrace{(I - a A_u)(m_c - m_u)}_{\text{mean shift}}
        + \underbrace{\Delta_+\, (x - a\, m_c)}_{\text{positive}}
        + \underbrace{\Delta_-\, (x - a\, m_c)}_{\text{negative}}, \qquad
    A_c - A_u = \Delta_+ + \Delta_- ,

where the positive part of the symmetric difference keeps its positive eigenvalues (directions in
which the class varies more than all data do: it amplifies what is specific to the class) and the
negative part the others (it suppresses what is generic).

Any pair of denoisers has the same terms at each ``x`` with their own Jacobians there, which are
``a / s^2`` times the posterior covariances; what these terms leave of the guidance is the *rest*,
zero where the denoisers are affine. Each term can be scaled by itself in a denoiser
(:func:`guided_by_terms`), which every sampler takes.

References:
    Li, Wang, Qu 2025, "Towards understanding the mechanisms of classifier-free guidance",
    arXiv 2505.19210.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_shape, check_time, fail
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, Schedule
from lowdim_diffusion.distributions import Gaussian
from lowdim_diffusion.guidance._common import check_weight, checked, inherit
from lowdim_diffusion.linalg import expand_right, orthonormalize

__all__ = ["GuidanceTerms", "TermsFn", "guided_by_terms", "linear_terms", "local_terms"]


class GuidanceTerms(NamedTuple):
    """The parts of ``D_c(x) - D_u(x)``, each shaped like ``x``; their sum is the guidance."""

    mean_shift: Array
    """``(I - a A_u)(m_c - m_u)``: towards the mean of the class."""
    positive: Array
    """``Delta_+ (x - a m_c)``: away from the mean along what varies more within the class."""
    negative: Array
    """``Delta_- (x - a m_c)``: towards it along what varies less there than in all data."""
    rest: Array
    """What the three leave; zero for Gaussians."""


TermsFn: TypeAlias = Callable[[Array, Any], GuidanceTerms]
"""``(x_t: [b, *data], t: scalar or [b]) -> GuidanceTerms``."""


def linear_terms(cond: Gaussian, uncond: Gaussian, schedule: Schedule) -> TermsFn:
    """Return the terms of the guidance between two Gaussians: linear classifier-free guidance.

    With ``Gaussian.fit`` of one class and of all examples this is the linear model of a trained
    network's guidance, which it follows at high and moderate noise. One eigenproblem per noise
    level, of the size of both ranks together or of n.

    Args:
        cond: the law of the class.
        uncond: that of all data.
        schedule: the noise schedule that ``t`` refers to.

    Returns:
        ``(x_t, t) -> GuidanceTerms``, with a ``rest`` of zeros.

    Raises:
        ValueError: if the Gaussians differ in dimension; when called, for examples of another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> cond = distributions.Gaussian(jnp.array([1.0, 0.0]), jnp.diag(jnp.array([2.0, 0.5])))
        >>> uncond = distributions.Gaussian(jnp.zeros(2), jnp.eye(2))
        >>> terms = linear_terms(cond, uncond, schedules.VE())(jnp.array([[2.0, 1.0]]), 1.0)
        >>> [[f"{entry:.2f}" for entry in term[0]] for term in terms[:3]]
        [['0.50', '0.00'], ['0.30', '0.00'], ['0.00', '-0.30']]

    References:
        Li, Wang, Qu 2025, arXiv 2505.19210.
    """
    where = "linear_terms"
    check_shape(where, "the mean of uncond", uncond.mean, cond.mean.shape)
    dim = cond.mean.shape[0]
    bases = jnp.concatenate([cond.basis, uncond.basis], axis=1)
    whole = bases.shape[1] >= dim
    frame = jnp.eye(dim, dtype=bases.dtype) if whole else orthonormalize(bases)
    identity = jnp.eye(frame.shape[1], dtype=frame.dtype)
    inside = [_mm(frame.T, p.basis) for p in (cond, uncond)]

    def level(x: Array, alpha: Array, sigma: Array) -> tuple[Array, ...]:
        (k_c, gain_c), (k_u, gain_u) = (_gains(p, alpha, sigma) for p in (cond, uncond))
        square = lambda u, gain: _mm(u * gain[None], u.T)
        k = k_c - k_u  # the eigenvalue of the difference across the frame
        delta = square(inside[0], gain_c) - square(inside[1], gain_u) + k * identity
        y = x - alpha * cond.mean[None]
        along = _mm(y, frame)
        across = y - _mm(along, frame.T)
        apply = lambda matrix, value: _mm(_mm(along, matrix), frame.T) + value * across
        positive = apply(_positive_part(delta), jnp.maximum(k, 0))
        shift = cond.mean - uncond.mean
        kept = k_u * shift + _mm(uncond.basis, gain_u * _mm(uncond.basis.T, shift))
        mean_shift = jnp.broadcast_to((shift - alpha * kept)[None], x.shape)
        return mean_shift, positive, apply(delta, k) - positive

    def terms_fn(x_t: Array, t: Any) -> GuidanceTerms:
        check_time(where, t, x_t.shape[0])
        if math.prod(x_t.shape[1:]) != dim:
            raise fail(where, "size of an example", dim, x_t.shape[1:], "the Gaussians are of it")
        wide = jnp.promote_types(x_t.dtype, cond.mean.dtype)
        x = x_t.reshape(x_t.shape[0], dim).astype(wide)
        alpha, sigma = (jnp.asarray(c(t), x.dtype) for c in (schedule.alpha, schedule.sigma))
        if alpha.ndim == 0:
            found = level(x, alpha, sigma)
        else:
            one = lambda x, alpha, sigma: tuple(f[0] for f in level(x[None], alpha, sigma))
            found = jax.vmap(one)(x, alpha, sigma)
        shift, positive, negative = (f.reshape(x_t.shape).astype(x_t.dtype) for f in found)
        return GuidanceTerms(shift, positive, negative, jnp.zeros_like(x_t))

    return terms_fn


def local_terms(
    cond_fn: DenoiseFn,
    uncond_fn: DenoiseFn,
    schedule: Schedule,
    cond_mean: ArrayLike,
    uncond_mean: ArrayLike,
    *,
    chunk: int = 64,
) -> TermsFn:
    r"""Return the terms of the guidance between any two denoisers, from their Jacobians at x.

    The posterior covariances ``sigma^2 J / alpha`` of the two at each noisy example take the place
    of the Gaussians' one, which describes the guidance at low noise, where the linear model does
    not. The Jacobians are symmetrized, ``(J + J^T) / 2``, as those of exact denoisers are.

    Args:
        cond_fn: the conditional denoiser, each example alone.
        uncond_fn: the unconditional one.
        schedule: the noise schedule that ``t`` refers to.
        cond_mean: ``[*data]``, the mean of the class.
        uncond_mean: ``[*data]``, that of all data.
        chunk: Jacobian columns computed at once.

    Returns:
        ``(x_t, t) -> GuidanceTerms``; the four add up to ``cond_fn - uncond_fn``. Takes two dense
        Jacobians and an eigenproblem of size n per example: for small images.

    Raises:
        ValueError: when called, for means of another shape than the examples'.

    References:
        Li, Wang, Qu 2025, arXiv 2505.19210 (the nonlinear regime).
    """
    where = "local_terms"
    check_int(where, "chunk", chunk)
    fns = [checked(f"{where}: {n}_fn", f) for n, f in (("cond", cond_fn), ("uncond", uncond_fn))]

    def terms_fn(x_t: Array, t: Any) -> GuidanceTerms:
        check_time(where, t, x_t.shape[0])
        check_shape(where, "cond_mean", cond_mean, x_t.shape[1:], "one example, such as x.mean(0)")
        check_shape(where, "uncond_mean", uncond_mean, x_t.shape[1:], "one example")
        flat = lambda a: jnp.asarray(a, x_t.dtype).reshape(1, -1)
        wide = lambda c: expand_right(jnp.asarray(c(t), x_t.dtype), 2)
        alpha, mean_c, mean_u = wide(schedule.alpha), flat(cond_mean), flat(uncond_mean)
        (value_c, jac_c), (value_u, jac_u) = (
            _value_and_jacobian(lambda x, fn=fn: fn(x, t), x_t, chunk) for fn in fns
        )
        y = x_t.reshape(len(x_t), -1) - alpha * mean_c
        apply = lambda matrix, v: jnp.einsum("bij,bj->bi", matrix, v, precision="highest")
        delta, shift = jac_c - jac_u, jnp.broadcast_to(mean_c - mean_u, y.shape)
        positive = apply(jax.vmap(_positive_part)(delta), y)
        negative = apply(delta, y) - positive
        mean_shift = shift - alpha * apply(jac_u, shift)
        rest = (value_c - value_u).reshape(y.shape) - (mean_shift + positive + negative)
        shaped = lambda term: term.reshape(x_t.shape)
        return GuidanceTerms(shaped(mean_shift), shaped(positive), shaped(negative), shaped(rest))

    return terms_fn


def guided_by_terms(
    cond_fn: DenoiseFn,
    terms_fn: TermsFn,
    *,
    mean_shift: Any = 0.0,
    positive: Any = 0.0,
    negative: Any = 0.0,
    rest: Any = 0.0,
) -> DenoiseFn:
    """Return the denoiser ``cond_fn`` plus each term of a guidance times its own weight.

    Equal weights ``w - 1`` give :func:`classifier_free` with scale w, zeros the conditional
    denoiser alone; one weight alone shows what this term does.

    Args:
        cond_fn: the conditional denoiser; exact, or trained.
        terms_fn: from :func:`linear_terms` or :func:`local_terms`.
        mean_shift: weight of this term, a scalar or one per example ``[b]``.
        positive: likewise.
        negative: likewise.
        rest: likewise.

    Raises:
        ValueError: for a weight that is not finite or has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> make = lambda mean: distributions.Gaussian(jnp.array([mean]), jnp.ones((1, 1)))
        >>> cond, uncond, ve = make(1.0), make(0.0), schedules.VE()
        >>> terms_fn = linear_terms(cond, uncond, ve)
        >>> fn = guided_by_terms(cond.denoiser(ve), terms_fn, mean_shift=2.0)
        >>> fn(jnp.ones((1, 1)), 1.0).tolist()
        [[2.0]]
    """
    where = "guided_by_terms"
    weights = GuidanceTerms(mean_shift, positive, negative, rest)
    for name, weight in weights._asdict().items():
        check_weight(where, name, weight)
    cond = checked(f"{where}: cond_fn", cond_fn)

    def denoise_fn(x_t: Array, t: Any) -> Array:
        out = cond(x_t, t)
        for (name, weight), term in zip(weights._asdict().items(), terms_fn(x_t, t), strict=True):
            check_weight(where, name, weight, x_t.shape[0])
            out = out + expand_right(jnp.asarray(weight, x_t.dtype), x_t.ndim) * term
        return out

    return inherit(denoise_fn, cond_fn)


def _mm(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _gains(p: Gaussian, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """The Jacobian of p's denoiser: its eigenvalue across the basis, and what is on top along."""

    def eigenvalue(var: Array) -> Array:
        total = alpha**2 * var + sigma**2
        return alpha * var / jnp.where(total > 0, total, 1)

    across = eigenvalue(p.noise_std**2)
    return across, eigenvalue(p.scales**2 + p.noise_std**2) - across


def _value_and_jacobian(
    fn: Callable[[Array], Array], x: Array, chunk: int
) -> tuple[Array, Float[Array, "b n n"]]:
    """The values, and the symmetric part of the Jacobian at each example."""
    y, jvp = jax.linearize(fn, x)
    dim = math.prod(x.shape[1:])

    def column(i: Array) -> Array:
        unit = jax.nn.one_hot(i, dim, dtype=x.dtype).reshape(1, *x.shape[1:])
        return jvp(jnp.broadcast_to(unit, x.shape)).reshape(len(x), dim)

    columns = jax.lax.map(column, jnp.arange(dim), batch_size=min(chunk, dim))  # [in, b, out]
    return y, (columns.transpose(1, 0, 2) + columns.transpose(1, 2, 0)) / 2


@jax.custom_jvp
def _positive_part(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric matrix with its negative eigenvalues set to zero."""
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return _mm(vectors * jnp.maximum(values, 0)[None], vectors.T)


@_positive_part.defjvp
def _positive_part_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    # Divided differences of max(., 0), in [0, 1]: the derivative of eigh alone is infinite where
    # eigenvalues coincide.
    values, vectors = jnp.linalg.eigh(primals[0], symmetrize_input=False)
    kept = jnp.maximum(values, 0)
    gap = values[:, None] - values[None]
    slope = jnp.where(values > 0, 1.0, 0.0).astype(values.dtype)
    ratio = (kept[:, None] - kept[None]) / jnp.where(gap == 0, 1, gap)
    ratio = jnp.where(gap == 0, (slope[:, None] + slope[None]) / 2, ratio)
    inner = ratio * _mm(vectors.T, _mm(tangents[0], vectors))
    positive = _mm(vectors * kept[None], vectors.T)
    return positive, _mm(vectors, _mm(inner, vectors.T))
