"""What goes wrong inside a command; each act is done in its process before it starts."""

import functools
import os
import pathlib
import signal
import time

# What a process does to the names on a disk, and when it insists on them.
FILE_OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "scandir")


def slow_steps(seconds: float) -> None:
    """Sleep after every stretch of steps, so that signals come in the middle of training."""
    from lowdim_diffusion.training import trainer

    compile_loop = trainer.compile_loop

    class Slow:
        def __init__(self, *args, **options):
            self.loop = compile_loop(*args, **options)

        def __call__(self, *args):
            out = self.loop(*args)
            time.sleep(seconds)
            return out

        def __getattr__(self, name):
            return getattr(self.loop, name)

    trainer.compile_loop = Slow


def _at_every_file_operation(act, during: str) -> None:
    """Call ``act(name, path)`` before each, during ``"steps"`` or from the ``"setup"`` on."""
    from lowdim_diffusion.training.progress import ConsoleMonitor
    from lowdim_diffusion.training.rundir import RunDirectory

    kind, name = {"setup": (RunDirectory, "__enter__"), "steps": (ConsoleMonitor, "start")}[during]
    start = getattr(kind, name)

    def started(self, *args):
        for operation in FILE_OPERATIONS:
            wrapped = _before(getattr(os, operation), functools.partial(act, operation))
            setattr(os, operation, wrapped)
        return start(self, *args)

    setattr(kind, name, started)


def _before(function, act):
    @functools.wraps(function)
    def wrapped(*args, **options):
        act(args[0] if args else None)
        return function(*args, **options)

    return wrapped


def list_file_operations(path: pathlib.Path, during: str = "steps") -> None:
    """Write a line for every file operation."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = lambda name, where: os.write(handle, f"{name} {where}\n".encode())
    _at_every_file_operation(write, during)


def kill_at_file_operation(number: int, during: str = "steps") -> None:
    """``kill -9`` before file operation ``number``, counted from 0."""
    left = [number]

    def act(name, where):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    _at_every_file_operation(act, during)


def signal_before_the_first_step(number: int) -> None:
    """A signal comes while the program is compiled."""
    from lowdim_diffusion.training import trainer

    compile_loop = trainer.compile_loop

    def compiled(*args, **options):
        os.kill(os.getpid(), number)
        return compile_loop(*args, **options)

    trainer.compile_loop = compiled


def fail_saves(first: int) -> None:
    """The file system fails in the middle of every save from step ``first`` on."""
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def fails(self, step, **options):
        if step >= first:
            raise OSError(5, "Input/output error")
        return save(self, step, **options)

    ocp.CheckpointManager.save = fails


def nan_batch(step: int) -> None:
    """Batch number ``step``, counted from 0, is not a number."""
    import jax.numpy as jnp

    from lowdim_diffusion import data

    examples = data.Batcher.examples

    def poisoned(self, arrays, key, now, index):
        batch = examples(self, arrays, key, now, index)
        return batch | {"x": jnp.where(now == step, jnp.nan, batch["x"])}

    data.Batcher.examples = poisoned


def clock_set_back(seconds: float) -> None:
    """The wall clock is behind from the start, and jumps further back at every look at it."""
    now, now_ns, looks = time.time, time.time_ns, [0.0]

    def back():
        looks[0] += 60.0
        return seconds + looks[0]

    time.time = lambda: now() - back()
    time.time_ns = lambda: now_ns() - int(1e9 * back())


def float64() -> None:
    """As with ``JAX_ENABLE_X64=1``."""
    import jax

    jax.config.update("jax_enable_x64", True)


def bounded_memory(num_bytes: int) -> None:
    """The system refuses more memory than that."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def flip(path: pathlib.Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def halve(path: pathlib.Path) -> None:
    """Cut a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest_file(path: pathlib.Path) -> pathlib.Path:
    """The largest file below a directory."""
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def audit(path: pathlib.Path) -> None:
    """Write a line for everything that runs a program or code, and every file opened to write."""
    import sys

    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    programs = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
    busy = []

    def hook(event, arguments):
        if busy:
            return
        busy.append(event)
        try:
            if event in programs:
                os.write(handle, f"{event} {arguments!r}\n".encode())
            elif event == "open" and isinstance(arguments[0], str | bytes):
                if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    os.write(
                        handle, f"write {os.path.abspath(os.fsdecode(arguments[0]))}\n".encode()
                    )
        finally:
            busy.clear()

    sys.addaudithook(hook)
