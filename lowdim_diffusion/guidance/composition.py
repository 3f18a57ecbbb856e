r"""Conjunction and negation of denoisers, and the Markov chains that make them exact.

.. math:: D = D_u + \sum_i w_i\,(D_i - D_u)

is the denoiser whose score at every noise level is that of
``p_u^(1 - sum w) p_1^(w_1) p_2^(w_2) ...``, the product of the *noisy* densities. That is not the
noisy density of the product, so that a sampler alone ends elsewhere: for ``N(-1, 1)`` and
``N(1, 1)`` over ``N(0, 9)`` the product has variance 0.529, the probability flow ends at 0.111 and
the reverse SDE at 0.374. Steps of Langevin dynamics at each level, which need nothing but the score
of that level, bring the samples to the product.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, PRNGKey, Scalar, Schedule
from lowdim_diffusion.guidance._common import check_weight, checked, inherit
from lowdim_diffusion.linalg import expand_right

__all__ = ["LangevinResult", "compose", "langevin"]


def compose(
    uncond_fn: DenoiseFn, cond_fns: Sequence[DenoiseFn], weights: Sequence[Any] | None = None
) -> DenoiseFn:
    """Return ``D_u + sum_i w_i (D_i - D_u)``: all of the conditions at once, or not some of them.

    The functions may as well give scores, noises or log-densities ``[b]``: the formula is the same
    for all of them, and :func:`langevin` can use the log-density.

    Args:
        uncond_fn: the denoiser without a condition.
        cond_fns: the denoisers of the conditions, one or more.
        weights: one per condition, each a scalar or ``[b]``; positive asks for the condition,
            negative for its absence. Default 1.

    Raises:
        ValueError: for no conditions, another number of weights, weights that are not finite; when
            called, for functions whose results differ in shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> zero, right = lambda x, t: x, lambda x, t: x + jnp.array([[1.0, 0.0]])
        >>> up = lambda x, t: x + jnp.array([[0.0, 1.0]])
        >>> compose(zero, [right, up], [1.0, -2.0])(jnp.zeros((1, 2)), 1.0).tolist()
        [[1.0, -2.0]]

    References:
        Liu et al. 2022, arXiv 2206.01714, section 3.
    """
    cond_fns = tuple(cond_fns)
    weights = (1.0,) * len(cond_fns) if weights is None else tuple(weights)
    if not cond_fns or len(weights) != len(cond_fns):
        expected = f"one per condition, of which there are {len(cond_fns)} (at least 1 is needed)"
        raise fail("compose", "wrong number of weights", expected, len(weights))
    for i, weight in enumerate(weights):
        check_weight("compose", f"weight {i}", weight)

    def composed(x_t: Array, t: Any) -> Array:
        t = jnp.asarray(t)
        base = out = uncond_fn(x_t, t)
        for i, (fn, weight) in enumerate(zip(cond_fns, weights, strict=True)):
            check_weight("compose", f"weight {i}", weight, x_t.shape[0])
            value = fn(x_t, t)
            fix = "all functions must give the same quantity"
            check_shape("compose", f"what condition {i} returned", value, base.shape, fix)
            out = out + expand_right(jnp.asarray(weight, base.dtype), base.ndim) * (value - base)
        return out

    return inherit(composed, uncond_fn, *cond_fns)


class LangevinResult(NamedTuple):
    """Where the chains are."""

    x: Float[Array, "b *data"]
    acceptance: Float[Array, " b"]
    """Share of the proposals that were accepted; 1 without a log-density."""


def langevin(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x_t: Float[Array, "b *data"],
    t: Scalar,
    *,
    step_size: Scalar,
    num_steps: int = 1,
    log_prob_fn: Callable[[Array, Any], Array] | None = None,
) -> LangevinResult:
    r"""Return ``x_t`` after steps of Langevin dynamics at its own noise level.

    .. math:: x' = x + \eta\, s(x) + \sqrt{2\eta}\, z, \qquad s = (\alpha D(x, t) - x)/\sigma^2,

    unadjusted (ULA), or with a log-density accepted by the rule of Metropolis and Hastings (MALA),
    which makes its law exact for every step size. Without it a Gaussian direction of variance V
    settles at ``V / (1 - eta / (2 V))``, and the chain is stable for ``eta < 2 V`` in the narrowest
    direction, whose V is at least about ``sigma^2``.

    Args:
        key: typed random key.
        denoise_fn: gives the score.
        schedule: noise schedule.
        x_t: ``[b, *data]``, one chain per example.
        t: its time, a scalar with ``sigma(t) > 0``.
        step_size: eta > 0, in units of ``x_t`` squared; 0.1 to 0.5 of ``sigma(t)**2`` is safe.
        num_steps: steps, one evaluation of the denoiser each (MALA: one more at the start).
        log_prob_fn: ``(x_t, t) -> [b]``, log-density up to a constant; switches MALA on. It need
            not be the one whose score the denoiser has, and decides about the law.

    Raises:
        ValueError: for a step size or noise level that is not positive, or a log-density of another
            shape.

    Examples:
        >>> from lowdim_diffusion import schedules
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> x = 2.0 * jnp.ones((1000, 1))
        >>> key, ve = jax.random.key(0), schedules.VE()
        >>> moved = langevin(key, white, ve, x, 0.5, step_size=0.1, num_steps=50).x
        >>> round(float(moved.std()), 1)  # sqrt(1.25) = 1.12
        1.1

    References:
        Du et al. 2023, arXiv 2302.11552 (for composition); Roberts & Tweedie 1996 (MALA).
    """
    where = "langevin"
    check_range(where, "step_size", step_size, 0, low_open=True, high_open=True)
    check_int(where, "num_steps", num_steps)
    check_shape(where, "t", t, (), "all chains are at one noise level")
    t = jnp.asarray(t, x_t.dtype)
    alpha, sigma = (c(t).astype(x_t.dtype) for c in (schedule.alpha, schedule.sigma))
    check_range(where, "sigma(t)", sigma, 0, low_open=True, fix="clean data have no score")
    denoise = checked(where, denoise_fn)
    eta = jnp.asarray(step_size, x_t.dtype)
    score = lambda x: (alpha * denoise(x, t) - x) / sigma**2

    def propose(x: Array, score: Array, key: PRNGKey) -> Array:
        return x + eta * score + jnp.sqrt(2 * eta) * jax.random.normal(key, x.shape, x.dtype)

    def log_move(start: tuple[Array, ...], end: tuple[Array, ...]) -> Array:
        """Log-density of proposing ``end`` from ``start``, up to a constant."""
        gap = end[0] - start[0] - eta * start[1]
        return -jnp.sum(gap.reshape(gap.shape[0], -1) ** 2, axis=1) / (4 * eta)

    keys = jax.random.split(key, num_steps)
    if log_prob_fn is None:
        unadjusted = lambda x, key: (propose(x, score(x), key), None)
        x, _ = jax.lax.scan(unadjusted, x_t, keys)
        return LangevinResult(x, jnp.ones(x.shape[0], x.dtype))

    def at(x: Array) -> tuple[Array, Array, Array]:
        value = log_prob_fn(x, t)
        check_shape(where, "what log_prob_fn returned", value, x.shape[:1], "one per example")
        return x, score(x), value.astype(x.dtype)

    def adjusted(here: tuple[Array, ...], key: PRNGKey) -> tuple[tuple[Array, ...], Array]:
        move_key, accept_key = jax.random.split(key)
        there = at(propose(here[0], here[1], move_key))
        ratio = there[2] - here[2] + log_move(there, here) - log_move(here, there)
        accept = jnp.log(jax.random.uniform(accept_key, ratio.shape, ratio.dtype)) < ratio
        choose = lambda new, old: jnp.where(expand_right(accept, new.ndim), new, old)
        return jax.tree.map(choose, there, here), accept.astype(x_t.dtype)

    (x, _, _), accepted = jax.lax.scan(adjusted, at(x_t), keys)
    return LangevinResult(x, jnp.mean(accepted, axis=0))
