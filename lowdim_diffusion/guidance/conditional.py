r"""Guidance by a second denoiser: away from it, or by a difference to it.

.. math:: D = D_u + w\,(D_c - D_u).

At a given ``(x_t, t)`` the clean example, the noise and the score are affine functions of one
another with the same coefficients for every denoiser, so that this is also the formula for the
noise (``eps = eps_u + w (eps_c - eps_u)``) and for the score, here in the form that needs no
division by alpha or sigma. ``w = 1`` is the denoiser c alone, ``w = 0`` the denoiser u alone; the
"guidance weight" of papers that write ``(1 + w) eps_c - w eps_u`` is ``w - 1`` here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, DenoiseFn, PyTree, Schedule
from lowdim_diffusion.guidance._common import check_weight, checked, inherit
from lowdim_diffusion.linalg import expand_right, safe_sqrt
from lowdim_diffusion.schedules import noise_levels

__all__ = ["autoguidance", "classifier_free", "classifier_free_batched"]


def classifier_free(
    cond_fn: DenoiseFn,
    uncond_fn: DenoiseFn,
    scale: Any,
    *,
    schedule: Schedule | None = None,
    interval: tuple[Any, Any] | None = None,
    rescale: Any = 0.0,
) -> DenoiseFn:
    r"""Return the denoiser ``D_u + scale (D_c - D_u)``: classifier-free guidance.

    With ``rescale = phi`` the guided image is pulled towards the spread of the conditional one,
    each spread over all coordinates of an example,

    .. math:: \left(\phi\, \frac{\mathrm{std}(D_c)}{\mathrm{std}(D)} + 1 - \phi\right) D.

    Args:
        cond_fn: the conditional denoiser.
        uncond_fn: the unconditional one.
        scale: w, a scalar or one per example ``[b]``; 1 is ``cond_fn`` alone, more pushes away
            from ``uncond_fn``.
        schedule: noise schedule that ``t`` refers to; needed with ``interval``.
        interval: ``(low, high)``, guide only where ``low < sigma / alpha <= high`` and return
            ``cond_fn`` elsewhere; ``high`` may be infinite. Where ``t`` is a scalar, as samplers
            give it, ``uncond_fn`` is not evaluated outside.
        rescale: phi in [0, 1].

    Raises:
        ValueError: for a scale that is not finite, an interval that is empty, negative or comes
            without a schedule; when called, for a denoiser that changes the shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> cond, uncond = lambda x, t: 0 * x + 1, lambda x, t: 0 * x
        >>> classifier_free(cond, uncond, 3.0)(jnp.zeros((1, 2)), 1.0).tolist()
        [[3.0, 3.0]]

    References:
        Ho & Salimans 2022, arXiv 2207.12598, eq. (6), where w is ours minus 1; Kynkaanniemi et al.
        2024, arXiv 2404.07724 (interval); Lin et al. 2023, arXiv 2305.08891, section 3.4 (rescale,
        here of the clean example).
    """
    where = "classifier_free"
    guide = _guide(where, scale, schedule, interval, rescale)
    cond, uncond = checked(f"{where}: cond_fn", cond_fn), checked(f"{where}: uncond_fn", uncond_fn)

    def denoise_fn(x_t: Array, t: Any) -> Array:
        return guide(cond, lambda x, t: (cond(x, t), uncond(x, t)), x_t, t)

    return inherit(denoise_fn, cond_fn, uncond_fn)


def classifier_free_batched(
    conditional_fn: Callable[[Array, Any, PyTree], Array],
    null: PyTree,
    scale: Any,
    *,
    schedule: Schedule | None = None,
    interval: tuple[Any, Any] | None = None,
    rescale: Any = 0.0,
) -> Callable[[Array, Any, PyTree], Array]:
    """Return :func:`classifier_free` of one function with a condition, as ``(x_t, t, cond)``.

    Both predictions come from one call with twice the batch. :func:`sampling.sample_batched` takes
    the result together with ``cond``.

    Args:
        conditional_fn: ``(x_t: [b, *data], t, cond) -> x0_hat``.
        null: what stands for no condition: for a label ``net.num_classes``; a tree like ``cond``,
            each entry as large as that of one example.
        scale: as for :func:`classifier_free`.
        schedule: as there.
        interval: as there.
        rescale: as there.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import denoisers, networks, schedules
        >>> net = networks.make("mlp", data_shape=(4,), width=16, depth=1, num_classes=10)
        >>> params, ve = net.init(jax.random.key(0)), schedules.VE()
        >>> fn = lambda x, t, c: denoisers.from_network(net, params, ve, cond=c)(x, t)
        >>> guided = classifier_free_batched(fn, net.num_classes, 2.0)
        >>> guided(jnp.ones((3, 4)), 1.0, jnp.array([0, 1, 2])).shape
        (3, 4)
    """
    where = "classifier_free_batched"
    guide = _guide(where, scale, schedule, interval, rescale)

    def given(cond: PyTree) -> DenoiseFn:
        return checked(where, lambda x, t: conditional_fn(x, t, cond))

    def denoise_fn(x_t: Array, t: Any, cond: PyTree) -> Array:
        cond = jax.tree.map(jnp.asarray, cond)
        if not jax.tree.leaves(cond):
            raise fail(where, "nothing to guide by", "cond with labels or other arrays", cond)
        for leaf in jax.tree.leaves(cond):
            check_shape(where, "cond", leaf, (x_t.shape[0], *leaf.shape[1:]))

        def twice(a: Any) -> Array:
            return jnp.concatenate([a, a])

        def with_null(c: Array, n: Any) -> Array:
            check_shape(where, "null", n, c.shape[1:], "give the condition of one example")
            return jnp.concatenate([c, jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)])

        def both(x: Array, t: Any) -> tuple[Array, Array]:
            both_fn = given(jax.tree.map(with_null, cond, null))
            first, second = jnp.split(both_fn(twice(x), twice(t) if np.ndim(t) else t), 2)
            return first, second

        return guide(given(cond), both, x_t, t)

    return denoise_fn


def autoguidance(
    main_fn: DenoiseFn,
    weak_fn: DenoiseFn,
    scale: Any,
    *,
    schedule: Schedule | None = None,
    interval: tuple[Any, Any] | None = None,
) -> DenoiseFn:
    """Return the denoiser ``D_weak + scale (D_main - D_weak)``: a model guided by a bad version.

    Args:
        main_fn: the denoiser to improve.
        weak_fn: one of the same task with less capacity or training.
        scale: w, a scalar or ``[b]``; 1 is ``main_fn`` alone.
        schedule: noise schedule; needed with ``interval``.
        interval: ``(low, high)``, as for :func:`classifier_free`.

    References:
        Karras et al. 2024, arXiv 2406.02507.
    """
    where = "autoguidance"
    guide = _guide(where, scale, schedule, interval, 0.0)
    main, weak = checked(f"{where}: main_fn", main_fn), checked(f"{where}: weak_fn", weak_fn)

    def denoise_fn(x_t: Array, t: Any) -> Array:
        return guide(main, lambda x, t: (main(x, t), weak(x, t)), x_t, t)

    return inherit(denoise_fn, main_fn, weak_fn)


def _guide(
    where: str,
    scale: Any,
    schedule: Schedule | None,
    interval: tuple[Any, Any] | None,
    rescale: Any,
) -> Callable[..., Array]:
    """``(main: (x, t) -> D, both: (x, t) -> (D, D_other), x_t, t) -> guided D``, checked."""
    check_weight(where, "scale", scale)
    check_range(where, "rescale", rescale, 0, 1)
    inside = _inside(where, schedule, interval)

    def guide(main: DenoiseFn, both: Any, x_t: Array, t: Any) -> Array:
        check_weight(where, "scale", scale, x_t.shape[0])

        def guided(x: Array) -> tuple[Array, Array]:
            first, second = both(x, t)
            w = expand_right(jnp.asarray(scale, x.dtype), x.ndim)
            out = second + w * (first - second)
            return first, _rescaled(out, first, rescale)

        if inside is None:
            return guided(x_t)[1]
        here = inside(t)
        if here.ndim == 0:
            return jax.lax.cond(here, lambda x: guided(x)[1], lambda x: main(x, t), x_t)
        first, out = guided(x_t)
        return jnp.where(expand_right(here, x_t.ndim), out, first)

    return guide


def _rescaled(x: Array, like: Array, share: Any) -> Array:
    """``x`` with its standard deviation moved by ``share`` towards that of ``like``."""
    if isinstance(share, int | float) and share == 0:
        return x
    axes = tuple(range(1, x.ndim))
    std = lambda a: safe_sqrt(jnp.var(a, axis=axes, keepdims=True))
    spread = std(x)
    ratio = jnp.where(spread > 0, std(like) / jnp.where(spread > 0, spread, 1), 1)
    return (jnp.asarray(share, x.dtype) * (ratio - 1) + 1) * x


def _inside(
    where: str, schedule: Schedule | None, interval: tuple[Any, Any] | None
) -> Callable[[Any], Array] | None:
    """Whether the noise level at ``t`` is in the interval, as a function; None for all levels."""
    if interval is None:
        return None
    if schedule is None:
        fix = "levels are sigma / alpha, and t alone does not tell them"
        raise fail(where, "interval without schedule", "schedule=...", None, fix)
    if len(interval) != 2:
        raise fail(where, "wrong interval", "(low, high)", interval)
    low, high = interval
    if is_concrete(low) and is_concrete(high) and not 0 <= low < high:
        raise fail(where, "wrong interval", "0 <= low < high", (low, high))

    def inside(t: Any) -> Array:
        level = noise_levels(schedule, t)
        return (level > low) & (level <= high)

    return inside
