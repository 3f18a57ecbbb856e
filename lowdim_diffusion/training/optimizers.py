"""Optimizers by name, learning-rate schedules and clipping for training runs (optax)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowdim_diffusion._checks import check_choice, check_range, fail
from lowdim_diffusion._types import Array, Scalar

__all__ = ["learning_rate", "make", "on_frames"]

OPTIONS = {
    "adam": ("b1", "b2", "eps"),
    "adamw": ("b1", "b2", "eps", "weight_decay"),
    "sgd": ("b1",),
    "lion": ("b1", "b2", "weight_decay"),
    "muon": ("weight_decay",),
}
"""What each optimizer can be told."""
DECAYS = ("constant", "cosine", "linear", "inverse-sqrt")


def learning_rate(
    lr: Scalar,
    num_steps: int,
    *,
    warmup: int = 0,
    decay: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "constant",
    final: Scalar = 0.0,
) -> Callable[[Any], Any]:
    """Return the learning rate as a function of the step.

    Args:
        lr: peak learning rate, > 0.
        num_steps: length of training; the cosine and linear decays end there.
        warmup: steps of linear growth from 0.
        decay: what follows the warm-up. ``inverse-sqrt`` stays at ``lr`` until a tenth of training
            and falls as ``1/sqrt(step)`` from there (Karras et al. 2024, arXiv 2312.02696, eq. 15).
        final: last learning rate as a fraction of ``lr`` (cosine and linear).
    """
    check_range("learning_rate", "lr", lr, 0, low_open=True)
    check_choice("learning_rate", "decay", decay, DECAYS)
    if not 0 <= warmup <= num_steps:
        raise fail("learning_rate", "warmup out of range", f"0 to num_steps = {num_steps}", warmup)
    rest = max(num_steps - warmup, 1)
    match decay:
        case "constant":
            tail = optax.constant_schedule(lr)
        case "cosine":
            tail = optax.cosine_decay_schedule(lr, rest, final)
        case "linear":
            tail = optax.linear_schedule(lr, final * lr, rest)
        case _:
            flat = max(num_steps // 10, 1)
            tail = lambda step: lr * (jnp.maximum(step, flat) / flat) ** -0.5
    if not warmup:
        return tail
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), tail], [warmup])


def make(
    name: Literal["adam", "adamw", "sgd", "lion", "muon"],
    lr: Any,
    *,
    clip: Scalar | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Return an optax optimizer, after clipping the gradient's global norm if asked.

    Args:
        name: ``adam``, ``adamw``, ``sgd`` (with momentum), ``lion`` or ``muon``.
        lr: learning rate or a function of the step.
        clip: largest global norm of the gradient, > 0; None does not clip.
        options: those of :data:`OPTIONS` that the optimizer has, by default optax's values: ``b1``
            decay of the first moment (sgd: momentum, 0.9), ``b2`` of the second, ``eps``, and the
            decoupled ``weight_decay``.

    Raises:
        ValueError: for an unknown optimizer, or an option that it does not have.
    """
    check_choice("optimizers.make", "optimizer", name, list(OPTIONS))
    if unknown := sorted(set(options) - set(OPTIONS[name])):
        have = f"one of {', '.join(OPTIONS[name])}"
        fix = "use 'adamw'" if "weight_decay" in unknown else ""
        raise fail("optimizers.make", f"option of {name!r}", have, ", ".join(unknown), fix)
    match name:
        case "adam":
            core = optax.adam(lr, **options)
        case "adamw":
            core = optax.adamw(lr, **options)
        case "sgd":
            core = optax.sgd(lr, momentum=options.get("b1", 0.9) or None)
        case "lion":
            core = optax.lion(lr, **options)
        case _:
            core = optax.contrib.muon(lr, **options)
    if clip is None:
        return core
    check_range("optimizers.make", "clip", clip, 0, low_open=True)
    return optax.chain(optax.clip_by_global_norm(clip), core)


def on_frames(
    inner: optax.GradientTransformation, *, joint: bool = False
) -> optax.GradientTransformation:
    r"""Return ``inner`` for parameters that are orthonormal frames ``[..., n, d]`` and stay so.

    The gradient G at U is projected to the tangent space, ``G - U sym(U^T G)``; after the inner
    optimizer's step the frame is made orthonormal again by the Cholesky factor of its Gram matrix.
    Columns of zeros stay zero. Moments of the inner optimizer are not transported, which small
    steps do not need.

    Args:
        inner: any optax optimizer.
        joint: the parameters are ``[K, n, d]`` and ``[U_1 .. U_K]`` is one frame.

    References:
        Absil, Mahony & Sepulchre 2008, "Optimization Algorithms on Matrix Manifolds", sections
        3.6.1 and 4.1.1.
    """
    mm = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    t = lambda x: jnp.swapaxes(x, -1, -2)

    def wide(u: Array) -> Array:
        if not joint:
            return u
        return jnp.moveaxis(u, 0, 1).reshape(u.shape[1], u.shape[0] * u.shape[2])

    def narrow(a: Array, like: Array) -> Array:
        if not joint:
            return a
        k, n, d = like.shape
        return jnp.moveaxis(a.reshape(n, k, d), 1, 0)

    def project(g: Array, u: Array) -> Array:
        frame, slope = wide(u), wide(g)
        inside = mm(t(frame), slope)
        tangent = slope - mm(frame, 0.5 * (inside + t(inside)))
        return narrow(jnp.where(jnp.any(frame != 0, axis=-2, keepdims=True), tangent, 0), u)

    def retract(update: Array, u: Array) -> Array:
        moved = wide(u + update)
        absent = jnp.all(moved == 0, axis=-2)
        gram = mm(t(moved), moved)
        eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=u.dtype), gram.shape)
        factor = jnp.linalg.cholesky(gram + jnp.where(absent[..., None], eye, 0))
        frame = jax.lax.linalg.triangular_solve(
            factor, moved, left_side=False, lower=True, transpose_a=True
        )
        return narrow(frame, u) - u

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        grads = jax.tree.map(project, grads, params)
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(retract, updates, params), state

    return optax.GradientTransformation(inner.init, update)  # pyright: ignore[reportArgumentType]
