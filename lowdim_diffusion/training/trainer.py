"""The trainer: the compiled loop, with checkpoints, a log and signals around it.

It promises that a run stopped anywhere and started again gives bit for bit the state of a run that
was never stopped; that returning means the last step is on disk; and that a non-finite state never
becomes a checkpoint.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lowdim_diffusion._checks import check_int
from lowdim_diffusion._types import Params, PRNGKey, PyTree
from lowdim_diffusion.data import Chunk, Stream
from lowdim_diffusion.sharding import fsdp, meet, replicate, replicated
from lowdim_diffusion.training.checkpoint import Checkpointer, IncompatibleStateError, Restored
from lowdim_diffusion.training.guards import diagnose, guarded
from lowdim_diffusion.training.loop import Examples, Stretch, batch_of, compile_loop, data_key
from lowdim_diffusion.training.preemption import StopSignal
from lowdim_diffusion.training.progress import Monitor, Report
from lowdim_diffusion.training.rundir import RunDirectory, differences, filled
from lowdim_diffusion.training.sinks import Sink, Sinks
from lowdim_diffusion.training.step import TrainState, TrainStep
from lowdim_diffusion.training.throughput import PROFILE_AFTER, PROFILE_STEPS, Meter, profiled

__all__ = ["LossSpikeError", "NonFiniteLossError", "Outcome", "train"]

STRETCH_S = 1.0
"""Aimed-at time between two looks at the host: a signal waits so long at most."""


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient became NaN or infinite."""


class LossSpikeError(ArithmeticError):
    """The loss was many times what it had been."""


class Outcome(NamedTuple):
    """How training ended."""

    status: Literal["done", "already done", "stopped"]
    """``stopped``: a signal came; everything is saved, run again to continue."""
    state: TrainState
    first_step: int
    """Step that this call began after."""
    time_s: float
    """Time spent in the loop."""
    images_per_s: float
    compile_s: float
    mfu: float | None = None
    """Model-FLOPs utilisation; None on devices without a known peak."""
    peak_memory: int | None = None
    """Bytes on one device; None if it cannot say."""


def train(
    run: RunDirectory,
    init: Callable[[], TrainState],
    train_step: TrainStep,
    examples: Examples,
    arrays: PyTree,
    *,
    batch_size: int,
    num_steps: int,
    key: PRNGKey,
    mesh: Mesh,
    split_state: bool = False,
    config_text: str = "",
    fixed: Mapping[str, Any] | None = None,
    assumed: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    checkpoint_every: int = 1000,
    keep: int = 3,
    keep_every: int | None = None,
    keep_best: int = 0,
    score_fn: Callable[[TrainState], float] | None = None,
    reset_optimizer: Callable[[Params], PyTree] | None = None,
    sample_every: int = 0,
    sample_fn: Callable[[int, TrainState], None] | None = None,
    monitor: Monitor | None = None,
    sinks: Sequence[Sink] = (),
    profile: bool = False,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    max_spike: float | None = None,
    max_skips: int = 10,
) -> Outcome:
    """Train until ``num_steps`` in all, continuing what the run directory holds.

    Args:
        run: entered (locked) run directory.
        init: makes the state before the first step; only its shapes are used on resuming. Weights
            that it starts from are best arguments of a ``functools.partial``: closed over, they
            would become a part of the program that makes a split state.
        train_step: made with ``axis_name=sharding.AXIS``.
        examples: stateless batches ``(arrays, key, step, index) -> batch``.
        arrays: what they are drawn from; put on every device. Or a :class:`.data.Stream`, whose
            ``examples`` these are: then they are read and sent there as they are drawn.
        batch_size: global batch size.
        num_steps: total number of updates; a larger number than last time trains on.
        key: decides batches and noise, together with the step.
        mesh: devices; all of several processes call this function alike.
        split_state: split the state over the devices (:func:`sharding.fsdp`) instead of copying it.
        config_text: written to ``config.toml`` once the run is known to be this one.
        fixed: values that a resumed run must share with the first (seed, data, batch size, ...).
        assumed: what to take for values of ``fixed`` that a run did not record, since they did not
            exist when it was written.
        meta: further values stored in every checkpoint, beside those of the one before.
        checkpoint_every: steps between checkpoints; the last step, and the step at which a signal
            came, are saved too.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints at multiples of this step stay too.
        keep_best: so many with the lowest score stay too.
        score_fn: ``state -> held-out loss``, called at every checkpoint but that of a signal; it
            becomes the checkpoint's score, and ``held_out_loss`` in the metrics row of its step.
        reset_optimizer: ``params -> opt_state``, to resume without the optimizer's old state; it
            may be another optimizer then, and ``fixed["optim"]`` may differ.
        sample_every: steps between calls of ``sample_fn``; 0 never calls it.
        sample_fn: ``(step, state)``; called on every process.
        monitor: shows progress.
        sinks: get metrics rows besides ``metrics.jsonl``, and those of ``stats.jsonl``; closed at
            the end. One that fails is dropped with a warning.
        profile: record a few steps, once the run is warm, into ``profile/``.
        on_nonfinite: see :func:`lowdim_diffusion.training.guards.guarded`.
        max_spike: see there.
        max_skips: see there.

    Raises:
        NonFiniteLossError: at a non-finite loss or gradient that is not skipped; it says what was
            not finite first, ``bad_batch.json`` which examples the batch had, and checkpoints stay
            as they were.
        LossSpikeError: the same for a loss beyond ``max_spike``.
        IncompatibleStateError: the checkpoint is of another model, optimizer, data set or seed.
        NoUsableCheckpointError: there are checkpoints, and none is sound.
        CheckpointError: a checkpoint could not be written.
        DataError: a step needs an example of a stream that cannot be read; the steps before it are
            saved first.
    """
    for name, value in (("num_steps", num_steps), ("checkpoint_every", checkpoint_every)):
        check_int("train", name, value)
    guards: Any = {"on_nonfinite": on_nonfinite, "max_spike": max_spike, "max_skips": max_skips}
    train_step = guarded(train_step, **guards)
    fixed = dict(fixed or {})
    shapes = jax.eval_shape(init)
    places = fsdp(shapes, mesh) if split_state else jax.tree.map(lambda _: replicated(mesh), shapes)
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    note = monitor.note if monitor else lambda text: None
    policy: Any = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}
    with (
        StopSignal() as stop,
        Checkpointer(run.checkpoints_path, **policy) as checkpointer,
        contextlib.ExitStack() as on_exit,
    ):
        found = _restore(checkpointer, shapes, reset_optimizer)
        first = 0 if found is None else found.step
        if found is not None:
            recorded = filled(found.meta.get("fixed", {}), assumed or {})
            changed = _changes(recorded, fixed)
            if reset_optimizer is not None:
                changed = [line for line in changed if not line.startswith("optim.")]
            if changed:
                only_optim = all(line.startswith("optim.") for line in changed)
                reset = ", or --reset-optimizer to keep the weights alone" if only_optim else ""
                raise IncompatibleStateError(
                    f"{run.path} holds a run that differs in {'; '.join(changed)}; use the old "
                    f"value, or another --out for a new run{reset}."
                )
            note(f"continuing {run.path} from step {first}")
            if reset_optimizer is not None:
                note("the optimizer and its learning rate start anew")
        if first >= num_steps:
            return Outcome("already done", found.state, first, 0.0, 0.0, 0.0)  # pyright: ignore
        if found is not None:
            state = found.state
        elif split_state:
            state = _split_start(init, places)
        else:
            state = replicate(init(), mesh)
        if isinstance(arrays, Stream):
            feed = arrays.feed(mesh, data_key(key), first, num_steps)
        else:
            feed = _Held(replicate(arrays, mesh), num_steps)
        on_exit.callback(feed.close)
        key = replicate(key, mesh)
        begin = time.monotonic()
        loop = compile_loop(train_step, examples, batch_size, mesh, state, feed.shapes)
        compile_s = time.monotonic() - begin
        # Nothing is written before the step is known to compile.
        if changed := run.record_versions():
            note(f"warning: not the set-up that wrote this, bits may differ: {'; '.join(changed)}")
        if config_text:
            run.write_config(config_text)
        record = {**(found.meta if found else {}), **(meta or {}), "fixed": fixed}

        def save(step: int, score: float | None = None) -> None:
            log.flush()  # the rows of a checkpoint's steps are on disk before it is
            checkpointer.save(step, state, record, score=score, force=True)

        def tell() -> None:
            if row := meter.row(step):
                row |= {"unreadable": len(feed.unreadable)} if feed.unreadable else {}
                stats.write(row)
                row.pop("unix_time_s")
                everywhere.write([row], group="speed")

        step, stretch, busy_s, stopped = first, 1, 0.0, False
        skipped = int(state.guard.skipped)
        meter = Meter(loop.flops, list(mesh.devices.flat), batch_size)
        everywhere = Sinks(sinks)
        with (
            contextlib.closing(everywhere),
            run.open_stats(after_step=first) as stats,
            run.open_metrics(after_step=first) as log,
        ):
            if monitor:
                monitor.start(first, num_steps)
            try:
                while step < num_steps:
                    goal = _next_stop(step, num_steps, checkpoint_every, sample_every)
                    begin = time.monotonic()
                    chunk = feed(step)
                    waited, goal = time.monotonic() - begin, min(goal, chunk.end)
                    tracing = profile and step - first >= PROFILE_AFTER
                    count = min(PROFILE_STEPS if tracing else stretch, goal - step)
                    if stop.requested:
                        count = 0
                    with profiled(run, note) if tracing else contextlib.nullcontext():
                        out = loop(state, chunk.arrays, key, count)
                        spent = time.monotonic() - begin
                    # This process or another one was told to stop, or has no data to go on with.
                    stopped = out.num_steps == 0
                    if stopped:
                        state = out.state
                        break
                    if tracing:
                        profile = False
                    else:
                        streamed = isinstance(arrays, Stream)
                        meter.add(out.num_steps, spent, waited if streamed else 0.0)
                    state, step, busy_s = out.state, step + out.num_steps, busy_s + spent
                    due = out.ok and (step % checkpoint_every == 0 or step == num_steps)
                    score = float(score_fn(state)) if due and score_fn else None
                    rows = list(_rows(out.metrics, step, out.num_steps, batch_size))
                    if score is not None:
                        rows[-1]["held_out_loss"] = score
                    for row in rows:
                        log.write(row)
                    everywhere.write(rows)
                    if not out.ok:
                        batch = batch_of(examples, batch_size, mesh, chunk.arrays, key, step - 1)
                        raise _stopped(run, out, step, batch)
                    if (skips := int(state.guard.skipped)) > skipped:
                        skipped = skips
                        note(f"warning: {skips} updates skipped up to step {step}")
                    checkpointer.check()
                    speed = out.num_steps / max(spent, 1e-9)
                    stretch = int(np.clip(speed * STRETCH_S, 1, 4 * stretch))
                    if monitor:
                        loss = float(out.metrics["loss"].mean())
                        left = (num_steps - step) / speed
                        rate, mfu, memory = speed * batch_size, meter.mfu(speed), meter.memory()
                        monitor.update(Report(step, num_steps, loss, rate, left, mfu, memory))
                    if due:
                        save(step, score)
                    if sample_fn and sample_every and step % sample_every == 0:
                        sample_fn(step, state)
                    if meter.due:
                        tell()
                broken = chunk.error if stopped and step == chunk.end else None
                if stopped:
                    cause = f"{stop.name} received" if stop.requested else "another process stops"
                    cause = "data that cannot be read" if broken else cause
                    note(f"{cause}: saving step {step}")
                tell()
                save(step)
                checkpointer.wait()
                if stopped:
                    meet("saved")  # a process that fails ends the others, so not before
                if broken is not None:
                    raise broken
            finally:
                if monitor:
                    monitor.close()
    speed = (step - first) / max(busy_s, 1e-9)
    status = "done" if step >= num_steps else "stopped"
    found = (speed * batch_size, compile_s, meter.mfu(speed), meter.memory())
    return Outcome(status, state, first, busy_s, *found)


def _split_start(init: Callable[[], TrainState], places: TrainState) -> TrainState:
    """The first state, of which no device makes more than its part."""
    given: tuple = ()
    if isinstance(init, functools.partial):
        given = jax.tree.map(np.asarray, init.args)
        init = functools.partial(init.func, **init.keywords)
    return jax.jit(init, out_shardings=places)(*given)


class _Held:
    """Data that lie on the devices whole: one chunk for all steps."""

    def __init__(self, arrays: PyTree, num_steps: int):
        self.shapes, self.unreadable = arrays, ()
        self._chunk = Chunk(arrays, num_steps)

    def __call__(self, step: int) -> Chunk:
        return self._chunk

    def close(self) -> None:
        """Nothing to do."""


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what differs between a run's fixed values and those of now.

    ``data_sha256``, which data that are streamed do not have, and every entry of ``data_examples``
    count only where both know them; one line is enough for the examples.
    """
    found, told = [], False
    for line in differences(old, new):
        about_data, examples = line.startswith("data_"), line.startswith("data_examples.")
        if about_data and (": absent -> " in line or line.endswith(" -> absent")):
            continue
        if not (examples and told):
            found.append(line)
        told |= examples
    return found


def _restore(
    checkpointer: Checkpointer,
    shapes: TrainState,
    reset_optimizer: Callable[[Params], PyTree] | None,
) -> Restored | None:
    """The newest sound checkpoint, with a new optimizer's state if that is asked for."""
    if reset_optimizer is None:
        return checkpointer.restore_latest(shapes)
    found = checkpointer.restore_latest(shapes._replace(opt_state=()), without=("opt_state",))
    if found is None:
        return None
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
    fresh = jax.jit(reset_optimizer, out_shardings=places)(found.state.params)
    return found._replace(state=found.state._replace(opt_state=fresh))


def _next_stop(step: int, num_steps: int, *everys: int) -> int:
    """The next step at which the host has something to do."""
    return min([num_steps, *((step // every + 1) * every for every in everys if every)])


def _rows(metrics: Mapping[str, np.ndarray], step: int, count: int, batch_size: int):
    """One row per step of a stretch that ended at ``step``."""
    columns = {name: values.tolist() for name, values in metrics.items()}
    for i in range(count):
        done = step - count + i + 1
        yield {"step": done, "images": done * batch_size, **{k: v[i] for k, v in columns.items()}}


def _stopped(run: RunDirectory, out: Stretch, step: int, batch: Any) -> Exception:
    """The error for a stretch that the guards ended, after writing down its last batch."""
    last = {name: float(values[-1]) for name, values in out.metrics.items()}
    found = diagnose(out.state, last, batch)
    about = {"step": step, "first": found.first, "rows": found.rows, "bad_rows": found.bad_rows}
    run.write_text("bad_batch.json", json.dumps(about) + "\n")
    values = ", ".join(f"{name} {last[name]:g}" for name in ("loss", "grad_norm"))
    skipped = int(out.state.guard.streak) - 1
    after = f" after {skipped} skipped updates in a row" if skipped else ""
    error = LossSpikeError if found.first == "spike" else NonFiniteLossError
    return error(
        f"step {step}: {values}; stopped{after}. {found.text} (bad_batch.json). The checkpoints in "
        f"{run.checkpoints_path} are from before. Lower the learning rate, clip the gradients, "
        "look at the data, or let such updates be skipped (--train.on-nonfinite skip)."
    )
