"""Denoisers: plain functions ``(x_t, t) -> x0_hat`` made from networks, and their scores.

``x0_hat = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, c_noise(t))`` with the scalings of
:func:`lowdim_diffusion.corruption.precondition`. The result is as good a denoiser as any exact one:
samplers, Jacobian tools and metrics cannot tell the difference.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_time, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, Int, Key, Params, Scalar, Schedule
from lowdim_diffusion.corruption import (
    LOG_SNR_LIMIT,
    Parametrization,
    convert,
    precondition,
)
from lowdim_diffusion.linalg import expand_right
from lowdim_diffusion.networks import Network

__all__ = ["features", "from_network", "score_fn"]


def from_network(
    net: Network,
    params: Params,
    schedule: Schedule,
    *,
    parametrization: Parametrization = "edm",
    data_std: Scalar = 0.5,
    cond: Int[Array, " b"] | None = None,
    dropout_keys: Key[Array, " b"] | None = None,
    **apply_options: Any,
) -> DenoiseFn:
    """Return the denoiser that a network and its parameters stand for.

    Args:
        net: network from :func:`lowdim_diffusion.networks.make` or an adapter. One whose
            ``input_scale`` is ``"clean"`` (the low-rank autoencoder of the theory) is itself a
            function of ``x_t / alpha`` and of the noise level: it predicts ``x0``, and gets no
            further scaling.
        params: its parameters.
        schedule: the noise schedule that ``t`` refers to.
        parametrization: what the network predicts; ``"edm"`` unless it was trained otherwise.
        data_std: standard deviation of one coordinate of the data, as in training.
        cond: class labels ``[b]``, None for unconditional.
        dropout_keys: one key per example to switch dropout on; only training does.
        **apply_options: passed on to ``net.apply``.

    Returns:
        A function of ``x_t: [b, *data]`` and ``t`` (scalar or ``[b]``).

    Raises:
        ValueError: for ``"eps"`` with a schedule that ends without signal (rectified flow), where
            no clean image can be computed from the predicted noise; for a clean-input network with
            a parametrization other than ``"x0"`` (or the default).
    """
    if net.input_scale == "clean" and parametrization not in ("x0", "edm"):
        raise fail(
            "from_network", f"{net.name} predicts x0", 'parametrization "x0"', repr(parametrization)
        )
    if parametrization == "eps":
        with jax.ensure_compile_time_eval():
            if isinstance(schedule.t_max, float) and float(schedule.alpha(schedule.t_max)) == 0:
                raise fail(
                    "from_network",
                    'parametrization "eps" with a schedule that has alpha(t_max) = 0',
                    '"velocity", "v", "x0" or "edm"',
                    '"eps"',
                    "x0 = (x_t - sigma eps) / alpha does not exist there",
                )

    def denoise_fn(x_t: Array, t: Any) -> Array:
        check_time("denoiser", t, x_t.shape[0])
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        scale = precondition(schedule, t, parametrization, data_std=data_std)
        options = dict(apply_options)
        if dropout_keys is not None:
            options["dropout_keys"] = dropout_keys
        x = _scaled(net, schedule, x_t, t, scale)
        out = net.apply(params, x, scale.c_noise, cond, **options)
        if net.input_scale == "clean":
            return out
        wide = lambda c: expand_right(c, x_t.ndim).astype(x_t.dtype)
        return wide(scale.c_skip) * x_t + wide(scale.c_out) * out

    return denoise_fn


def features(
    net: Network,
    params: Params,
    schedule: Schedule,
    x_t: Float[Array, "b *data"],
    t: Any,
    *,
    taps: str | Sequence[str],
    data_std: Scalar = 0.5,
    cond: Int[Array, " b"] | None = None,
) -> Any:
    """Return what flows through a denoiser's network at the given taps, at noise level ``t``.

    ``x_t`` may be a noised example, as in training, or ``alpha(t) x_0`` without noise, which gives
    features without randomness.

    Args:
        net: network from :func:`lowdim_diffusion.networks.make`.
        params: its parameters.
        schedule: the noise schedule that ``t`` refers to.
        x_t: ``[b, *data]``.
        t: time, scalar or ``[b]``.
        taps: one of ``net.taps``, or several.
        data_std: standard deviation of one coordinate of the data, as in training.
        cond: class labels ``[b]``, None for unconditional.

    Returns:
        ``[b, *features]`` for one name, a dictionary of such arrays for several.

    Raises:
        ValueError: for a name that is not in ``net.taps``, or a wrong shape of ``t``.

    Examples:
        >>> from lowdim_diffusion import networks, schedules
        >>> net = networks.make("dit", data_shape=(8, 8, 1), width=32, depth=2)
        >>> params, x_t = net.init(jax.random.key(0)), jnp.ones((5, 8, 8, 1))
        >>> features(net, params, schedules.VE(), x_t, 0.17, taps="block_1").shape
        (5, 16, 32)
    """
    check_time("features", t, x_t.shape[0])
    t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
    scale = precondition(schedule, t, data_std=data_std)
    x = _scaled(net, schedule, x_t, t, scale)
    return net.features(params, x, scale.c_noise, cond, taps=taps)


def _scaled(net: Network, schedule: Schedule, x_t: Array, t: Array, scale: Any) -> Array:
    """``x_t: [b, *data]`` at ``t: [b]`` as the network wants to see it."""
    wide = lambda c: expand_right(c, x_t.ndim).astype(x_t.dtype)
    if net.input_scale == "unit":
        return wide(scale.c_in) * x_t
    # Where there is no signal, the noise level is the one that c_noise is clipped to.
    floor = schedule.sigma(t) * math.exp(-LOG_SNR_LIMIT / 2)
    return x_t / wide(jnp.maximum(schedule.alpha(t), floor))


def score_fn(denoise_fn: DenoiseFn, schedule: Schedule) -> DenoiseFn:
    r"""Return the score ``grad log p_t(x_t)`` that a denoiser implies.

    .. math:: \nabla\log p_t(x_t) = (\alpha \hat x_0 - x_t) / \sigma^2.

    References:
        Tweedie's formula; Efron 2011.
    """

    def score(x_t: Float[Array, "b *data"], t: Any) -> Float[Array, "b *data"]:
        return convert(schedule, denoise_fn(x_t, t), x_t, t, source="x0", to="score")

    return score
