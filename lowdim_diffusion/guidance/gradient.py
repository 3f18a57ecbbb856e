r"""Guidance by a gradient: of a classifier at ``x_t``, or of a reward through the denoiser.

From the score identity ``x_t + sigma^2 grad log p(x_t) = alpha E[x_0 | x_t]`` and Bayes' rule,

.. math:: E[x_0 | x_t, y] = E[x_0 | x_t] + \frac{\sigma^2}{\alpha} \nabla_{x_t} \log p(y | x_t).

A reward r of clean examples has no likelihood at ``x_t``, but ``r(E[x_0 | x_t])`` can stand in for
it. With the denoiser D, its Jacobian J in ``x_t / alpha`` (``Cov[x_0 | x_t] alpha^2 / sigma^2``)
and the gradient g of r at ``D(x_t)``, there are three rules:

=============  ====================================  ===========================================
rule           denoiser                              what it does
=============  ====================================  ===========================================
``tilt``       ``D + scale (sigma / alpha)^2 J^T g`` leads to ``p(x_0) exp(scale r(x_0))``
``lookahead``  ``D + scale J^T g``                   pushes alike at all levels, inside the data
``naive``      ``D + scale g``                       pushes alike anywhere, also off the data
=============  ====================================  ===========================================

J maps into the directions in which the data vary: ``tilt`` and ``lookahead`` never leave a subspace
that carries the data. ``tilt`` is exact for Gaussian data and a linear reward.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_shape
from lowdim_diffusion._types import Array, DenoiseFn, Schedule
from lowdim_diffusion.guidance._common import check_weight, checked, inherit
from lowdim_diffusion.linalg import expand_right

__all__ = ["RULES", "Rule", "classifier", "reward"]

Rule = Literal["tilt", "lookahead", "naive"]
RULES: tuple[Rule, ...] = ("tilt", "lookahead", "naive")

LEAST_LOG_SNR = -14.0
"""Where there is no signal, gradients are those at this log-SNR, ``sigma / alpha = 1100``."""


def classifier(
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Array, Any], Array],
    schedule: Schedule,
    scale: Any = 1.0,
) -> DenoiseFn:
    """Return ``D + scale (sigma^2 / alpha) grad log_prob_fn(x_t, t)``: classifier guidance.

    With ``scale = 1`` and the true log-likelihood of a label it is the posterior mean given the
    label. Any function of ``x_t`` may be used, for instance a learned value function. At pure noise
    (``alpha = 0``) the term is that of log-SNR -14, where its limit is almost reached.

    Args:
        denoise_fn: the denoiser.
        log_prob_fn: ``(x_t: [b, *data], t) -> [b]``, differentiable in ``x_t``, each example alone.
        schedule: noise schedule.
        scale: a scalar or ``[b]``.

    Raises:
        ValueError: for a scale that is not finite; when called, for log-probabilities of another
            shape than ``[b]``.

    Examples:
        >>> from lowdim_diffusion import schedules
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I)
        >>> right = lambda x, t: x[:, 0] / (1 + t**2)  # soft value of the reward x_0[0]
        >>> classifier(white, right, schedules.VE())(jnp.zeros((1, 2)), 1.0).tolist()
        [[0.5, 0.0]]

    References:
        Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2 and eq. (14).
    """
    check_weight("classifier", "scale", scale)
    denoise = checked("classifier", denoise_fn)

    def guided(x_t: Array, t: Any) -> Array:
        check_weight("classifier", "scale", scale, x_t.shape[0])
        s, alpha, sigma = _with_signal(schedule, t)
        total = lambda x: jnp.sum(_values("classifier: log_prob_fn", log_prob_fn(x, s), x))
        weight = scale * sigma**2 / alpha
        return denoise(x_t, t) + _wide(weight, x_t) * jax.grad(total)(x_t)

    return inherit(guided, denoise_fn)


def reward(
    denoise_fn: DenoiseFn,
    reward_fn: Callable[[Array], Array],
    schedule: Schedule,
    scale: Any = 1.0,
    *,
    rule: Rule = "tilt",
) -> DenoiseFn:
    """Return a denoiser that raises a reward of clean examples, by one of the rules above.

    ``tilt`` and ``lookahead`` cost a gradient through the denoiser, about three evaluations. At
    pure noise (``alpha = 0``) ``tilt`` takes denoiser and gradient at log-SNR -14.

    Args:
        denoise_fn: the denoiser; differentiable, unless the rule is ``"naive"``.
        reward_fn: ``x_0: [b, *data] -> [b]``, differentiable, each example alone.
        schedule: noise schedule.
        scale: a scalar or ``[b]``; for ``tilt`` the inverse of the temperature.
        rule: see the table.

    Raises:
        ValueError: for an unknown rule, a scale that is not finite; when called, for rewards of
            another shape than ``[b]``.

    Examples:
        >>> from lowdim_diffusion import schedules
        >>> white = lambda x, t: x / (1 + t**2)  # data N(0, I), tilted: N((2, 0), I)
        >>> guided = reward(white, lambda x: x[:, 0], schedules.VE(), 2.0)
        >>> guided(jnp.zeros((1, 2)), 1.0).tolist()
        [[1.0, 0.0]]

    References:
        Guo et al. 2024, arXiv 2404.14743 (look-ahead, there for a square loss); Chung et
        al. 2023, arXiv 2209.14687 (the posterior mean in place of the example).
    """
    check_choice("reward", "rule", rule, RULES)
    check_weight("reward", "scale", scale)
    denoise = checked("reward", denoise_fn)
    value = lambda x_0: jnp.sum(_values("reward: reward_fn", reward_fn(x_0), x_0))

    def guided(x_t: Array, t: Any) -> Array:
        check_weight("reward", "scale", scale, x_t.shape[0])
        if rule == "naive":
            x0_hat = denoise(x_t, t)
            return x0_hat + _wide(scale, x_t) * jax.grad(value)(x0_hat)
        if rule == "tilt":
            t, alpha, sigma = _with_signal(schedule, t)
            weight = scale * sigma**2 / alpha
        else:
            weight = scale * schedule.alpha(t)
        x0_hat, pullback = jax.vjp(lambda x: denoise(x, t), x_t)
        return x0_hat + _wide(weight, x_t) * pullback(jax.grad(value)(x0_hat))[0]

    return inherit(guided, denoise_fn)


def _with_signal(schedule: Schedule, t: Any) -> tuple[Array, Array, Array]:
    """``(t, alpha, sigma)``, those at the least log-SNR where ``t`` has no signal."""
    t = jnp.asarray(t)
    least = schedule.t_from_log_snr(jnp.asarray(LEAST_LOG_SNR, jnp.result_type(t, float)))
    t = jnp.where(schedule.alpha(t) > 0, t, least.astype(jnp.result_type(t, float)))
    return t, schedule.alpha(t), schedule.sigma(t)


def _wide(weight: Any, x: Array) -> Array:
    return expand_right(jnp.asarray(weight, x.dtype), x.ndim)


def _values(where: str, value: Array, x: Array) -> Array:
    check_shape(where, "the result", value, x.shape[:1], "return one number per example")
    return value
