"""What all kinds of guidance share: checked denoisers and weights, what a new denoiser inherits."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, fail
from lowdim_diffusion._types import Array, DenoiseFn
from lowdim_diffusion.solvers._base import denoise_once


def checked(where: str, denoise_fn: DenoiseFn) -> DenoiseFn:
    """Return ``denoise_fn`` with a check of its shape, and with x's dtype as its own."""

    def checked_fn(x_t: Array, t: Any) -> Array:
        return denoise_once(where, denoise_fn, x_t, jnp.asarray(t))

    return checked_fn


def check_weight(where: str, name: str, weight: Any, batch: int | None = None) -> None:
    """Raise unless a weight is finite and a scalar or ``[b]``."""
    shape = np.shape(weight)
    expected = "() or (b,)" if batch is None else f"() or ({batch},)"
    if len(shape) > 1 or (batch is not None and shape not in ((), (batch,))):
        raise fail(where, f"wrong shape of {name}", expected, shape, "one, or one per example")
    check_range(where, name, weight, -math.inf, math.inf, low_open=True, high_open=True)


def inherit(denoise_fn: Any, *sources: DenoiseFn) -> Any:
    """Return ``denoise_fn`` with the largest ``min_steps`` of the denoisers it was made from."""
    least = max(getattr(source, "min_steps", 0) for source in sources)
    if least:
        denoise_fn.min_steps = least
    return denoise_fn
