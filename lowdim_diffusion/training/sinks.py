"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, anything with `write`.

``metrics.jsonl`` is the source of truth and has every step. Sinks are for looking at: of a long
stretch they get some rows only, and one that fails costs a warning, not the run.
"""

import os
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lowdim_diffusion import _files

__all__ = ["Sink", "Sinks", "TensorBoard", "WandB"]


@runtime_checkable
class Sink(Protocol):
    """Anything that takes rows of metrics."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take a row; ``step`` is one of its entries, the others are numbers."""

    def close(self) -> None:
        """Training has ended; nothing comes any more."""


class Sinks:
    """Several sinks as one, which never raises: one that fails is dropped with a warning.

    Args:
        sinks: where rows go.
        most: rows of one :meth:`write` that are handed on, spread evenly, the last one included.
    """

    def __init__(self, sinks: Sequence[Sink], *, most: int = 100):
        self._sinks, self._most = list(sinks), most

    def write(self, rows: Sequence[Mapping[str, Any]], *, group: str = "") -> None:
        """Hand on rows; names are put into a group, ``group/name``, if there is one."""
        chosen = np.unique(np.linspace(len(rows) - 1, 0, min(len(rows), self._most)).round())
        named = [rows[int(i)] for i in chosen]
        if group:
            named = [{k if k == "step" else f"{group}/{k}": v for k, v in r.items()} for r in named]
        self._each(lambda sink: [sink.write(row) for row in named])

    def close(self) -> None:
        """Close all."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Any) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"{type(sink).__name__} cannot be written ({' '.join(str(error).split())}); "
                    "training goes on without it, metrics.jsonl has everything.",
                    stacklevel=2,
                )


class TensorBoard:
    """Event files for TensorBoard, opened at the first row; needs the extra ``tensorboard``.

    A run that continues takes back what it had written beyond the step that it continues from.

    Args:
        path: directory; several runs in directories side by side are compared by TensorBoard.
    """

    def __init__(self, path: str | os.PathLike):
        # Not SummaryWriter: its thread dies of a full disk, and then its queue blocks for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._path, self._open = pathlib.Path(path), EventsWriter
        self._proto, self._summary = event_pb2, summary_pb2.Summary  # pyright: ignore
        self._file: Any = None
        self._flushed = 0.0

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row as scalars of its step."""
        now = time.time()
        if self._file is None:
            self._path.mkdir(parents=True, exist_ok=True)
            # The name has whole seconds only, and would be that of a run before.
            self._file = self._open(str(self._path / "events"), f".{os.getpid()}")
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._file.write_event(
                self._proto.Event(wall_time=now, step=row["step"], session_log=start)
            )
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._file.write_event(
            self._proto.Event(wall_time=now, step=row["step"], summary=self._summary(value=values))
        )
        if now - self._flushed > 10:
            self._flushed = now
            self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()


class WandB:
    """A run of Weights & Biases, begun at the first row; needs the extra ``wandb``.

    It is configured by wandb's own variables: ``WANDB_MODE=offline`` needs no network and no login.
    A run that continues is the same one there.

    Args:
        path: run directory; wandb's files go into ``wandb/`` inside it.
        project: name of the project.
        config: shown beside the run.
    """

    def __init__(
        self, path: str | os.PathLike, project: str, config: Mapping[str, Any] | None = None
    ):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, self._path = wandb, pathlib.Path(path)
        self._project, self._config = project, dict(config or {})
        self._run: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row."""
        if self._run is None:
            self._run = self._wandb.init(
                project=self._project,
                name=self._path.name,
                id=self._identity(),
                resume="allow",
                dir=str(self._path),
                config=self._config,
            )
            # An axis of our own: wandb's only counts up, and a run may continue from before.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        self._run.log(dict(row))

    def close(self) -> None:
        """Say that the run has ended."""
        if self._run is not None:
            self._run.finish()

    def _identity(self) -> str:
        file = self._path / "wandb" / "id"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _files.write_atomic(file, os.urandom(6).hex())
        return file.read_text(encoding="utf-8")
