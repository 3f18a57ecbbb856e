"""One training step as a pure function, and the state it moves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lowdim_diffusion._checks import check_int, fail
from lowdim_diffusion._types import Array, Batch, LossFn, Params, PyTree
from lowdim_diffusion.sharding import gather, local_index, mean_gradients
from lowdim_diffusion.training import ema as averages

__all__ = ["Guard", "TrainState", "TrainStep", "init_state", "make_train_step"]

WINDOW = 64
"""How many losses :class:`Guard` remembers."""


class Guard(NamedTuple):
    """What the guards of :func:`lowdim_diffusion.training.guards.guarded` remember."""

    skipped: Array
    """int32: updates left out so far."""
    streak: Array
    """int32: how many of them in a row, up to the last step."""
    losses: Array
    """float32 ``[WINDOW]``: the last good losses, in a ring."""
    seen: Array
    """int32: good losses so far."""


def new_guard() -> Guard:
    """Return the guard of a state that has seen nothing yet."""
    count = lambda: jnp.zeros((), jnp.int32)
    return Guard(count(), count(), jnp.zeros(WINDOW, jnp.float32), count())


class TrainState(NamedTuple):
    """Everything that training carries from one step to the next.

    Random keys and the position in the data are functions of ``step``, so a state that was saved
    and loaded continues bit for bit.
    """

    step: Array
    """int32: updates done."""
    params: Params
    opt_state: PyTree
    ema: tuple[Params, ...]
    """One average of the parameters per decay given to :func:`make_train_step`."""
    guard: Guard
    """Moved by guarded steps only."""

    @property
    def averaged(self) -> Params:
        """The first moving average, or the parameters where there is none: what to sample with."""
        return self.ema[0] if self.ema else self.params


@dataclass(frozen=True, eq=False)
class TrainStep:
    """The pure step ``(state, batch, key) -> (state, metrics)``, and what it is made of.

    Its halves are there for states that are split over the devices: gradients are taken per
    device, the update is left to the compiler.
    """

    loss: Callable[[Params, Batch, Any], tuple[Array, dict[str, Array]]]
    """``(params, batch, key) -> (loss, aux)``: means over the batch, on one device."""
    gradients: Callable[..., tuple[Params, dict[str, Array]]]
    """``(params, batch, key, specs=None) -> (gradients, metrics)``. With ``specs``, the partition
    of the parameters over the devices, each device gives and gets its part of them."""
    update: Callable[[TrainState, Params, dict[str, Array]], tuple[TrainState, dict[str, Array]]]
    """``(state, gradients, metrics) -> (state, metrics)``."""

    def __call__(self, state: TrainState, batch: Batch, key: Any):
        """Return the state after one update, and its metrics."""
        return self.update(state, *self.gradients(state.params, batch, key))


Decays: TypeAlias = averages.Decay | Sequence[averages.Decay] | None


def _decays(ema: Decays) -> tuple[averages.Decay, ...]:
    if ema is None:
        return ()
    return (ema,) if callable(ema) else tuple(ema)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: Decays = None
) -> TrainState:
    """Return the state before the first step; averages start at the parameters.

    Args:
        params: initial parameters.
        optimizer: optax transformation.
        ema: the same as for :func:`make_train_step`.
    """
    # Copies throughout: donating a state must not take the caller's arrays along.
    copy = lambda: jax.tree.map(jnp.copy, params)
    averaged = tuple(copy() for _ in _decays(ema))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, copy(), optimizer.init(params), averaged, new_guard())


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema: Decays = None,
    axis_name: str | None = None,
    accumulate: int = 1,
) -> TrainStep:
    """Return the pure step ``(state, batch, key) -> (state, metrics)``.

    It is written for one device and mapped over several in any of three ways with equal results:
    ``jax.shard_map`` or ``jax.pmap`` over ``axis_name`` (gradients and metrics are then averaged
    with ``lax.pmean``), or ``jax.jit`` over sharded arrays with ``axis_name=None``. A dictionary
    batch without an ``"index"`` entry gets one, the global position of each example, for losses
    that fold their keys with it.

    Args:
        loss_fn: ``(params, batch, key) -> loss`` or ``(loss, aux)``; a scalar or one loss per
            example; ``aux`` is a dictionary of scalars or of one number per example, and joins the
            metrics.
        optimizer: optax transformation.
        ema: a decay from :mod:`lowdim_diffusion.training.ema`, several of them, or None.
        axis_name: axis that the step is mapped over.
        accumulate: number of equal parts the batch is worked through in, one after the other, to
            save memory. Equal to the whole batch up to rounding. (``optax.MultiSteps`` would count
            each part as a step of its own, in the learning rate, the averages and the log.)

    Returns:
        The step. ``metrics`` holds ``loss``, ``grad_norm`` (before clipping) and the averages of
        ``aux``; the caller checks them for finiteness.

    Raises:
        TypeError: if the step is mapped and the batch is not a dictionary.
    """
    check_int("make_train_step", "accumulate", accumulate)
    decays = _decays(ema)

    def mean_loss(params: Params, batch: Batch, key: Any) -> tuple[Array, dict[str, Array]]:
        out = loss_fn(params, batch, key)
        loss, aux = out if isinstance(out, tuple) else (out, {})
        return jnp.mean(loss), jax.tree.map(jnp.mean, dict(aux))

    def gradients(params: Params, batch: Batch, key: Any, specs: PyTree = None):
        batch = _with_index(batch, axis_name)
        if axis_name is not None:
            # Marked as varying over the devices: otherwise shard_map sums the gradients by itself.
            params = jax.tree.map(lambda p: _varying(p, axis_name), params)
        whole = (lambda params: params) if specs is None else lambda params: gather(params, specs)
        total = jax.value_and_grad(
            lambda params, part: mean_loss(whole(params), part, key), has_aux=True
        )
        if accumulate == 1:
            (loss, aux), grads = total(params, batch)
        else:
            parts = _split(batch, accumulate)
            (loss, aux), grads = _mean_over(lambda part: total(params, part), parts, accumulate)
        metrics = {"loss": loss, **aux}
        if specs is not None:
            grads, metrics = mean_gradients(grads, specs), jax.lax.pmean(metrics, axis_name)
        elif axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        return grads, metrics

    def update(state: TrainState, grads: Params, metrics: dict[str, Array]):
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        moved = tuple(
            averages.update(average, params, decay(step.astype(jnp.float32)))
            for average, decay in zip(state.ema, decays, strict=True)
        )
        return TrainState(step, params, opt_state, moved, state.guard), metrics

    return TrainStep(mean_loss, gradients, update)


def _varying(x: Array, axis_name: str | None) -> Array:
    return jax.lax.pcast(x, axis_name, to="varying")


def _with_index(batch: Batch, axis_name: str | None) -> Batch:
    if not isinstance(batch, dict):
        if axis_name is not None:
            raise TypeError(
                "make_train_step: with axis_name the batch must be a dictionary of arrays, got "
                f"{type(batch).__name__}; the global index of each example is added to it."
            )
        return batch
    if "index" in batch or not batch:
        return batch
    local = jnp.shape(batch.get("x", jax.tree.leaves(batch)[0]))[0]
    return {**batch, "index": local_index(local, axis_name)}


def _split(batch: Batch, parts: int) -> Batch:
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise fail(
            "make_train_step",
            "accumulate must divide the batch on each device",
            f"a divisor of {size}",
            parts,
        )
    return jax.tree.map(lambda x: x.reshape(parts, size // parts, *x.shape[1:]), batch)


def _mean_over(fn: Callable[[Batch], PyTree], parts: Batch, count: int) -> PyTree:
    """Mean of ``fn`` over the leading axis of ``parts``, one part after the other."""
    first = fn(jax.tree.map(lambda x: x[0], parts))
    rest = jax.tree.map(lambda x: x[1:], parts)
    add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)
    total, _ = jax.lax.scan(add, first, rest)
    return jax.tree.map(lambda x: x / count, total)
