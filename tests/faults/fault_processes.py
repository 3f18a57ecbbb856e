"""``lowdim`` commands in processes of their own: quick to start, easy to kill and to sabotage.

:func:`command` starts a whole new interpreter, as a user does (2 to 3 s). :func:`forked` starts the
same ``main`` in a fork of a server that has imported everything but not touched a device (about
half of that); acts of :mod:`sabotage` may come before. Such a process leaves by ``os._exit``, so
what happens at the end of an interpreter needs :func:`command`.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np

from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = (
    "--model.name linear --data.num-examples 64 --train.batch-size 16 --checkpoint.every 5 "
    "--devices 1"
).split()
PATIENCE_S = 120
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["forked_imports"])
_outputs = tempfile.TemporaryDirectory(prefix="lowdim-faults-", ignore_cleanup_errors=True)


class Done(NamedTuple):
    """What a finished command left."""

    code: int
    out: str
    err: str


class Process:
    """A running command whose output goes to files, so it never waits for a reader."""

    def __init__(self, start: Callable[[pathlib.Path, pathlib.Path], object]):
        folder = pathlib.Path(tempfile.mkdtemp(dir=_outputs.name))
        self._out, self._err = folder / "out", folder / "err"
        self._process = start(self._out, self._err)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._code() is None

    def wait_for(self, text: str) -> None:
        """Return once the command has printed ``text``."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._read(self._out):
            assert self._code() is None and time.monotonic() < deadline, (
                f"{text!r} was never printed: {self._read(self._out)}{self._read(self._err)}"
            )
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def finish(self) -> Done:
        """Wait for the end."""
        deadline = time.monotonic() + PATIENCE_S
        while self._code() is None:
            if time.monotonic() > deadline:
                self._process.kill()
                raise AssertionError(f"the command hangs: {self._read(self._err)}")
            time.sleep(0.005)
        return Done(self._code(), self._read(self._out), self._read(self._err))

    def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.finish()

    def _code(self) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    @staticmethod
    def _read(path: pathlib.Path) -> str:
        return path.read_text(errors="replace") if path.exists() else ""


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a command: that of the tests, with so many emulated devices."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)} | CACHE_ALL | more


def command(*argv: str, env: dict[str, str] | None = None, cwd: object = None) -> Process:
    """Start ``python -m lowdim_diffusion`` in a new interpreter."""

    def start(out: pathlib.Path, err: pathlib.Path) -> object:
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "lowdim_diffusion", *argv],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment() if env is None else env,
                cwd=cwd,
            )

    return Process(start)


def forked(
    *argv: str, sabotage: Sequence[Callable[[], None]] = (), devices: int = 1, cwd: object = None
) -> Process:
    """Start ``main`` in a fork of the prepared server, after the acts of sabotage."""

    def start(out: pathlib.Path, err: pathlib.Path) -> object:
        given = (argv, environment(devices), os.fspath(cwd or os.getcwd()), out, err, sabotage)
        process = _context.Process(target=_child, args=given)
        here = f"{ROOT}{os.pathsep}{pathlib.Path(__file__).parent}"
        with mock.patch.dict(os.environ, CACHE_ALL, PYTHONPATH=here):  # of the server, at its start
            process.start()
        return process

    return Process(start)


def _child(argv, env, cwd, out, err, sabotage) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    handles = [os.open(os.devnull, os.O_RDONLY)]
    handles += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (out, err)]
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    for act in sabotage:
        act()
    from lowdim_diffusion.cli import main

    sys.exit(main(list(argv)))


def train(out: object, *argv: str, steps: int = 20, start: Callable = forked, **how) -> Done:
    """Run a tiny training to its end."""
    return begin(out, *argv, steps=steps, start=start, **how).finish()


def begin(out: object, *argv: str, steps: int = 20, start: Callable = forked, **how) -> Process:
    """Start a tiny training."""
    return start("train", *TINY, "--train.steps", str(steps), "--out", str(out), *argv, **how)


def fails_clearly(done: Done, code: int, *words: str, warnings: int = 0) -> None:
    """The exit code, and one line for the user that has the words in it; no traceback."""
    assert done.code == code, done
    lines = done.err.splitlines()
    told = [line for line in lines if ": warning: " in line]
    errors = [line for line in lines if line not in told]
    assert len(errors) == 1 and errors[0].startswith("lowdim"), done.err
    assert ": error: " in errors[0] and len(told) == warnings, done.err
    for word in words:
        assert word in errors[0], (word, errors[0])
    assert "Traceback" not in done.out + done.err


def succeeds(done: Done, warnings: Sequence[str] = ()) -> None:
    """Exit 0 with exactly these warnings, one line each."""
    assert done.code == 0, done
    lines = done.err.splitlines()
    assert len(lines) == len(warnings), done.err
    for line, words in zip(lines, warnings, strict=True):
        assert line.startswith("lowdim train: warning: ") and words in line, line


def steps_of(run: pathlib.Path) -> list[int]:
    """The steps on disk; each must verify."""
    reports = checkpoint.verify(run / "checkpoints")
    assert all(report.ok for report in reports), reports
    return [report.step for report in reports]


def same_run(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Bit for bit the state of the uninterrupted run, and one metrics row per step, the same."""
    found, expected = (checkpoint.digest(path / "checkpoints") for path in (run, whole))
    assert found == expected
    steps_of(run)
    leftovers = [p for p in (run / "checkpoints").iterdir() if "tmp" in p.name]
    leftovers += list((run / "checkpoints" / "trash").glob("*"))
    assert not leftovers
    rows, rows_of_whole = (read_metrics(path / "metrics.jsonl") for path in (run, whole))
    assert [row["step"] for row in rows] == list(range(1, expected["step"] + 1))
    assert rows == rows_of_whole


def close_run(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Equal to 1e-5 to a run on other devices, with one metrics row per step."""
    found, expected = (
        checkpoint._leaves.flatten(checkpoint.load(path / "checkpoints").state)
        for path in (run, whole)
    )
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        if "key" not in path:
            scale = np.abs(expected[path]).max()
            np.testing.assert_allclose(leaf, expected[path], 1e-5, 1e-5 * scale, err_msg=path)
    rows = read_metrics(run / "metrics.jsonl")
    assert rows and [row["step"] for row in rows] == list(range(1, int(expected["step"]) + 1))


def children(process: Process) -> list[int]:
    """The processes that a command has started."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def words_of(pid: int) -> bytes:
    """The command line of a process."""
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


def snapshot(path: pathlib.Path) -> dict[str, bytes]:
    """Every file below a directory, to show that nothing was changed; the lock has a pid in it."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }
