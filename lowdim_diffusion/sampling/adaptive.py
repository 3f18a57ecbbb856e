"""Runs whose steps adapt to a tolerance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_range, check_shape
from lowdim_diffusion._types import Array, DenoiseFn, Float, Int, PRNGKey, Schedule
from lowdim_diffusion.sampling.driver import initial_noise, start_of
from lowdim_diffusion.solvers import ends_clean
from lowdim_diffusion.solvers._adaptive import integrate
from lowdim_diffusion.solvers._base import check_grid, denoise_once, is_clean

__all__ = ["AdaptiveResult", "sample_adaptive"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptiveResult:
    """Samples, and how often the denoiser was asked for each.

    Attributes:
        x: ``[b, *data]``; NaN where 4,096 steps did not reach the end.
        nfe: ``[b]``, evaluations that each example needed. All wait for the slowest.
    """

    x: Float[Array, "b *data"]
    nfe: Int[Array, " b"]


def sample_adaptive(
    key: PRNGKey,
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    *,
    tol: float = 1e-5,
    index: Int[Array, " b"] | None = None,
) -> AdaptiveResult:
    """Return samples of the probability flow, with steps that keep each one's error below ``tol``.

    Tsitouras' method of order 5 in ``z = x / sigma``, ``kappa = alpha / sigma``, where the flow is
    ``dz/dkappa = D``: regular at pure noise. Steps are chosen example by example, so that samples
    do not depend on their batch. A reference for fixed grids, which are cheaper to run; needs the
    extra ``diffrax``.

    Args:
        key: typed random key; not used with a given start.
        denoise_fn: ``(x_t: [b, *data], t: scalar) -> x0_hat``, each example alone.
        schedule: noise schedule.
        ts: ``[2]``, the first and the last time. A last one of 0, or anything up to
            ``schedule.t_min``, ends on the denoised example at ``schedule.t_min``.
        shape_or_x_T: a shape ``(b, *data)``, or the start ``[b, *data]`` itself at ``ts[0]``.
        tol: relative and absolute tolerance of a step, in z.
        index: global indices ``[b]`` of the examples; default ``arange(b)``.

    Raises:
        ModuleNotFoundError: without diffrax.
        ValueError: for times that do not decrease or leave the schedule's range.
    """
    where = "sample_adaptive"
    check_shape(where, "ts", ts, (2,), "give the first and the last time")
    check_range(where, "tol", tol, 0, low_open=True)
    ts = check_grid(where, schedule, ts)
    shape, x = start_of(shape_or_x_T)
    if x is None:
        x = initial_noise(key, schedule, ts[0], shape, index=index)
    clean = ends_clean(schedule, ts)
    ends = jnp.stack([ts[0], jnp.where(is_clean(schedule, ts[1]), schedule.t_min, ts[1])])
    sigma = schedule.sigma(ends)
    kappa = schedule.alpha(ends) / sigma

    def one(x: Array) -> tuple[Array, Array]:
        def field(kappa: Array, z: Array) -> Array:
            # At pure noise, where kappa is 0, the time is that of the start.
            inside = kappa > 0
            log_snr = 2 * jnp.log(jnp.where(inside, kappa, 1))
            t = jnp.where(inside, schedule.t_from_log_snr(log_snr), ends[0])
            x_t = (schedule.sigma(t) * z).astype(z.dtype)[None]
            return denoise_once(where, denoise_fn, x_t, t.astype(z.dtype))[0]

        return integrate(where, field, x / sigma[0].astype(x.dtype), *kappa, tol=tol)

    z, nfe = jax.vmap(one)(x)
    end = sigma[1].astype(x.dtype) * z
    if clean is not False:
        denoised = denoise_once(where, denoise_fn, end, ends[1].astype(x.dtype))
        end, nfe = jnp.where(is_clean(schedule, ts[1]), denoised, end), nfe + 1
    return AdaptiveResult(end, nfe)
