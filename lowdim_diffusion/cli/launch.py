"""``lowdim launch``: several processes of one training on this machine, and an eye on them all.

The runtime ends the survivors of a dead process by an abort with a stack trace, up to a heartbeat
later. Here the death is seen at once, said in one line, and the others are ended.
"""

import contextlib
import ctypes
import functools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowdim_diffusion.cli.config import option
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.executors import visible_gpus
from lowdim_diffusion.cli.parse import check_options, parse, parse_run, show_help, wants_help

__all__ = ["LaunchArguments", "environments", "main"]

GRACE_S = 5
"""How long the others may take to end by themselves, a save in flight included."""

_COUNT = "--xla_force_host_platform_device_count"
_USAGE = "lowdim launch [--OPTION VALUE ...] -- train [--OPTION VALUE ...]"
_DESCRIPTION = """\
Train one run by several processes on this machine. What process 0 prints is
shown; a signal goes to all, which save and stop together (exit code 75). When
one dies the others are ended, and the exit code is that of the error (76 if it
was killed)."""
_EXAMPLES = """\
lowdim launch --processes 2 -- train --preset mnist --data.path ~/mnist
lowdim launch --processes 2 --devices-per-process 4 -- train --preset digits"""
# The runtime's last words, a stack trace of C++; what happened is said by us.
_ABORT = re.compile(r"[EF]\d{4} [\d:.]+ +\d+ (coordination_service|client)")
_REPEATED = re.compile(r"lowdim train: error: process \d+: ")


@dataclass(frozen=True)
class LaunchArguments:
    """What ``lowdim launch`` is given."""

    processes: int = option(2, ge=1)
    """How many processes."""
    devices_per_process: int | None = option(ge=1)
    """Devices of each; emulated on CPU. Unset takes one, of GPUs an equal part of all."""


def main(argv: Sequence[str]) -> int:
    """Start the processes and wait for them; return the exit code."""
    prog = "lowdim launch"
    own, command = _divide(argv)
    if wants_help(own):
        show_help(_USAGE, _DESCRIPTION, [], LaunchArguments(), "", _EXAMPLES)
    given = parse(LaunchArguments, own, default=LaunchArguments(), prog=prog)
    check_options(given)
    if not command or command[0] != "train":
        got = repr(command[0]) if command else "nothing"
        raise CommandError(f"expected the command 'train' after the options, got {got}: {_USAGE}")
    plain = [word for word in command[1:] if word != "--debug"]
    parsed = parse_run(plain, prog="lowdim train", description="", examples="")
    if parsed.distributed:
        raise CommandError("--distributed options are set by lowdim launch itself; leave them out")
    environment = environments(os.environ, given.processes, given.devices_per_process)
    with _reserved_port() as port:
        return _run(command, environment, port, debug="--debug" in command)


def _divide(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the launcher's own options and the command, with or without ``--`` between them."""
    words = list(argv)
    for mark in ("--", "train"):
        if mark in words:
            at = words.index(mark)
            return words[:at], words[at + (mark == "--") :]
    return words, []


def environments(
    base: Mapping[str, str], processes: int, devices_per_process: int | None
) -> list[dict[str, str]]:
    """Return the environment of each process: which GPUs it sees, or how many CPU devices.

    Raises:
        CommandError: if there are fewer GPUs than asked for.
    """
    gpus = [] if base.get("JAX_PLATFORMS") == "cpu" else visible_gpus(base)
    found = [dict(base) for _ in range(processes)]
    if gpus:
        each = devices_per_process or len(gpus) // processes
        if not each or each * processes > len(gpus):
            raise CommandError(
                f"{processes} processes with {each or 1} GPUs each need {processes * (each or 1)}, "
                f"there are {len(gpus)}; JAX_PLATFORMS=cpu emulates devices"
            )
        for i, environment in enumerate(found):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * each : (i + 1) * each])
    else:
        kept = [flag for flag in base.get("XLA_FLAGS", "").split() if not flag.startswith(_COUNT)]
        flags = " ".join([*kept, f"{_COUNT}={devices_per_process or 1}"])
        for environment in found:
            environment.pop("JAX_NUM_CPU_DEVICES", None)
            environment["XLA_FLAGS"] = flags
    return found


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Hold a free port that only a process of ours can listen on: nobody takes it in between."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class _End(NamedTuple):
    process: int
    code: int


def _run(
    command: Sequence[str], environment: Sequence[Mapping[str, str]], port: int, *, debug: bool
) -> int:
    ends: queue.SimpleQueue[_End] = queue.SimpleQueue()
    started: list[subprocess.Popen] = []
    watchers: list[threading.Thread] = []
    sent: list[int] = []
    errors = _Errors()

    def forward(number: int, frame: Any) -> None:
        sent.append(number)
        for process in started:
            process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i, env in enumerate(environment):
            place = {"coordinator": f"127.0.0.1:{port}", "num-processes": len(environment)}
            options = {**place, "process-id": i}
            words = [f"--distributed.{name}={value}" for name, value in options.items()]
            process = subprocess.Popen(
                [sys.executable, "-m", "lowdim_diffusion", *command, *words],
                env={**env, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"},
                stdin=subprocess.DEVNULL,
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # ctrl-C reaches them through us, once.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
            started.append(process)
            about = (i, process, ends, debug, errors)
            watchers.append(threading.Thread(target=_watch, args=about, daemon=True))
            watchers[-1].start()
        return _wait(started, ends, sent)
    finally:
        for process in started:
            process.kill()  # nothing happens to one that has ended
            process.wait()
        for watcher in watchers:
            watcher.join(1)
        errors.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    started: Sequence[subprocess.Popen], ends: "queue.SimpleQueue[_End]", sent: Sequence[int]
) -> int:
    """Return the exit code for all: that of the first process that did not end well."""
    first, deadline = None, None
    for _ in started:
        try:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            end = ends.get(timeout=left)
        except queue.Empty:
            break
        if end.code and first is None:
            first, deadline = end, time.monotonic() + GRACE_S
    if first is None:
        return ExitCode.DONE
    if first.code > 0:
        return first.code
    number = -first.code
    if number in sent:
        return 128 + number
    hint = {
        signal.SIGKILL: "kill -9, or the system was out of memory",
        signal.SIGABRT: "the runtime lost the other processes, or failed",
    }.get(signal.Signals(number), "see what it said")
    print(
        f"lowdim launch: error: process {first.process} died by {signal.Signals(number).name} "
        f"({hint}); the others were ended. The same command continues from the newest checkpoint",
        file=sys.stderr,
    )
    return ExitCode.PEER_LOST


class _Errors:
    """Which error lines were shown: one that all repeat is, by the one whose error it is."""

    def __init__(self) -> None:
        self._shown = False
        self._repeated = ""

    def is_news(self, line: str) -> bool:
        """Whether to show a line now; a repetition is kept."""
        if _REPEATED.match(line):
            self._repeated = self._repeated or line
            return False
        self._shown = self._shown or ": error: " in line
        return True

    def end(self) -> None:
        """Show the repetition if the process itself was ended before it could say it."""
        if self._repeated and not self._shown:
            _write(self._repeated)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _watch(
    index: int,
    process: subprocess.Popen,
    ends: "queue.SimpleQueue[_End]",
    debug: bool,
    errors: _Errors,
) -> None:
    """Pass on what a process says on stderr, then say how it ended."""
    assert process.stderr is not None
    _pass_on(process.stderr, f"[{index}] " if index else "", debug, errors)
    ends.put(_End(index, process.wait()))


def _pass_on(lines: Iterable[str], prefix: str, debug: bool, errors: _Errors) -> None:
    hidden = False
    for line in lines:
        hidden = hidden or (not debug and bool(_ABORT.match(line)))
        if not hidden and errors.is_news(line):
            _write(prefix + line)


@functools.cache
def _die_with_parent() -> Any:
    """Return what a child calls first: SIGTERM to it when this process is gone, however."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return functools.partial(prctl, 1, signal.SIGTERM)  # PR_SET_PDEATHSIG
