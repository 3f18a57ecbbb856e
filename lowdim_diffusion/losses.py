r"""Denoising score matching: which noise levels to train on, how to weigh them, and the loss.

.. math:: L = E_{x_0, t, \epsilon}\; w(t)\, \tfrac1n \| \hat x_0(x_t, t) - x_0 \|^2 .

Every weight here multiplies the error of the *clean image*, whatever the network predicts; an
error of the predicted noise is that error times the signal-to-noise ratio.

A *level* is a quantile function ``(schedule, u) -> t`` with ``u`` uniform in (0, 1): that is how
times are drawn, how they are stratified, and where their density comes from.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from lowdim_diffusion._checks import check_range
from lowdim_diffusion._types import Array, Batch, DenoiseFn, Float, LossFn, Params, Scalar, Schedule
from lowdim_diffusion.corruption import Parametrization
from lowdim_diffusion.denoisers import from_network
from lowdim_diffusion.linalg import expand_right
from lowdim_diffusion.networks import Network
from lowdim_diffusion.sharding import example_keys

__all__ = [
    "Level",
    "Weight",
    "draw_times",
    "edm_weight",
    "likelihood_weight",
    "log_normal",
    "log_uniform",
    "logit_normal",
    "make_loss",
    "min_snr_weight",
    "sigmoid_weight",
    "snr_weight",
    "squared_errors",
    "uniform",
    "uniform_weight",
]

Level: TypeAlias = Callable[[Schedule, Array], Array]
Weight: TypeAlias = Callable[[Array, Array], Array]
"""``(log_snr, density) -> weight``, with the density of the drawn log-SNR; all ``[b]``."""


# ---- noise levels -------------------------------------------------------------------------------


def log_normal(mean: Scalar = -1.2, std: Scalar = 1.2) -> Level:
    """Return EDM's level: ``log(sigma / alpha) ~ N(mean, std^2)``, clipped to the range.

    References:
        Karras et al. 2022, arXiv 2206.00364, table 1.
    """
    check_range("log_normal", "std", std, 0, low_open=True)

    def level(schedule: Schedule, u: Array) -> Array:
        t = schedule.t_from_log_snr(-2 * (mean + std * ndtri(u)))
        return jnp.clip(t, schedule.t_min, schedule.t_max)

    return level


def log_uniform(sigma_min: Scalar = 0.05, sigma_max: Scalar = 3.0) -> Level:
    """Return ``log(sigma / alpha)`` uniform between two noise levels, clipped to the range."""
    check_range("log_uniform", "sigma_min", sigma_min, 0, low_open=True)

    def level(schedule: Schedule, u: Array) -> Array:
        low, high = jnp.log(jnp.asarray(sigma_min)), jnp.log(jnp.asarray(sigma_max))
        t = schedule.t_from_log_snr(-2 * (low + u * (high - low)))
        return jnp.clip(t, schedule.t_min, schedule.t_max)

    return level


def uniform() -> Level:
    """Return ``t`` uniform between the schedule's ``t_min`` and ``t_max``."""

    def level(schedule: Schedule, u: Array) -> Array:
        return schedule.t_min + u * (schedule.t_max - schedule.t_min)

    return level


def logit_normal(mean: Scalar = 0.0, std: Scalar = 1.0) -> Level:
    """Return ``logit(t) ~ N(mean, std^2)``, scaled to the schedule's range of ``t``.

    References:
        Esser et al. 2024, arXiv 2403.03206, section 3.1.
    """
    check_range("logit_normal", "std", std, 0, low_open=True)

    def level(schedule: Schedule, u: Array) -> Array:
        fraction = jax.nn.sigmoid(mean + std * ndtri(u))
        return schedule.t_min + fraction * (schedule.t_max - schedule.t_min)

    return level


def draw_times(
    key: Any,
    schedule: Schedule,
    level: Level,
    index: Any,
    *,
    num_strata: int | None = None,
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """Return ``(t, log_snr, density)`` for the examples with the given global indices.

    Args:
        key: one key for the whole batch; example ``i`` uses ``fold_in(key, index[i])``.
        schedule: noise schedule.
        level: quantile function of the time.
        index: global indices ``[b]``.
        num_strata: with the global batch size here, example ``i`` draws from the ``i``-th of that
            many equally probable intervals, which lowers the variance of the loss; None draws
            freely.

    Returns:
        Time, its log-SNR and the probability density of that log-SNR, each ``[b]``.
    """
    keys = example_keys(key, index)
    # Open at both ends: the quantile of 0 or 1 may be infinite.
    eps = float(jnp.finfo(jnp.float32).eps)
    u = jax.vmap(lambda k: jax.random.uniform(k, minval=eps, maxval=1 - eps))(keys)
    if num_strata is not None:
        u = jnp.clip((index % num_strata + u) / num_strata, eps, 1 - eps)
    position = lambda u: schedule.log_snr(level(schedule, u))
    log_snr, slope = jax.jvp(position, (u,), (jnp.ones_like(u),))
    density = 1 / jnp.maximum(jnp.abs(slope), eps)
    return level(schedule, u), log_snr, density


# ---- weights ------------------------------------------------------------------------------------


def edm_weight(data_std: Scalar = 0.5) -> Weight:
    r"""Return ``(sigma^2 + s^2) / (sigma s)^2`` with EDM's sigma: unit weight on the raw network.

    References:
        Karras et al. 2022, arXiv 2206.00364, eq. (8).
    """
    return lambda log_snr, density: jnp.exp(log_snr) + 1 / jnp.asarray(data_std) ** 2


def snr_weight() -> Weight:
    """Return the SNR: the plain error of the noise, ``L_simple`` of Ho et al. 2020, 2006.11239."""
    return lambda log_snr, density: jnp.exp(log_snr)


def min_snr_weight(gamma: Scalar = 5.0) -> Weight:
    """Return ``min(SNR, gamma)``.

    References:
        Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """
    return lambda log_snr, density: jnp.minimum(jnp.exp(log_snr), gamma)


def uniform_weight() -> Weight:
    """Return 1: the plain error of the clean image, the papers' constant ``lambda_t``."""
    return lambda log_snr, density: jnp.ones_like(log_snr)


def likelihood_weight() -> Weight:
    r"""Return the weight under which the loss is the diffusion part of the variational bound.

    .. math:: -E\log p(x_0) \le \tfrac12 \int \mathrm{SNR}\, \|\hat x_0 - x_0\|^2\, d\lambda + \dots
       \quad\Rightarrow\quad w = \tfrac12\, e^{\lambda} / p(\lambda),

    in nats per dimension, since the error is averaged over dimensions. Dividing by the density
    ``p`` of the drawn log-SNR makes the estimate unbiased for every level distribution that covers
    the range.

    References:
        Kingma et al. 2021, arXiv 2107.00630, eq. (17).
    """
    return lambda log_snr, density: 0.5 * jnp.exp(log_snr) / density


def sigmoid_weight(bias: Scalar = -3.0) -> Weight:
    """Return ``SNR * sigmoid(bias - log_snr)``: the sigmoid weight on the error of the noise.

    As in practice it multiplies the density of the levels drawn; with levels uniform in log-SNR it
    is the published weight.

    References:
        Kingma & Gao 2023, arXiv 2303.00848; Hoogeboom et al. 2024, arXiv 2410.19324, section 3.1.
    """
    return lambda log_snr, density: jnp.exp(log_snr) * jax.nn.sigmoid(bias - log_snr)


# ---- losses -------------------------------------------------------------------------------------


def squared_errors(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x0: Float[Array, "b *data"],
    t: Any,
    eps: Float[Array, "b *data"],
) -> Float[Array, " b"]:
    """Return each example's mean over coordinates of ``(x0_hat - x0)^2`` at its ``t``, ``eps``."""
    scale = lambda c: expand_right(c(t), x0.ndim).astype(x0.dtype)
    x_t = scale(schedule.alpha) * x0 + scale(schedule.sigma) * eps
    error = denoise_fn(x_t, t) - x0
    return jnp.mean(error.reshape(x0.shape[0], -1) ** 2, axis=1)


def make_loss(
    net: Network,
    schedule: Schedule,
    *,
    parametrization: Parametrization = "edm",
    weight: Weight | None = None,
    level: Level | None = None,
    data_std: Scalar = 0.5,
    num_strata: int | None = None,
    label_dropout: Scalar = 0.0,
    dropout: bool = False,
) -> LossFn:
    """Return the denoising loss ``(params, batch, key) -> losses [b]`` of a network.

    All randomness of an example (its time, its noise, dropout) is folded with the example's global
    ``batch["index"]``, so the loss does not depend on how a batch is split over devices. A batch
    without it is taken to be whole: the index is then its position.

    Args:
        net: network.
        schedule: noise schedule.
        parametrization: what the network predicts.
        weight: weight of the clean-image error; EDM's by default.
        level: distribution of the time; EDM's log-normal by default.
        data_std: standard deviation of one coordinate of the data.
        num_strata: the global batch size to stratify the times over it; None does not.
        label_dropout: probability with which a label is replaced by the null label (for
            classifier-free guidance), in [0, 1].
        dropout: whether to run the network's dropout.
    """
    check_range("make_loss", "label_dropout", label_dropout, 0, 1)
    weight = edm_weight(data_std) if weight is None else weight
    level = log_normal() if level is None else level
    num_classes = net.num_classes

    def loss_fn(params: Params, batch: Batch, key: Any) -> Array:
        batch = batch if isinstance(batch, dict) else {"x": batch}
        x0 = batch["x"]
        index = batch.get("index")
        if index is None:
            index = jnp.arange(x0.shape[0], dtype=jnp.int32)
        time_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        t, log_snr, density = draw_times(time_key, schedule, level, index, num_strata=num_strata)
        draw = lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype)
        eps = jax.vmap(draw)(example_keys(noise_key, index))
        cond = None
        if num_classes:
            drop = jax.vmap(lambda k: jax.random.bernoulli(k, label_dropout))
            cond = jnp.where(drop(example_keys(label_key, index)), num_classes, batch["label"])
        denoise_fn = from_network(
            net,
            params,
            schedule,
            parametrization=parametrization,
            data_std=data_std,
            cond=cond,
            dropout_keys=example_keys(dropout_key, index) if dropout else None,
            **({"clean": x0} if net.takes_clean else {}),
        )
        return weight(log_snr, density) * squared_errors(denoise_fn, schedule, x0, t, eps)

    return loss_fn
