"""What a person sees while training runs: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from typing import NamedTuple, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["ConsoleMonitor", "CountBar", "Monitor", "Report"]


class Report(NamedTuple):
    """Where training stands."""

    step: int
    num_steps: int
    loss: float
    """Mean over the last stretch."""
    images_per_s: float
    eta_s: float
    mfu: float | None = None
    """Model-FLOPs utilisation in [0, 1]; None if unknown."""
    memory: int | None = None
    """Peak bytes in use on a device; None if unknown."""


@runtime_checkable
class Monitor(Protocol):
    """Anything that wants to be told; every call comes from the host, between stretches."""

    def start(self, step: int, num_steps: int) -> None:
        """Training is compiled and begins after ``step``."""

    def update(self, report: Report) -> None:
        """A stretch is done."""

    def note(self, text: str) -> None:
        """Say something in passing: a checkpoint, a warning."""

    def close(self) -> None:
        """Training has ended, well or not."""


def duration(seconds: float) -> str:
    """Return ``1:02:03`` or ``2:03``.

    Examples:
        >>> duration(123.4), duration(3723)
        ('2:03', '1:02:03')
    """
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def usage(mfu: float | None, memory: int | None) -> list[str]:
    """Return in words what is known of utilisation and memory.

    Examples:
        >>> usage(0.417, 3_200_000_000), usage(None, None)
        (['42 % MFU', '3.2 GB'], [])
    """
    words = [] if mfu is None else [f"{100 * mfu:.0f} % MFU"]
    return words if memory is None else [*words, f"{memory / 1e9:.1f} GB"]


class ConsoleMonitor:
    """Shows loss, images per second and time left on a terminal; plain lines in a log file.

    Args:
        stream: where to write; standard output by default.
        interval_s: pause between plain lines where there is no terminal.
        unit: what is counted per second.
    """

    def __init__(
        self, stream: TextIO | None = None, *, interval_s: float = 10.0, unit: str = "images"
    ):
        self._stream = sys.stdout if stream is None else stream
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._interval_s = interval_s
        self._unit = unit
        self._bar: Progress | None = None
        self._task = None
        self._last = 0.0

    def start(self, step: int, num_steps: int) -> None:
        """Print the START line and open the bar."""
        self.note(f"START at step {step} of {num_steps}")
        self._last = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("train", total=num_steps, completed=step, text="")
            self._bar.start()

    def update(self, report: Report) -> None:
        """Move the bar, or print a line if the last one is old enough."""
        parts = [f"loss {report.loss:.4g}", f"{report.images_per_s:,.0f} {self._unit}/s"]
        parts += usage(report.mfu, report.memory)
        text = "  ".join([*parts, f"{duration(report.eta_s)} left"])
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=report.step, text=text)
        elif now - self._last >= self._interval_s or report.step == report.num_steps:
            self._last = now
            self.note(f"step {report.step}/{report.num_steps}  {text}")

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        self._console.print(text, markup=False)
        self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class CountBar:
    """How many of so many are done, and the time left: a bar on a terminal, lines elsewhere.

    Args:
        what: shown in front; None shows nothing at all.
        total: how many there are.
        stream: where to write; standard error by default, so that results can be piped.
        done: how many were done before; the time left is that of the others.
        interval_s: pause between lines where there is no terminal.
    """

    def __init__(
        self,
        what: str | None,
        total: int,
        stream: TextIO | None = None,
        *,
        done: int = 0,
        interval_s: float = 10.0,
    ):
        self._what, self._total, self._interval_s = what, total, interval_s
        self._before = done
        stream = sys.stderr if stream is None else stream
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "CountBar":
        """Open the bar."""
        self._start = self._last = time.monotonic()
        if self._what is not None and self._console.is_terminal:
            columns = (
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(
                self._what, total=self._total, completed=self._before, text=""
            )
            self._bar.start()
        return self

    def update(self, done: int) -> None:
        """Say that so many are done."""
        now = time.monotonic()
        each = (now - self._start) / max(done - self._before, 1)
        text = f"{duration(each * (self._total - done))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif self._what is not None and (
            now - self._last >= self._interval_s or done == self._total
        ):
            self._last = now
            spent = duration(now - self._start)
            text = f"in {spent}" if done == self._total else text
            self._console.print(f"{self._what} {done}/{self._total}  {text}", markup=False)

    def __exit__(self, *error: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
