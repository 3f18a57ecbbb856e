"""The directory of one run: one writer, nothing half written, nothing of somebody else touched.

::

    .lock          held (flock) by the process that trains; the kernel frees it, also on kill -9
    config.toml    the resolved configuration
    versions.json  packages, XLA flags and devices of the last process that trained
    metrics.jsonl  one JSON object per step, in order of ``step``
    stats.jsonl    speed, memory and utilisation, a row every few seconds
    checkpoints/   see :mod:`lowdim_diffusion.training.checkpoint`
    samples/       pictures
    report.html    what to read

Exactly one metrics row per step, whatever happened: rows reach the disk before the checkpoint of
their step does (:meth:`MetricsLog.flush` before ``Checkpointer.save``), and on resume the rows
beyond the restored step, and a torn last line, are dropped.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import socket
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lowdim_diffusion import _files
from lowdim_diffusion._nested import dotted

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock
    fcntl = None

__all__ = [
    "MetricsLog",
    "NotARunError",
    "RunDirectory",
    "RunLockedError",
    "current_versions",
    "differences",
    "filled",
    "read_metrics",
]

_MARK = "lowdim_diffusion run"
_PACKAGES = ("lowdim-diffusion", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunLockedError(RuntimeError):
    """Another process is training in this run directory."""


class NotARunError(ValueError):
    """The output directory belongs to something else."""


class RunDirectory:
    """A run directory, created or taken up again; entering it takes the lock.

    Args:
        path: the directory; created, with parents, if missing.
        writer: False on all but the first of several processes: nothing is created, locked or
            written, and every method does nothing.

    Raises:
        RunLockedError: on entering, if another process holds it.
        NotARunError: on entering, if it is not empty and not a run.
        OSError: on entering, if it cannot be created or written; the message names it.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunDirectory(folder) as run:
        ...     run.write_config("seed = 1")
        ...     with run.open_metrics(after_step=0) as log:
        ...         log.write({"step": 1, "loss": 0.5})
        ...     read_metrics(run.metrics_path)
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike, *, writer: bool = True):
        self.path = pathlib.Path(path).absolute()
        self.writer = writer
        self.config_path = self.path / "config.toml"
        self.versions_path = self.path / "versions.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.stats_path = self.path / "stats.jsonl"
        self.profile_path = self.path / "profile"
        self.checkpoints_path = self.path / "checkpoints"
        self.samples_path = self.path / "samples"
        self.report_path = self.path / "report.html"
        self._lock: int | None = None

    def __enter__(self) -> "RunDirectory":
        if not self.writer:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._take_lock()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise type(error)(
                f"cannot write to the output directory {self.path}: {reason}; choose another one "
                "or change its permissions."
            ) from error
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def is_new(self) -> bool:
        """Whether no configuration was written yet."""
        return not self.config_path.exists()

    def write_config(self, text: str) -> None:
        """Replace ``config.toml``."""
        self.write_text("config.toml", text)

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file of the run; a crash leaves the old or the new one."""
        if self.writer:
            _files.write_atomic(self.path / name, text)

    def record_versions(self, versions: Mapping[str, Any] | None = None) -> list[str]:
        """Write ``versions.json`` and return in what it differs from the one found there.

        Bits may differ between versions and devices: a resumed run should say so in one line.

        Args:
            versions: default :func:`current_versions`.
        """
        versions = current_versions() if versions is None else versions
        changed = []
        if self.versions_path.exists():
            try:
                before = json.loads(self.versions_path.read_text(encoding="utf-8"))
                changed = differences(before, versions)
            except (ValueError, AttributeError, RecursionError):
                changed = ["versions.json could not be read"]
        self.write_text("versions.json", json.dumps(versions, indent=2) + "\n")
        return changed

    def open_metrics(self, *, after_step: int) -> "MetricsLog":
        """Return the log of metrics, with everything after ``after_step`` dropped.

        Args:
            after_step: the restored step; for a run from the start, the step before the first row
                to come.
        """
        return MetricsLog(self.metrics_path, after_step=after_step, writer=self.writer)

    def open_stats(self, *, after_step: int) -> "MetricsLog":
        """Return the log of speed and memory; as :meth:`open_metrics`."""
        return MetricsLog(self.stats_path, after_step=after_step, writer=self.writer)

    def _refuse_foreign(self) -> None:
        names = sorted(
            entry.name
            for entry in self.path.iterdir()
            if not entry.name.startswith(".") and not entry.name.endswith(".tmp")
        )
        lock = self.path / ".lock"
        marked = lock.is_file() and lock.read_bytes().startswith(_MARK.encode())
        if names and not marked and self.versions_path.name not in names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise NotARunError(
                f"output directory {self.path} is not empty and not a run of lowdim_diffusion (it "
                f"holds {shown}); choose another one."
            )

    def _take_lock(self) -> None:
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:  # pragma: no cover - Windows has no flock
                warnings.warn("no file locks here: start one training per directory", stacklevel=3)
            else:
                _lock(handle)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise RunLockedError(
                f"output directory {self.path} is in use by another process ({holder or 'unnamed'})"
                "; wait for it, stop it, or choose another directory."
            ) from None
        except OSError as error:
            # Some network file systems have no locks; training there is still possible.
            warnings.warn(
                f"{self.path} cannot be locked ({error.strerror}): start one training per "
                "directory.",
                stacklevel=3,
            )
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{_MARK}, pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:
            os.close(handle)
            raise
        self._lock = handle


def _lock(handle: int) -> None:
    """Take the lock; again a moment later if it is held: ``lowdim runs`` may be asking for it."""
    assert fcntl is not None
    for pause_s in (0.05, 0.2):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause_s)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class MetricsLog:
    """Appends rows to ``metrics.jsonl``; a context manager that flushes at the end.

    Rows are buffered for about a second. A file that cannot be written costs one warning, not the
    run: rows are kept in memory and tried again at every flush.

    Args:
        path: the file.
        after_step: rows with a larger ``step`` and lines that are not JSON objects are dropped.
        writer: False: do nothing.
        interval_s: longest time that a row stays in the buffer while rows keep coming.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        after_step: int,
        writer: bool = True,
        interval_s: float = 1.0,
    ):
        self._path = pathlib.Path(path)
        self._writer = writer
        self._interval_s = interval_s
        self._rows: list[str] = []
        self._last_flush = time.monotonic()
        self._size: int | None = None
        self._durable = True
        self._warned = False
        if writer:
            try:
                _repair(self._path, after_step)
            except OSError as error:
                self._warn(error)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; NumPy and jax numbers are welcome, NaN and infinities become null."""
        if not self._writer:
            return
        self._rows.append(json.dumps({name: _number(value) for name, value in row.items()}))
        if time.monotonic() - self._last_flush > self._interval_s:
            self.flush(durable=False)

    def flush(self, *, durable: bool = True) -> None:
        """Hand all rows to the operating system, and with ``durable`` to the disk."""
        if not self._writer or not (self._rows or (durable and not self._durable)):
            return
        self._last_flush = time.monotonic()
        data = "".join(row + "\n" for row in self._rows).encode()
        try:
            with open(self._path, "ab") as file:
                if self._size is not None:
                    # The last attempt failed: take back what it may have left.
                    file.truncate(self._size)
                self._size = file.seek(0, os.SEEK_END)
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            self._warn(error)
            return
        self._durable = durable
        self._size = None
        self._rows.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"metrics cannot be written to {self._path}: {error.strerror or error}; training "
                "goes on.",
                stacklevel=3,
            )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, without lines that are torn; empty if there is no file."""
    path = pathlib.Path(path)
    return [row for _, row in _files.json_lines(path.read_bytes())] if path.exists() else []


def current_versions() -> dict[str, Any]:
    """Return versions of Python and packages, XLA flags and devices: what decides the bits."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions | {
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``name: old -> new`` for each entry of nested mappings that differs.

    Examples:
        >>> differences({"optim": {"lr": 0.1}, "seed": 0}, {"optim": {"lr": 0.2}, "seed": 0})
        ['optim.lr: 0.1 -> 0.2']
    """
    before, after = dict(dotted(old)), dict(dotted(new))
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]


def filled(old: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings ``old`` with the entries that only ``defaults`` has.

    Examples:
        >>> filled({"optim": {"lr": 0.1}}, {"optim": {"lr": 0.2, "clip": 1.0}, "seed": 0})
        {'optim': {'lr': 0.1, 'clip': 1.0}, 'seed': 0}
    """
    new = dict(old)
    for name, value in defaults.items():
        if name not in new:
            new[name] = value
        elif isinstance(value, Mapping) and isinstance(new[name], Mapping):
            new[name] = filled(new[name], value)
    return new


def _repair(path: pathlib.Path, after_step: int) -> None:
    """Drop torn lines and rows beyond a step; the file is replaced only if that changes it."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept = [line + b"\n" for line, row in _files.json_lines(data) if not _step(row) > after_step]
    if b"".join(kept) != data:
        _files.write_atomic(path, b"".join(kept).decode())


def _step(row: Mapping[str, Any]) -> float:
    step = row.get("step")
    return step if isinstance(step, int | float) else -math.inf


def _number(value: Any) -> Any:
    """JSON's idea of a number: no NumPy types, no NaN."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _number(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
