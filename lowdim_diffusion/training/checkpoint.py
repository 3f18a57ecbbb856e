r"""Checkpoints that are never half written, silently damaged or silently reinterpreted.

One step is one directory ``<root>/<step>`` written by Orbax, with three items that commit in a
single rename::

    state    the array leaves, as nested dictionaries named by their tree path
    leaves   for each path: shape, dtype and sha256 of the row-major little-endian bytes
    meta     format_version, step, score (lower is better; null where there is none), and what the
             caller wants to find again (config, seed, versions)

``leaves`` and ``meta`` carry their own sha256, so a changed byte is noticed or harmless.

Saving copies the leaves to the host, then digests, writes and syncs them in a background thread:
once :meth:`Checkpointer.save` has returned, the state may be donated. The copy stays for the next
save. Restoring walks from the
newest step to the oldest, compares shapes and dtypes before it reads, and digests after; a step
that fails is moved to ``damaged-<step>`` and the step before it is used.

The digest of a whole state is the sha256 of the lines ``path dtype shape sha256``, sorted by path;
it does not depend on devices, sharding or container types.

A step in an older format is brought to the present one as it is read (:data:`FORMAT_VERSION`).
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lowdim_diffusion import _files
from lowdim_diffusion._checks import check_int
from lowdim_diffusion._nested import nest
from lowdim_diffusion._types import PyTree
from lowdim_diffusion.sharding import is_writer
from lowdim_diffusion.training import _leaves
from lowdim_diffusion.training.step import new_guard

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "Checkpointer",
    "IncompatibleStateError",
    "NoUsableCheckpointError",
    "NonFiniteError",
    "Restored",
    "StepReport",
    "all_steps",
    "best",
    "digest",
    "load",
    "restore_latest",
    "scores",
    "verify",
]

FORMAT_VERSION = 2
"""Version of the layout above and of the training state's leaves.

An older one on disk is migrated as it is read, a newer one is refused, not guessed at. 1: a state
without guards.
"""

_TRASH = "trash"
_DAMAGED = "damaged-"
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(OSError):
    """A checkpoint could not be written or read: disk full, permission, file system trouble."""


class NoUsableCheckpointError(RuntimeError):
    """Checkpoints exist, and none of them verifies."""


class IncompatibleStateError(ValueError):
    """The checkpoint is sound, but belongs to another model, optimizer, dtype or format."""


class NonFiniteError(FloatingPointError):
    """The state to be saved contains NaN or infinity."""


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    state: Any
    meta: dict[str, Any]


class StepReport(NamedTuple):
    """What :func:`verify` found about one step; ``problem`` is empty when ``ok``."""

    step: int
    ok: bool
    problem: str


class _Damaged(Exception):
    """The bytes of a step are not the bytes that were written."""


class Checkpointer:
    """Writes and restores the checkpoints of one run; a context manager, closed on every path.

    Leaving the ``with`` block waits for the save in flight, so a program that then ends
    successfully has its last step on disk. One writer per root: hold the run directory's lock.

    With several processes every one calls :meth:`save` and :meth:`restore_latest` at the same
    steps; process 0 alone touches the disk and hands what it read to the others, so no shared file
    system is needed.

    Args:
        root: directory of the steps, created if missing.
        keep: how many of the latest steps to keep, at least 1.
        keep_every: also keep every step that is a multiple of this number, for ever.
        keep_best: also keep so many steps with the lowest score.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpointer:
        ...     checkpointer.save(3, {"params": {"w": jnp.ones(2)}}, {"seed": 0})
        ...     found = checkpointer.restore_latest({"params": {"w": jnp.zeros(2)}})
        >>> found.step, found.state["params"]["w"].tolist(), found.meta["seed"]
        (3, [1.0, 1.0], 0)
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                "Checkpointer: keep and keep_every must be at least 1, got "
                f"{keep} and {keep_every}."
            )
        check_int("Checkpointer", "keep_best", keep_best, 0)
        self.root = pathlib.Path(root).absolute()
        self.keep = keep
        self.keep_every = keep_every
        self.keep_best = keep_best
        self._scores: dict[int, float | None] | None = None
        self._buffers: dict[str, np.ndarray] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._entered = False

    def __enter__(self) -> "Checkpointer":
        if is_writer():
            with _io_errors(f"cannot use {self.root} for checkpoints"):
                self.root.mkdir(parents=True, exist_ok=True)
                self._clean()
        self._entered = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._entered = False
        try:
            self.wait()
        except (CheckpointError, NonFiniteError) as late:
            if error is None:
                raise
            warnings.warn(f"the last checkpoint was not written: {late}", stacklevel=2)

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        *,
        score: float | None = None,
        force: bool = False,
    ) -> None:
        """Start saving ``state`` as ``step``; the state may be donated or changed afterwards.

        Waits for the save before it, if that is still running.

        Args:
            step: larger than every step on disk.
            state: pytree of jax or NumPy arrays (typed keys too) and Python or NumPy numbers.
            meta: what JSON can hold; ``format_version``, ``step`` and ``score`` are added.
            score: what ``keep_best`` goes by, lower is better; one that is not finite is none.
            force: do nothing, instead of raising, if ``step`` is already the newest one. For the
                save at the end of training.

        Raises:
            CheckpointError: the save before this one failed, the disk is too full, or the step is
                not new.
            NonFiniteError: the state before this one was not finite, see :meth:`wait`.
            ValueError, TypeError: the state cannot be stored; nothing was written.
        """
        if not self._entered:
            raise RuntimeError("Checkpointer.save: use `with Checkpointer(root) as checkpointer:`.")
        self.wait()
        leaves = _leaves.flatten(state)
        _leaves.check_storable(leaves)
        arrays = self._buffers = _leaves.to_hosts(leaves, self._buffers)
        if not is_writer():
            return
        newest = max(all_steps(self.root), default=-1)
        if step == newest and force:
            return
        if step <= newest:
            raise CheckpointError(
                f"step {step} was not saved: {self.root} already holds step {newest}; restore it "
                "first or use another directory."
            )
        described = json.loads(json.dumps(dict(meta), default=_plain))
        score = None if score is None or not math.isfinite(score) else float(score)
        described |= {"format_version": FORMAT_VERSION, "step": step, "score": score}
        self._check_space(step, sum(x.nbytes for x in arrays.values()))
        kinds = {path: _leaves.describe(leaf) for path, leaf in leaves.items()}
        self._thread = threading.Thread(
            target=self._write,
            args=(step, arrays, kinds, described),
            name=f"checkpoint-{step}",
            daemon=True,
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a background save that has ended, if it failed; never waits."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight.

        Raises:
            CheckpointError: the save that just ended had failed. Raised once; a later save may
                succeed.
            NonFiniteError: it was refused: a leaf held NaN, or a leaf of several numbers an
                infinity. (A single infinity is the honest first value of a running minimum.)
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore_latest(self, target: PyTree, *, without: Sequence[str] = ()) -> Restored | None:
        """Return what :func:`restore_latest` finds, and move damaged steps aside."""
        self.wait()
        return restore_latest(self.root, target, without=without, move_aside=True)

    def _check_space(self, step: int, num_bytes: int) -> None:
        with _io_errors(f"step {step} was not saved in {self.root}"):  # it may be gone by now
            free = shutil.disk_usage(self.root).free
        if free < 2 * num_bytes:
            raise CheckpointError(
                f"step {step} was not saved: {2 * num_bytes / 1e6:.1f} MB needed (twice the "
                f"state), {free / 1e6:.1f} MB free on the disk of {self.root}; free some space "
                "and run again."
            )

    def _write(
        self,
        step: int,
        arrays: dict[str, np.ndarray],
        kinds: _leaves.Table,
        meta: dict[str, Any],
    ) -> None:
        """Check, digest, write and sync one step in the background; errors are kept for wait."""
        try:
            if bad := _leaves.non_finite(arrays):
                more = f" and {len(bad) - 1} more leaves hold" if len(bad) > 1 else " holds"
                raise NonFiniteError(
                    f"step {step} was not saved: {bad[0]}{more} NaN or infinity; the checkpoints "
                    "before it are untouched. Lower the learning rate or clip the gradients."
                )
            with _io_errors(f"step {step} was not saved in {self.root}"):
                leaves = {"step": step, "leaves": _leaves.table(arrays, kinds)}
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave(nest(arrays)),
                    leaves=ocp.args.JsonSave(_seal(leaves)),
                    meta=ocp.args.JsonSave(_seal(meta)),
                )
                options = self._options(step, meta["score"])
                with _quiet(), ocp.CheckpointManager(self.root, options=options) as manager:
                    if not manager.save(step, args=items, force=True):
                        raise CheckpointError(
                            f"step {step} was not saved in {self.root}: Orbax refused it."
                        )
                    manager.wait_until_finished()
                _files.sync_tree(self.root / str(step))
                _files.sync_directory(self.root)
                self._clean()
        except Exception as error:
            self._error = error
            with contextlib.suppress(OSError):
                self._clean()

    def _options(self, step: int, score: float | None) -> ocp.CheckpointManagerOptions:
        policies: list[Any] = [checkpoint_managers.LatestN(self.keep)]
        if self.keep_every is not None:
            policies.append(checkpoint_managers.EveryNSteps(self.keep_every))
        if self.keep_best:
            if self._scores is None:
                self._scores = scores(self.root)
            here = set(all_steps(self.root))
            self._scores = {k: v for k, v in self._scores.items() if k in here} | {step: score}
            policies.append(_These(_ranked(self._scores)[: self.keep_best]))
        return ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=False,
            # Old steps leave by one rename: a kill cannot gut a step that is still listed.
            todelete_subdir=_TRASH,
            # The manager already lives in a thread of ours.
            enable_async_checkpointing=False,
            lightweight_initialize=True,
            multiprocessing_options=_alone(),
        )

    def _clean(self) -> None:
        """Delete what rotation threw away and what a killed save left behind."""
        for leftover in (*self.root.glob(_TEMPORARY), *(self.root / _TRASH).glob("*")):
            _files.remove(leftover)


def all_steps(root: str | os.PathLike) -> list[int]:
    """Return the steps on disk in ascending order, verified or not; other entries are ignored.

    Examples:
        >>> all_steps("/nowhere")
        []
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in root.iterdir()
        if entry.name.isdecimal()
        and entry.name == str(int(entry.name))
        and entry.is_dir()
        and not entry.is_symlink()
    )


class _These(NamedTuple):
    """Orbax's policy to keep the steps that are named."""

    steps: list[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [info.step in self.steps for info in checkpoints]


def scores(root: str | os.PathLike) -> dict[int, float | None]:
    """Return the score of each step, None where it has none or its ``meta`` is damaged."""
    return {step: _meta(root, step).get("score") for step in all_steps(root)}


def newest_meta(root: str | os.PathLike) -> dict[str, Any]:
    """Return what was stored beside the newest step whose ``meta`` is sound; empty if none is."""
    return next((found for step in all_steps(root)[::-1] if (found := _meta(root, step))), {})


def _meta(root: str | os.PathLike, step: int) -> dict[str, Any]:
    try:
        with _quiet():
            inside = pathlib.Path(root).absolute() / str(step) / "meta"
            return _unseal(_read_json(inside), step, "meta")
    except Exception:  # Orbax and JSON fail in many ways; a restore would say how
        return {}


def best(root: str | os.PathLike) -> int | None:
    """Return the step with the lowest score, the earlier one of two that are equal; or None."""
    return next(iter(_ranked(scores(root))), None)


def _ranked(scores: Mapping[int, float | None]) -> list[int]:
    """Steps that have a score, best first."""
    known = sorted((score, step) for step, score in scores.items() if score is not None)
    return [step for _, step in known]


def restore_latest(
    root: str | os.PathLike,
    target: PyTree,
    *,
    without: Sequence[str] = (),
    move_aside: bool = False,
) -> Restored | None:
    """Return ``(step, state, meta)`` of the newest step that verifies; None without any steps.

    A damaged step is passed over with a warning.

    Args:
        root: directory of the steps.
        target: pytree of arrays or ``jax.ShapeDtypeStruct`` with the structure, shapes, dtypes and
            shardings to restore to, on any number of devices. Without a sharding: default device.
        without: names at the top of the state, such as ``"opt_state"``, whose leaves in the
            checkpoint are neither compared nor read; ``target`` has none there.
        move_aside: rename damaged steps to ``damaged-<step>`` once a sound one is found. Only for
            the one writer of the run.

    Raises:
        IncompatibleStateError: the newest sound step has other leaves; the first is named.
        NoUsableCheckpointError: there are steps, all damaged. Nothing was changed on disk.
        CheckpointError: the steps cannot be read for reasons that do not lie in them.
    """
    leaves = _leaves.flatten(target)

    def check(step: int, stored: _leaves.Table) -> None:
        _check_same(step, stored, {path: _leaves.describe(leaf) for path, leaf in leaves.items()})

    wanted = lambda path: _top(path) not in without
    found = _shared(
        leaves, lambda: _newest(pathlib.Path(root), check, wanted=wanted, move_aside=move_aside)
    )
    if found is None:
        return None
    placed = [_leaves.place(found.arrays[path], leaf) for path, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(target), placed)
    return Restored(found.step, state, found.meta)


def load(
    root: str | os.PathLike, step: int | None = None, *, only: Sequence[str] | None = None
) -> Restored:
    """Return a verified step without knowing its structure: nested dictionaries of NumPy arrays.

    Reads only, and is safe beside a running training. Typed keys come back as such.

    Args:
        root: directory of the steps.
        step: which one; default the newest that verifies.
        only: names at the top of the state, such as ``("params", "ema")``; nothing else is read.

    Raises:
        NoUsableCheckpointError: no step, or none that verifies.
        IncompatibleStateError: written in a newer format.
    """
    wanted = lambda path: only is None or _top(path) in only
    found = _newest(pathlib.Path(root), lambda *_: None, wanted=wanted, only=step)
    if found is None:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise NoUsableCheckpointError(f"no {which} in {root}.")
    leaves = {
        path: _leaves.wrap_key(x, found.leaves[path]) if "key" in found.leaves[path] else x
        for path, x in found.arrays.items()
    }
    return Restored(found.step, nest(leaves), found.meta)


def verify(root: str | os.PathLike) -> list[StepReport]:
    """Return for each step, oldest first, whether its bytes are those written; reads only."""
    reports = []
    for step in all_steps(root):
        try:
            _read(pathlib.Path(root) / str(step), step, lambda *_: None, lambda _: True)
        except (_Damaged, IncompatibleStateError) as error:
            reports.append(StepReport(step, False, str(error)))
        else:
            reports.append(StepReport(step, True, ""))
    return reports


def digest(source: PyTree | str | os.PathLike, *, step: int | None = None) -> dict[str, Any]:
    r"""Return ``{"step", "digest", "sum"}``: the identity of a state in one line.

    ``digest`` is the sha256 of the lines ``path dtype shape sha256\n``, sorted by path, where the
    inner sha256 is that of the leaf's row-major little-endian bytes (typed keys: of their data).
    ``sum`` is :math:`\sum |p|` over all entries of the leaves below ``params``, in float64.

    Args:
        source: a state, or the directory of the steps.
        step: which step of the directory (default: the newest that verifies); for a state, only
            recorded.

    Raises:
        NoUsableCheckpointError: no step, or none that verifies.

    Examples:
        >>> digest({"params": {"w": jnp.array([1.0, -2.0])}}, step=7)["sum"]
        3.0
    """
    if isinstance(source, str | os.PathLike):
        step, source, _ = load(source, step)
    leaves = _leaves.flatten(source)
    _leaves.check_storable(leaves)
    arrays = _leaves.to_hosts(leaves)
    table = _leaves.table(arrays, {path: _leaves.describe(leaf) for path, leaf in leaves.items()})
    lines = [f"{path} {_leaves.spell(x)} {x['sha256']}\n" for path, x in sorted(table.items())]
    total = 0.0
    for path, array in arrays.items():
        if path.split("/")[0] == "params" and "key" not in table[path]:
            wide = np.complex128 if np.iscomplexobj(array) else np.float64
            total += float(np.sum(np.abs(array.astype(wide))))
    return {
        "step": step,
        "digest": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "sum": total,
    }


# --- reading -------------------------------------------------------------------------------------

_Check = Callable[[int, _leaves.Table], None]
_Wanted = Callable[[str], bool]


class _Found(NamedTuple):
    step: int
    arrays: dict[str, np.ndarray]
    leaves: _leaves.Table
    meta: dict[str, Any]


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(content, sort_keys=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": content}


def _unseal(sealed: Any, step: int, name: str) -> dict[str, Any]:
    if not isinstance(sealed, dict) or sealed != _seal(sealed.get("content", {})):
        raise _Damaged(f"the item {name!r} is not what was written")
    if sealed["content"].get("step") != step:
        raise _Damaged(f"the item {name!r} belongs to step {sealed['content'].get('step')}")
    return sealed["content"]


def _top(path: str) -> str:
    return path.split("/")[0]


def _read(directory: pathlib.Path, step: int, check: _Check, wanted: _Wanted) -> _Found:
    """Read and verify the wanted leaves of one step.

    ``check`` sees their table, in the present format, before any array is allocated.
    """
    directory = directory.absolute()  # Orbax finds nothing under a relative path, silently
    try:
        with _quiet():
            table = _unseal(_read_json(directory / "leaves"), step, "leaves")
            meta = _unseal(_read_json(directory / "meta"), step, "meta")
            version = meta["format_version"]
            if version > FORMAT_VERSION:
                raise IncompatibleStateError(
                    f"checkpoint of step {step} has format {version}, this version "
                    f"reads up to {FORMAT_VERSION}; upgrade lowdim_diffusion."
                )
            leaves = _migrated_table(version, table["leaves"])
            leaves = {path: entry for path, entry in leaves.items() if wanted(path)}
            check(step, leaves)
            arrays = _migrated(version, _read_arrays(directory / "state", table["leaves"], wanted))
            arrays = {path: arrays[path] for path in leaves}
    except (_Damaged, IncompatibleStateError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if (
            isinstance(error, CheckpointError | MemoryError | PermissionError)
            or "PERMISSION_DENIED" in text
        ):
            raise CheckpointError(f"cannot read {directory}: {text[:300]}") from error
        raise _Damaged(f"cannot be read ({type(error).__name__}: {text[:160]})") from error
    return _Found(step, arrays, leaves, meta)


def _read_json(directory: pathlib.Path) -> Any:
    reader = ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_alone())
    return reader.restore(directory)


def _read_arrays(
    directory: pathlib.Path, leaves: _leaves.Table, wanted: _Wanted
) -> dict[str, np.ndarray]:
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone())
    described = reader.metadata(directory).item_metadata
    if described is None:
        raise _Damaged("the description of its arrays is missing")
    stored = _leaves.flatten(described.tree)
    for path in sorted(stored.keys() | leaves.keys()):
        if path not in stored or path not in leaves:
            where = "table" if path in stored else "state"
            raise _Damaged(f"leaf {path} is missing in the {where}")
        if list(stored[path].shape) != leaves[path]["shape"]:
            shape = stored[path].shape
            raise _Damaged(f"leaf {path} has shape {shape}, not {leaves[path]['shape']}")
    leaves = {path: entry for path, entry in leaves.items() if wanted(path)}
    if not leaves:
        return {}
    _check_memory(leaves)
    whole = nest({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in leaves})
    asked = ocp.args.PyTreeRestore(
        item=jax.tree.map(lambda _: 0, whole), restore_args=whole, partial_restore=True
    )
    arrays = _leaves.flatten(reader.restore(directory, args=asked))
    for path, entry in leaves.items():
        same_dtype = _leaves.describe(arrays[path])["dtype"] == entry["dtype"]
        if not same_dtype or _leaves.sha256(arrays[path]) != entry["sha256"]:
            raise _Damaged(f"the bytes of leaf {path} are not those that were written")
    return arrays


def _with_guard(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Format 1 to 2: a training state gained guards, which had seen nothing yet."""
    if "step" not in arrays or not any(_top(path) == "params" for path in arrays):
        return arrays
    return arrays | {k: np.asarray(v) for k, v in _leaves.flatten({"guard": new_guard()}).items()}


_MIGRATIONS = {1: _with_guard}
"""By the version that is read: its arrays, by path, to those of the next version."""


def _migrated(version: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for older in range(version, FORMAT_VERSION):
        arrays = _MIGRATIONS[older](arrays)
    return arrays


def _migrated_table(version: int, leaves: _leaves.Table) -> _leaves.Table:
    """The table of the migrated arrays, before there are any: zeros without memory stand in."""
    zeros = {
        path: np.broadcast_to(np.zeros((), jnp.dtype(entry["dtype"])), entry["shape"])
        for path, entry in leaves.items()
    }
    arrays = _migrated(version, zeros)
    return {path: leaves.get(path) or _leaves.describe(x) for path, x in arrays.items()}


def _check_memory(leaves: _leaves.Table) -> None:
    """Raise before, not while, more is allocated than there is."""
    sizes = [math.prod(x["shape"]) * jnp.dtype(x["dtype"]).itemsize for x in leaves.values()]
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return
    if sum(sizes) > memory:
        raise CheckpointError(
            f"the arrays take {sum(sizes) / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB"
        )


def _check_same(step: int, stored: _leaves.Table, here: _leaves.Table) -> None:
    """Raise, naming the first leaf that differs, unless both tables describe the same state."""

    def fields(entry: _leaves.Leaf | None) -> Any:
        return entry and (entry["shape"], entry["dtype"], entry.get("key"))

    paths = sorted(stored.keys() | here.keys())
    bad = [path for path in paths if fields(stored.get(path)) != fields(here.get(path))]
    if bad:
        more = f" ({len(bad) - 1} more leaves differ)" if len(bad) > 1 else ""
        there, now = _leaves.spell(stored.get(bad[0])), _leaves.spell(here.get(bad[0]))
        reset = "; only the optimizer differs: --reset-optimizer keeps the weights alone"
        raise IncompatibleStateError(
            f"checkpoint of step {step} does not fit: {bad[0]} is {there} in the checkpoint and "
            f"{now} in this run{more}; use the model, dtype and optimizer of the run that wrote "
            f"it, or another output directory{reset * all(_top(p) == 'opt_state' for p in bad)}."
        )


def _newest(
    root: pathlib.Path,
    check: _Check,
    *,
    wanted: _Wanted,
    only: int | None = None,
    move_aside: bool = False,
) -> _Found | None:
    """The newest step that verifies; None if there is none to look at."""
    damaged: dict[int, str] = {}
    for step in reversed(all_steps(root)):
        if only is not None and step != only:
            continue
        try:
            found = _read(root / str(step), step, check, wanted)
        except _Damaged as error:
            damaged[step] = str(error)
            continue
        for bad, problem in damaged.items():
            place = _move_aside(root, bad) if move_aside else None
            told = f"moved to {place.name}" if place else "left in place"
            warnings.warn(
                f"checkpoint of step {bad} is damaged ({problem}); {told}, using step {step}.",
                stacklevel=4,
            )
        return found
    # What an earlier start moved aside still counts: never begin again from zero in silence.
    aside = [] if only is not None else sorted(path.name for path in root.glob(f"{_DAMAGED}*"))
    if damaged or aside:
        listed = [f"step {bad}: {problem}" for bad, problem in damaged.items()] + aside
        raise NoUsableCheckpointError(
            f"no usable checkpoint in {root} ({'; '.join(listed)}). Nothing was changed: put back "
            "a good copy, or start again in another output directory."
        )
    return None


def _move_aside(root: pathlib.Path, step: int) -> pathlib.Path | None:
    place = root / f"{_DAMAGED}{step}"
    count = 1
    while place.exists():
        count += 1
        place = root / f"{_DAMAGED}{step}-{count}"
    try:
        (root / str(step)).rename(place)
    except OSError:
        return None
    return place


# --- processes, errors, noise --------------------------------------------------------------------


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax without barriers: one process reads and writes, and nobody waits for it."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def _shared(leaves: Mapping[str, Any], read: Callable[[], _Found | None]) -> _Found | None:
    """What process 0 reads, on every process."""
    if jax.process_count() == 1:
        return read()
    found, error = None, None
    if is_writer():
        try:
            found = read()
        except Exception as reason:
            error = reason
    text = np.frombuffer(json.dumps(found.meta if found else {}).encode(), np.uint8)
    header = np.array([error is not None, found.step if found else -1, text.size], np.int32)
    failed, step, length = multihost_utils.broadcast_one_to_all(header).tolist()
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("process 0 could not restore a checkpoint; see its message.")
    if step < 0:
        return None
    text = multihost_utils.broadcast_one_to_all(text if found else np.zeros(length, np.uint8))
    arrays = {}
    for path, leaf in leaves.items():
        shape, dtype = _leaves.describe(leaf)["shape"], jnp.dtype(_leaves.describe(leaf)["dtype"])
        mine = found.arrays[path] if found else np.zeros(shape, dtype)
        sent = np.asarray(multihost_utils.broadcast_one_to_all(_leaves.as_bytes(mine)))
        arrays[path] = sent.view(dtype).reshape(shape)
    return _Found(step, arrays, {}, json.loads(np.asarray(text).tobytes()))


@contextlib.contextmanager
def _io_errors(what: str) -> Iterator[None]:
    """Whatever the storage throws, as one line of :class:`CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "RESOURCE_EXHAUSTED" in text or "No space left" in text:
            text = "the disk is full; older steps are intact. Free some space and run again."
        else:
            text = f"{type(error).__name__}: {text[:300]}"
        raise CheckpointError(f"{what}: {text}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs tracebacks of errors that it also raises; we report them once."""
    _ignore_closed_loops()
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep the echo of a failed read or write off the screen, for the rest of the process.

    TensorStore's other transfers end up to half a second after the first one failed, and each then
    finds its event loop closed: dozens of tracebacks that say nothing.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def _plain(value: Any) -> Any:
    """JSON for NumPy and jax numbers and for paths."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = type(value).__name__
    raise TypeError(f"checkpoint: meta holds a {kind}, which JSON cannot; convert it first.")
