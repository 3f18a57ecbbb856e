"""The ``lowdim`` command: find the command, run it, make one line and a code of an error."""

import functools
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from lowdim_diffusion import __version__

__all__ = ["main"]

COMMANDS = {
    "demo": "train on built-in digits, sample, measure: a report in minutes",
    "train": "train a model; the same command again continues it",
    "launch": "train by several processes on this machine",
    "sample": "draw samples from a run's newest good checkpoint",
    "analyze": "measure ranks, subspaces, nearest images; write the report",
    "sweep": "train a grid of options: processes here or SLURM jobs, one table",
    "runs": "compare runs: status, loss, speed, options that differ, curves",
    "edit": "edit a region of images along singular vectors of the Jacobian",
    "watermark": "hide a key in images, and tell by it which are marked",
    "export": "write weights, denoiser or sampler for use elsewhere",
    "checkpoint": "list or verify a run's checkpoints, print the digest of one",
    "doctor": "say what is installed, what is missing, which devices there are",
}

_HELP = """\
usage: lowdim COMMAND [OPTIONS]

Low-dimensional structure of diffusion models: train, sample, measure, explain.

commands
{commands}

options
  -h, --help     show this text; 'lowdim COMMAND --help' that of a command
  --version      show the version
  --debug        with any command: show the traceback of an error

examples
  lowdim demo
  lowdim train --preset mnist --data.path ~/mnist --out runs/mnist
  lowdim sample --run runs/mnist --num-samples 64 --out samples.npz
  lowdim analyze --run runs/mnist
  lowdim edit --run runs/mnist --images 3 7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: arguments after the program's name; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    name = "lowdim"
    as_before = warnings.formatwarning
    _prepare_streams()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            commands = "\n".join(f"  {k:<12} {v}" for k, v in COMMANDS.items())
            print(_HELP.format(commands=commands), end="")
            return _finish(0)
        if arguments[0] == "--version":
            print(f"lowdim {__version__}")
            return _finish(0)
        if odd := [a for a in arguments if _undecoded(a)]:
            return _finish(_not_text(odd[0]))
        command, *rest = arguments
        if command == "launch" and debug:  # for the processes that it starts
            rest.append("--debug")
        if command not in COMMANDS:
            return _finish(_unknown(command))
        name = f"lowdim {command}"
        warnings.formatwarning = functools.partial(_format_warning, name)
        module = importlib.import_module(f"lowdim_diffusion.cli.{command}")
        return _finish(module.main(rest))
    except SystemExit as stop:
        return _finish(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:
        from lowdim_diffusion.cli.errors import explain

        if debug:
            traceback.print_exc()
        code, message = explain(error)
        print(f"{name}: error: {message}", file=sys.stderr)
        return int(code)
    finally:
        warnings.formatwarning = as_before


def _prepare_streams() -> None:
    """Make printing safe where a stream is closed, or cannot show every letter.

    A closed descriptor below 3 would become that of the next file, a lock or a checkpoint, and what
    libraries print would end up in it.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _undecoded(text: str) -> bool:
    """Whether some of its bytes had no meaning in the encoding of the surroundings."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _not_text(argument: str) -> int:
    shown = argument.encode("ascii", "backslashreplace").decode()
    print(
        f"lowdim: error: '{shown}' is not text in this locale ({sys.getfilesystemencoding()}); "
        "set LC_ALL=C.UTF-8, or use plain names",
        file=sys.stderr,
    )
    return 2


def _format_warning(name: str, message: object, *where: object) -> str:
    """Return a warning as one line, without the place in the code that it came from."""
    del where
    return f"{name}: warning: {' '.join(str(message).split())}\n"


def _unknown(command: str) -> int:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    kind = "option" if command.startswith("-") else "command"
    hint = f"; did you mean {near[0]}?" if near else "; there are " + ", ".join(COMMANDS)
    print(f"lowdim: error: unknown {kind} {command!r}{hint}", file=sys.stderr)
    return 2


def _finish(code: int) -> int:
    """Return the code after what was printed has left, so that a closed pipe is noticed here."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    return int(code)


def _closed_pipe() -> int:
    """Return the shell's code for a reader that went away, quietly."""
    # The interpreter flushes stdout once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
