"""Exit codes, and the one line that an exception becomes."""

import enum
import pathlib
import traceback

__all__ = ["CommandError", "ExitCode", "explain", "is_out_of_memory"]


class ExitCode(enum.IntEnum):
    """What the process returns. 130 and 141 are the shell's codes for ctrl-C and a closed pipe."""

    DONE = 0
    """Done, and everything written is durable."""
    INTERNAL = 1
    """An unexpected error: a bug, or a machine out of memory."""
    USAGE = 2
    """Bad usage or bad input."""
    NO_CHECKPOINT = 3
    """Checkpoints are missing, or none is usable."""
    NOT_FINITE = 4
    """The loss became infinite or NaN, or leapt."""
    LOCKED = 5
    """Another process writes to the run directory."""
    IO = 74
    """Reading or writing failed."""
    PREEMPTED = 75
    """Interrupted after saving: the same command continues."""
    PEER_LOST = 76
    """Another process of the run died or never came; the same command continues."""
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class CommandError(Exception):
    """An error of the user's or of the surroundings, complete in one line."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE):
        super().__init__(message)
        self.code = code


# The package's own errors that have a code of their own, by name: nothing is imported to compare.
_CODES = {
    "NoUsableCheckpointError": ExitCode.NO_CHECKPOINT,
    "NonFiniteError": ExitCode.NOT_FINITE,
    "NonFiniteLossError": ExitCode.NOT_FINITE,
    "LossSpikeError": ExitCode.NOT_FINITE,
    "RunLockedError": ExitCode.LOCKED,
    "CheckpointError": ExitCode.IO,
}
_PACKAGE = str(pathlib.Path(__file__).resolve().parents[1])


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("lowdim_diffusion.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    return isinstance(error, MemoryError) or (
        "RESOURCE_EXHAUSTED" in str(error) and not isinstance(error, OSError)
    )


def explain(error: BaseException) -> tuple[ExitCode, str]:
    """Return the exit code and the line for an exception.

    A ``ValueError`` or ``TypeError`` raised by this package's own code is about the input and
    speaks for itself; one from anywhere deeper is unexpected, and is shown with its type and
    place.
    """
    message = " ".join(str(error).split())
    if isinstance(error, CommandError):
        return error.code, message
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "interrupted"
    kind = type(error)
    if kind.__name__ in _CODES and _is_ours(kind):
        return _CODES[kind.__name__], message
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        if error.strerror and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        return (ExitCode.USAGE if missing else ExitCode.IO), message
    if is_out_of_memory(error):
        return ExitCode.INTERNAL, (
            "out of memory; a smaller --train.batch-size or --sample.batch-size, or a larger "
            f"--optim.accumulate, needs less ({message[:200] or type(error).__name__})"
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = frames[-1] if frames else None
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return ExitCode.USAGE, f"{message}; 'lowdim doctor' says how to install what is missing"
    own = place is not None and place.filename.startswith(_PACKAGE)
    if (kind in (ValueError, TypeError) or _is_ours(kind)) and own and message:
        return ExitCode.USAGE, message
    where = f" ({pathlib.Path(place.filename).name}:{place.lineno})" if place else ""
    return ExitCode.INTERNAL, (
        f"unexpected {type(error).__name__}: {message or 'no message'}{where}; "
        "--debug shows the traceback"
    )
