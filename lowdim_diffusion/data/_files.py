"""Folders, zip and tar archives as one thing: named members that are read, never extracted.

Files are hostile until shown otherwise. Sizes are checked before memory is taken, names that point
out of the archive are refused, links are not followed, and nothing is written to disk.
"""

import contextlib
import gzip
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lowdim_diffusion.data._dataset import data_error

FREE_BYTES = 512 * 2**20
"""Decoded size that no file has to justify."""

MAX_EXPANSION = 20
"""Beyond ``FREE_BYTES``, data may decode to this many times their size on disk (JPEG: about 10)."""

READ_ERRORS = (
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,  # an encrypted zip member; NotImplementedError (unknown compression) is one too
    ValueError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What a damaged or unreadable file raises while it is read."""


class Member(NamedTuple):
    """One file of a source: path with forward slashes, bytes when unpacked, where to find it."""

    name: str
    size: int
    handle: Any


@runtime_checkable
class Source(Protocol):
    """A folder or archive."""

    path: Path
    members: list[Member]
    limit: int

    def read(self, member: Member) -> bytes:
        """Return the member's bytes; cheapest in the order of ``members``."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


def human_bytes(count: int) -> str:
    """Return ``count`` as text, e.g. ``'1.2 GB'``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.3e} {unit}"
            )
    return f"{count} bytes"


def byte_limit(bytes_on_disk: int, max_bytes: int | None) -> int:
    """Return how many bytes the decoded data may take."""
    return max(FREE_BYTES, MAX_EXPANSION * bytes_on_disk) if max_bytes is None else max_bytes


def check_bytes(where: Any, count: int, limit: int, fix: str = "") -> None:
    """Raise unless ``count`` decoded bytes are within the limit."""
    if count > limit:
        raise data_error(
            where,
            "too large when decoded",
            f"at most {human_bytes(limit)}",
            human_bytes(count),
            fix or "if you trust the file pass max_bytes=",
        )


def natural_key(text: str) -> list[Any]:
    """Return a sort key under which ``img2`` comes before ``img10``."""
    parts = re.split(r"(\d+)", text)
    return [(int(p), p) if i % 2 else (0, p) for i, p in enumerate(parts)]


def open_source(path: Path, max_bytes: int | None = None) -> Source:
    """Return the folder, zip or tar(.gz) at ``path`` as a source, members as they are stored."""
    if path.is_dir():
        return Folder(path, max_bytes)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    return Zip(path, max_bytes) if zipped else Tar(path, max_bytes)


class Folder:
    """Files below a folder; hidden ones and links to folders are left out."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path, self.members = path, []
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in files:
                file = Path(folder, name)
                if not name.startswith(".") and file.is_file():
                    relative = file.relative_to(path).as_posix()
                    self.members.append(Member(relative, file.stat().st_size, file))
        self.limit = byte_limit(sum(member.size for member in self.members), max_bytes)

    def read(self, member: Member) -> bytes:
        """Return the file's bytes."""
        check_bytes(member.handle, member.size, self.limit)
        with open(member.handle, "rb") as file:
            return file.read(member.size)

    def close(self) -> None:
        """Nothing is held open."""


class Zip:
    """Members of a zip archive."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = path
        self.limit = byte_limit(path.stat().st_size, max_bytes)
        with contextlib.ExitStack() as on_failure:
            self._zip = on_failure.enter_context(zipfile.ZipFile(path))
            self.members = [
                Member(_safe_name(path, info.filename), info.file_size, info)
                for info in self._zip.infolist()
                if not info.is_dir()
            ]
            on_failure.pop_all()

    def read(self, member: Member) -> bytes:
        """Return the unpacked bytes, at most as many as declared, checked against their CRC."""
        check_bytes(f"{self.path}: {member.name}", member.size, self.limit)
        with self.open(member) as file:
            return file.read(member.size)  # read() alone would unpack a member that lies about it

    def open(self, member: Member) -> Any:
        """Return a file object over the unpacked bytes."""
        return self._zip.open(member.handle)

    def close(self) -> None:
        """Close the archive."""
        self._zip.close()


class Tar:
    """Members of a tar archive, gzipped or not: headers are read once, then members by offset."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path, self.members = path, []
        self.limit = byte_limit(path.stat().st_size, max_bytes)
        with open(path, "rb") as file:
            self.packed = file.read(2) == b"\x1f\x8b"
        with contextlib.ExitStack() as on_failure:
            opened = gzip.open(path) if self.packed else open(path, "rb")
            self._file = on_failure.enter_context(opened)
            self._list()
            on_failure.pop_all()

    def _list(self) -> None:
        """Collect the regular files among the members."""
        unpacked = 0
        headers: Any = _SmallReads(self._file)
        archive: Any = tarfile.open(fileobj=headers, mode="r:")
        with archive as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header
                unpacked += 512 + info.size
                check_bytes(self.path, unpacked, self.limit)
                name = _safe_name(self.path, info.name)
                if info.issparse():
                    fix = "pack the files plainly"
                    raise data_error(self.path, f"sparse member {name!r}", fix=fix)
                if info.isreg():
                    self.members.append(Member(name, info.size, info.offset_data))

    def read(self, member: Member) -> bytes:
        """Return the member's bytes; going back in a gzipped archive unpacks it once more."""
        self._file.seek(member.handle)
        content = self._file.read(member.size)
        if len(content) != member.size:
            got = f"{len(content)} of {member.size} bytes of {member.name!r}"
            raise data_error(self.path, "truncated archive", got=got, fix="fetch it again")
        return content

    def close(self) -> None:
        """Close the archive."""
        self._file.close()


class _SmallReads:
    """File object for reading tar headers: a header that claims to be huge is not read."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2**20:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def _safe_name(path: Path, name: str) -> str:
    name = name.replace("\\", "/").removeprefix("./")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise data_error(
            path, f"member {name!r} points out of the archive", fix="do not trust this file"
        )
    return name
