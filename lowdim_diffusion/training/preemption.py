"""Stopping politely: the first signal asks for a stop after this step, the second stops at once.

Clusters send SIGTERM before they take a machine away, people press ctrl-C. Either sets a flag that
the loop looks at between steps; it then saves and ends with exit code 75 (run again to continue).
"""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignal"]

_AT_ONCE = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class StopSignal:
    """A context manager that turns SIGTERM and SIGINT into a flag.

    After the first signal both get the system's behaviour back, so that the second one stops at
    once: ``KeyboardInterrupt`` for SIGINT, death for SIGTERM. Checkpoints survive either. Leaving
    the block restores the handlers that were there before.

    Python delivers signals to the main thread only: entered in another thread this installs nothing
    and ``requested`` stays False. A signal that the process inherited as ignored is handled too, so
    a training started in the background of a script can be stopped like any other.

    Examples:
        >>> with StopSignal() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested, stop.name
        (True, 'SIGTERM')
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """The signal that came, e.g. ``SIGTERM``; empty before."""
        return "" if self._signal is None else self._signal.name

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in _AT_ONCE:
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._before.items():
            # None: the handler was not installed from Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        for other, handler in _AT_ONCE.items():
            signal.signal(other, handler)
