"""Starting the cells of a sweep: processes of this machine, or jobs of a SLURM cluster.

A cell is a command line, never a shell's: nothing in it is interpreted. Both launchers give back
each cell with its exit code as it ends; once a stop is requested they start no more, let those that
run save and end, and are done.
"""

import collections
import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lowdim_diffusion.cli.errors import CommandError, ExitCode

__all__ = ["Job", "gpu_share", "local", "slurm", "slurm_options", "visible_gpus"]


class Job(NamedTuple):
    """One command to run."""

    name: str
    command: tuple[str, ...]
    log: pathlib.Path
    """Gets what it prints, after what is there."""


def local(
    jobs: Sequence[Job], *, at_once: int, stop: Callable[[], bool]
) -> Iterator[tuple[Job, int]]:
    """Run jobs as processes here, so many at a time; give each with its exit code as it ends.

    Once ``stop()`` says so, those that run get SIGTERM. They are in sessions of their own, so that
    a ctrl-C reaches them through here, once, and not beside; leaving the loop early kills them.
    """
    waiting, running, told = collections.deque(jobs), {}, False
    try:
        while running or (waiting and not stop()):
            for slot in range(at_once):
                if slot not in running and waiting and not stop():
                    job = waiting.popleft()
                    running[slot] = job, _start(job, gpu_share(slot, at_once))
            if stop() and not told:
                told = True
                for _, process in running.values():
                    process.terminate()
            ended = [slot for slot, (_, p) in running.items() if p.poll() is not None]
            for slot in ended:
                job, process = running.pop(slot)
                yield job, _exit_code(process.returncode)
            if not ended:
                time.sleep(0.1)
    finally:
        for _, process in running.values():
            process.kill()


def _start(job: Job, environment: Mapping[str, str], **options: Any) -> subprocess.Popen:
    with open(job.log, "ab") as log:
        log.write(f"$ {shlex.join(job.command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
            **options,
        )


def _exit_code(returned: int) -> int:
    """As a shell has it: 128 + the signal that ended the process."""
    return returned if returned >= 0 else 128 - returned


def gpu_share(slot: int, slots: int) -> dict[str, str]:
    """Return the environment that gives one of so many processes its share of the NVIDIA GPUs.

    Each process gets as many whole GPUs as there are for it; with more processes than GPUs, some
    share one, and its memory.
    """
    gpus = visible_gpus(os.environ)
    if slots == 1 or not gpus:
        return {}
    each = len(gpus) // slots
    if each:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * each : (slot + 1) * each])}
    sharing = -(-slots // len(gpus))
    environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if not any(name.startswith("XLA_PYTHON_CLIENT_") for name in os.environ):
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
    return environment


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the NVIDIA GPUs that a process with this environment sees, by name."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    names = (path.name.removeprefix("nvidia") for path in pathlib.Path("/dev").glob("nvidia*"))
    return sorted((name for name in names if name.isdecimal()), key=int)


# ---- SLURM --------------------------------------------------------------------------------------

_LOOK_S = 15.0


class Task:
    """What a SLURM job runs: the command, asked to save before the job's time is up.

    submitit calls ``checkpoint`` on the signal that SLURM sends ahead of the limit, and puts the
    job back into the queue.
    """

    def __init__(self, job: Job):
        self._job = job
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run it and return its exit code."""
        # That signal goes to every process of the job, and would end the training unsaved.
        ignore = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._process = _start(self._job, {}, preexec_fn=ignore)
        return _exit_code(self._process.wait())

    def checkpoint(self) -> Any:
        """Let it save; return what is to be run later."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            pid = self._process.pid
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(pid, signal.SIGTERM)
                # Not its wait(): this runs in a signal handler, in the middle of that very call.
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Task(self._job))


def slurm_options(given: Sequence[str]) -> dict[str, str]:
    """Return ``NAME=VALUE`` texts as options of ``sbatch``.

    Raises:
        CommandError: for what is no such option; nothing of it reaches a shell.

    Examples:
        >>> slurm_options(["partition=gpu", "cpus-per-task=8"])
        {'partition': 'gpu', 'cpus-per-task': '8'}
    """
    options = {}
    for text in given:
        name, _, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not value or not value.isprintable():
            raise CommandError(f"--slurm: expected NAME=VALUE such as partition=gpu, got {text!r}")
        if name == "time" and not value.isdecimal():
            raise CommandError(f"--slurm: time is in minutes, such as time=240, got {value!r}")
        options[name] = value
    return options


def slurm(
    jobs: Sequence[Job],
    *,
    at_once: int,
    stop: Callable[[], bool],
    options: Mapping[str, str],
    folder: pathlib.Path,
    cluster: str = "slurm",
) -> Iterator[tuple[Job, int]]:
    """Run jobs as one array of SLURM, so many at a time; give each with its exit code as it ends.

    Jobs that are out of time save and are queued again, by submitit.

    Args:
        jobs: what to run.
        at_once: largest number that runs at the same time.
        stop: says when to cancel all; SLURM sends SIGTERM and waits, so that they save.
        options: of sbatch, see :func:`slurm_options`.
        folder: for submitit's files.
        cluster: ``"local"`` runs them here, to try it.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise CommandError(
            '--executor slurm needs submitit: pip install "lowdim-diffusion[slurm]"'
        ) from None
    options = dict(options)
    minutes = int(options.pop("time", 60))
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=1000)
    except RuntimeError:
        raise CommandError("--executor slurm: no SLURM here (no srun on the path)") from None
    executor.update_parameters(
        name="lowdim",
        timeout_min=minutes,
        slurm_array_parallelism=at_once,
        slurm_additional_parameters=options,
    )
    try:
        with executor.batch():
            submitted = [executor.submit(Task(job)) for job in jobs]
    except FailedJobError as error:
        raise CommandError(f"sbatch: {' '.join(str(error).split())}", ExitCode.IO) from None
    left = dict(zip(jobs, submitted, strict=True))
    missing: set[Job] = set()
    deadline, look = None, time.monotonic()
    while left and not (deadline and time.monotonic() > deadline):
        if stop() and deadline is None:
            deadline = time.monotonic() + 60  # SLURM kills 30 s after it has asked
            for handle in left.values():
                handle.cancel(check=False)
        ended = {job: True for job, handle in left.items() if handle.paths.result_pickle.exists()}
        if cluster == "slurm" and not ended and time.monotonic() >= look:
            look = time.monotonic() + _LOOK_S
            queued = _queued([handle.job_id for handle in left.values()])
            gone = {job for job, handle in left.items() if handle.job_id not in queued}
            ended = dict.fromkeys(gone & missing, False)  # twice: files may be late
            missing = gone
        for job, has_result in ended.items():
            handle = left.pop(job)
            if has_result or job.log.exists():  # else it was cancelled before it started
                yield job, _result(handle) if has_result else ExitCode.INTERNAL
        if not ended:
            time.sleep(1.0)


def _queued(ids: Sequence[str]) -> set[str]:
    """Which jobs SLURM still knows; ``sacct``, which submitit asks, needs accounting."""
    whole = ",".join(sorted({i.split("_")[0] for i in ids}))
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={whole}"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return set(ids)  # the controller does not answer: that says nothing of the jobs
    return set(asked.stdout.split())


def _result(handle: Any) -> int:
    try:
        return handle.result()
    except Exception:  # its environment there is broken
        return ExitCode.INTERNAL
