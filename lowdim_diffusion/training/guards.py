r"""Guards of the training step: a non-finite or suddenly large loss never reaches the parameters.

Everything is decided inside the compiled loop, from numbers that are equal on all devices; the host
is asked only when training has to stop. A step is *bad* if its loss or gradient is not finite, or,
with ``max_spike``, if its loss exceeds that many times the median of the last :data:`WINDOW` good
losses. (The median, since one large loss in a window does not move it; good ones only, since a
training that has diverged must not get used to it.) A bad step changes neither parameters, nor
optimizer, nor averages; it only moves on to the next batch.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice, check_int, check_range
from lowdim_diffusion._types import Array, Params, PyTree
from lowdim_diffusion.training.step import WINDOW, Guard, TrainState, TrainStep

__all__ = ["BadStep", "Guard", "diagnose", "guarded"]


def guarded(
    train_step: TrainStep,
    *,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    max_spike: float | None = None,
    max_skips: int = 10,
) -> TrainStep:
    """Return ``train_step`` with guards: bad steps leave the state as it was, except for ``step``.

    Its metrics gain ``stop``, whether training should end after this step, and, with ``skip``,
    ``skipped``, the number of updates left out so far.

    Args:
        train_step: from :func:`make_train_step`.
        on_nonfinite: ``"stop"`` at the first bad step, or ``"skip"`` its update.
        max_spike: times the median of the last good losses that a loss may reach, > 1; active once
            the window is full, and while its median is positive. None: only non-finite steps are
            bad.
        max_skips: with ``skip``, stop after so many bad steps in a row and one more.

    Examples:
        >>> import optax
        >>> from lowdim_diffusion.training import init_state, make_train_step
        >>> loss_fn = lambda params, batch, key: (params - batch["x"]) ** 2
        >>> step = guarded(make_train_step(loss_fn, optax.sgd(0.1)), on_nonfinite="skip")
        >>> state = init_state(jnp.ones(()), optax.sgd(0.1))
        >>> state, metrics = step(state, {"x": jnp.array([jnp.nan, 1.0])}, jax.random.key(0))
        >>> int(state.step), float(state.params), int(metrics["skipped"]), bool(metrics["stop"])
        (1, 1.0, 1, False)
    """
    check_choice("guarded", "on_nonfinite", on_nonfinite, ("stop", "skip"))
    check_int("guarded", "max_skips", max_skips)
    if max_spike is not None:
        check_range("guarded", "max_spike", max_spike, 1, low_open=True)
    allowed = max_skips if on_nonfinite == "skip" else 0

    def update(state: TrainState, grads: Params, metrics: dict[str, Array]):
        new, metrics = train_step.update(state, grads, metrics)
        guard, loss = state.guard, metrics["loss"].astype(jnp.float32)
        good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        if max_spike is not None:
            good &= ~_is_spike(guard, loss, max_spike)
        losses = guard.losses.at[guard.seen % WINDOW].set(loss)
        zero = jnp.zeros_like(guard.streak)
        moved = new._replace(guard=Guard(guard.skipped, zero, losses, guard.seen + 1))
        skips = guard._replace(skipped=guard.skipped + 1, streak=guard.streak + 1)
        left = state._replace(step=new.step, guard=skips)
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), moved, left)
        counts = {"skipped": state.guard.skipped} if allowed else {}
        return state, {**metrics, **counts, "stop": state.guard.streak > allowed}

    return dataclasses.replace(train_step, update=update)


def _is_spike(guard: Guard, loss: Array, max_spike: float) -> Array:
    median = jnp.median(guard.losses)
    return (guard.seen >= WINDOW) & (median > 0) & (loss > max_spike * median)


class BadStep(NamedTuple):
    """What was wrong with a step."""

    first: Literal["parameters", "data", "loss", "gradient", "spike"]
    """What was not finite first; ``spike``: all was finite, and the loss too large."""
    rows: list[int]
    """Numbers in the data set of the examples of its batch."""
    bad_rows: list[int]
    """Those that are not finite themselves."""
    text: str
    """The same in words."""


def diagnose(state: TrainState, metrics: dict[str, Any], batch: PyTree) -> BadStep:
    """Return what was wrong with a step that the guards stopped.

    Args:
        state: what the guarded step left.
        metrics: its ``loss`` and ``grad_norm``.
        batch: its whole batch, a dictionary with ``x`` and, if it has them, ``row``.
    """
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    rows = np.asarray(batch["row"] if "row" in batch else batch["index"])
    x = np.asarray(batch["x"], np.float64).reshape(len(rows), -1)
    bad = rows[~np.isfinite(x).all(axis=1)].tolist()
    finite = jax.tree.map(lambda p: bool(jnp.isfinite(p).all()), state.params)
    if not all(jax.tree.leaves(finite)):
        first, words = "parameters", "an update before it had made the parameters infinite or NaN"
    elif bad:
        first, words = "data", f"the data hold infinity or NaN, in example {_some(bad)}"
    elif not np.isfinite(loss):
        first, words = "loss", "the loss is the first to be infinite or NaN, from finite data"
    elif not np.isfinite(norm):
        first, words = "gradient", "the gradient is infinite or NaN, from finite data and loss"
    else:
        median = float(jnp.median(state.guard.losses))
        first = "spike"
        words = f"the loss is {loss / median:.3g} times {median:.4g}, the median before it"
    text = f"{words}; its batch are the examples {_some(rows.tolist())}"
    return BadStep(first, rows.tolist(), bad, text)


def _some(rows: list[int]) -> str:
    more = f", ... ({len(rows)} in all)" if len(rows) > 8 else ""
    return ", ".join(map(str, rows[:8])) + more
