"""Small files that are old or new but never half written, and names that survive power loss."""

import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock
    fcntl = None


def sync_directory(path: pathlib.Path) -> None:
    """Make the names inside a directory durable, where the file system has that notion."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sync_tree(path: pathlib.Path) -> None:
    """Make every file and every directory name below ``path``, and ``path`` itself, durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(pathlib.Path(folder))


def write_atomic(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    """Replace a file by one rename: a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return path


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any]) -> pathlib.Path:
    """Replace a file by a compressed ``.npz`` of named arrays, as :func:`write_atomic` does."""
    import numpy as np

    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays)
    return write_atomic(path, stored.getvalue())


def json_lines(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines that are whole JSON objects, with what they say; torn ones are left out."""
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield line, row


def is_locked(path: pathlib.Path) -> bool:
    """Whether a process holds a lock on a file; False if it cannot be asked.

    To ask is to hold a shared lock for an instant: who takes one must try more than once.
    """
    if fcntl is None:  # pragma: no cover - Windows has no flock
        return False
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def remove(path: pathlib.Path) -> None:
    """Delete a file, a link (never what it points to) or a whole directory."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
