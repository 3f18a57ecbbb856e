r"""Moving averages of the parameters.

An average is ``ema <- beta_t ema + (1 - beta_t) params``; a *decay* is the function
``updates done -> beta_t``, the only thing that the kinds differ in.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range
from lowdim_diffusion._types import Array, Params, Scalar

__all__ = ["Decay", "classic", "gamma_from_std", "power", "update"]

Decay: TypeAlias = Callable[[Any], Array]
"""``number of updates, this one included (1, 2, ...) -> beta``."""


def classic(decay: Scalar = 0.999, warmup: Scalar = 10.0) -> Decay:
    """Return ``min(decay, (t-1) / (t-1+warmup))``: an average that forgets where it started.

    Args:
        decay: beta in the long run, in [0, 1).
        warmup: how slowly beta rises to it; 0 switches the warm-up off.
    """
    check_range("ema.classic", "decay", decay, 0, 1, high_open=True)
    check_range("ema.classic", "warmup", warmup, 0)

    def beta(t: Any) -> Array:
        rising = (t - 1) / jnp.maximum(t - 1 + warmup, 1e-6)
        return jnp.where(jnp.asarray(warmup) > 0, jnp.minimum(decay, rising), decay)

    return beta


def power(gamma: Scalar) -> Decay:
    r"""Return ``(1 - 1/t)^(gamma + 1)``: weights that grow as ``time^gamma``.

    Args:
        gamma: exponent, > -1; from a relative width by :func:`gamma_from_std`.

    References:
        Karras et al. 2024, arXiv 2312.02696, eq. (2)-(4).
    """
    check_range("ema.power", "gamma", gamma, -1, low_open=True)
    return lambda t: (1 - 1 / jnp.maximum(t, 1)) ** (gamma + 1)


def gamma_from_std(std: float) -> float:
    r"""Return the power-average exponent of this relative standard deviation.

    Solves ``std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``.

    Args:
        std: relative width, in (0, 0.2886): 0.05 and 0.1 are usual.

    Examples:
        >>> round(gamma_from_std(0.05), 2), round(gamma_from_std(0.1), 2)
        (16.97, 6.94)
    """
    check_range("gamma_from_std", "std", std, 0, 12**-0.5, low_open=True, high_open=True)
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def update(average: Params, params: Params, beta: Array) -> Params:
    """Return ``beta average + (1 - beta) params``, leaf by leaf, in each leaf's dtype."""
    # average + (1 - beta) (params - average) returns constant parameters unchanged, bit for bit.
    return jax.tree.map(lambda a, p: a + ((1 - beta) * (p - a)).astype(a.dtype), average, params)
