r"""The forward process and the quantities a network may predict.

.. math:: x_t = \alpha(t)\, x_0 + \sigma(t)\, \epsilon, \qquad \epsilon \sim N(0, I).

Every *parametrization* is a combination of the clean example and the noise,
``value = p(t) x_0 + q(t) eps``:

===========  ==================  ==================  =======================================
kind         p                   q                   source
===========  ==================  ==================  =======================================
``x0``       1                   0                   the posterior mean when it is predicted
``eps``      0                   1                   Ho et al. 2020, arXiv 2006.11239
``score``    0                   -1 / sigma          Tweedie: x0 = (x_t + sigma^2 score)/alpha
``v``        -sigma              alpha               Salimans & Ho 2022, arXiv 2202.00512
``velocity`` alpha'              sigma'              d x_t/dt; Lipman et al. 2023, 2210.02747
===========  ==================  ==================  =======================================

Given ``x_t`` any one of them determines the others: ``x_t`` and ``value`` are two linear equations
in ``x_0`` and ``eps``. Times are scalars or ``[b]``; examples are ``[b, *data]``.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_range, check_time
from lowdim_diffusion._types import Array, Float, PRNGKey, Scalar, Schedule
from lowdim_diffusion.linalg import expand_right
from lowdim_diffusion.schedules import rates

__all__ = [
    "KINDS",
    "PARAMETRIZATIONS",
    "Kind",
    "Parametrization",
    "Preconditioning",
    "convert",
    "perturb",
    "precondition",
    "split",
    "target",
]

Kind = Literal["x0", "eps", "score", "v", "velocity"]
KINDS: tuple[Kind, ...] = ("x0", "eps", "score", "v", "velocity")
Parametrization = Literal["edm", "eps", "v", "x0", "velocity"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = ("edm", "eps", "v", "x0", "velocity")

LOG_SNR_LIMIT = 30.0
"""Noise conditioning is clipped here: beyond it the network cannot tell levels apart anyway."""


def perturb(
    key: PRNGKey, schedule: Schedule, x0: Float[Array, "b *data"], t: Any
) -> tuple[Float[Array, "b *data"], Float[Array, "b *data"]]:
    """Return ``(x_t, eps)`` with fresh standard normal noise.

    Args:
        key: typed random key.
        schedule: noise schedule.
        x0: clean examples ``[b, *data]``.
        t: time, scalar or ``[b]``.
    """
    check_time("perturb", t, x0.shape[0])
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    return _mix(schedule.alpha(t), schedule.sigma(t), x0, eps), eps


def _mix(p: Any, q: Any, x0: Array, eps: Array) -> Array:
    """``p x0 + q eps`` in the dtype of the examples."""
    p, q = (expand_right(c, x0.ndim).astype(x0.dtype) for c in (p, q))
    return p * x0 + q * eps


def _coefficients(schedule: Schedule, t: Any, kind: Kind) -> tuple[Any, Any]:
    """``(p, q)`` of the table above."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    match kind:
        case "x0":
            return jnp.ones_like(alpha), jnp.zeros_like(alpha)
        case "eps":
            return jnp.zeros_like(alpha), jnp.ones_like(alpha)
        case "score":
            return jnp.zeros_like(alpha), -1 / sigma
        case "v":
            return -sigma, alpha
        case "velocity":
            return rates(schedule, t)


def target(
    schedule: Schedule,
    x0: Float[Array, "b *data"],
    eps: Float[Array, "b *data"],
    t: Any,
    kind: Kind,
) -> Float[Array, "b *data"]:
    """Return the quantity ``kind`` of the example made from ``x0`` and ``eps`` at time ``t``."""
    check_choice("target", "kind", kind, KINDS)
    return _mix(*_coefficients(schedule, t, kind), x0, eps)


def split(
    schedule: Schedule,
    value: Float[Array, "b *data"],
    x_t: Float[Array, "b *data"],
    t: Any,
    kind: Kind,
) -> tuple[Float[Array, "b *data"], Float[Array, "b *data"]]:
    """Return ``(x0, eps)`` from ``x_t`` and a ``value`` of the given kind.

    Not defined where the equations are not: ``eps`` from ``x0`` needs sigma > 0, ``x0`` from
    ``eps`` or ``score`` needs alpha > 0; there the result is not finite.
    """
    check_choice("split", "kind", kind, KINDS)
    check_time("split", t, x_t.shape[0])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if kind == "x0":  # the general formula divides sigma by sigma
        return value, _mix(-alpha / sigma, 1 / sigma, value, x_t)
    p, q = _coefficients(schedule, t, kind)
    determinant = alpha * q - sigma * p
    x0 = _mix(-sigma / determinant, q / determinant, value, x_t)
    return x0, _mix(alpha / determinant, -p / determinant, value, x_t)


def convert(
    schedule: Schedule,
    value: Float[Array, "b *data"],
    x_t: Float[Array, "b *data"],
    t: Any,
    *,
    source: Kind,
    to: Kind,
) -> Float[Array, "b *data"]:
    """Return ``value``, which is of kind ``source`` at ``(x_t, t)``, as kind ``to``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion.schedules import VE
        >>> x_t, x0 = jnp.full((1, 2), 3.0), jnp.ones((1, 2))
        >>> convert(VE(), x0, x_t, 2.0, source="x0", to="score").tolist()
        [[-0.5, -0.5]]
    """
    check_choice("convert", "kind", to, KINDS)
    if source == to:
        return value
    x0, eps = split(schedule, value, x_t, t, source)
    return x0 if to == "x0" else _mix(*_coefficients(schedule, t, to), x0, eps)


class Preconditioning(NamedTuple):
    """``x0_hat = c_skip x_t + c_out F(c_in x_t, c_noise)``; each entry has the shape of ``t``."""

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


def precondition(
    schedule: Schedule,
    t: Any,
    parametrization: Parametrization = "edm",
    *,
    data_std: Scalar = 0.5,
) -> Preconditioning:
    r"""Return the scalings that turn a raw network F into a denoiser.

    ``c_in = 1/sqrt(alpha^2 s^2 + sigma^2)`` gives the network input of unit variance for data of
    standard deviation s; ``c_noise = log(sigma / alpha) / 4``. ``c_skip`` and ``c_out`` solve
    ``x_t`` and the predicted quantity for ``x_0``. With ``"edm"``

    .. math:: c_{skip} = \frac{\alpha s^2}{\alpha^2 s^2 + \sigma^2},\quad
       c_{out} = \frac{\sigma s}{\sqrt{\alpha^2 s^2 + \sigma^2}},

    the target of F has unit variance at every level and everything stays finite where alpha = 0.

    Args:
        schedule: noise schedule.
        t: time, any shape.
        parametrization: what F predicts.
        data_std: s, standard deviation of one coordinate of the data, > 0.

    References:
        Karras et al. 2022, arXiv 2206.00364, table 1 and eq. (7), here for any alpha.
    """
    check_choice("precondition", "parametrization", parametrization, PARAMETRIZATIONS)
    check_range("precondition", "data_std", data_std, 0, low_open=True)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    std = jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
    log_snr = jnp.clip(schedule.log_snr(t), -LOG_SNR_LIMIT, LOG_SNR_LIMIT)
    match parametrization:
        case "edm":
            c_skip, c_out = alpha * (data_std / std) ** 2, sigma * data_std / std
        case "x0":
            c_skip, c_out = jnp.zeros_like(alpha), jnp.ones_like(alpha)
        case "eps":
            c_skip, c_out = 1 / alpha, -sigma / alpha
        case "v":
            norm = alpha**2 + sigma**2
            c_skip, c_out = alpha / norm, -sigma / norm
        case "velocity":
            alpha_rate, sigma_rate = rates(schedule, t)
            determinant = alpha * sigma_rate - sigma * alpha_rate
            c_skip, c_out = sigma_rate / determinant, -sigma / determinant
    return Preconditioning(c_skip, c_out, 1 / std, -log_snr / 8)
