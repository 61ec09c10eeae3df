"""Files on this machine: atomic writes, ranges, listings, and a stream that hashes what passes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any, cast

TEMPORARY = ".tmp-"


class HashingWriter(io.RawIOBase):
    """A binary stream that counts and hashes what is written; `bytes` and `sha256` are those of the file."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._target.write(data)
        self._digest.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def writable(self) -> bool:
        """True."""
        return True

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._digest.hexdigest()


def read_local_range(path: str, start: int, length: int) -> bytes:
    """`length` bytes of a local file from `start` on; FileNotFoundError naming it."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None


@contextlib.contextmanager
def temporary_beside(path: str) -> Iterator[tuple[str, IO[bytes]]]:
    """A new file beside `path`, removed in the end if it is still there."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    scratch = os.path.join(folder, f"{name}{TEMPORARY}{uuid.uuid4().hex[:12]}")
    try:
        with open(scratch, "xb") as file:
            yield scratch, cast(IO[bytes], file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def newest_change(base: str, besides: str) -> float | None:
    """Latest `changed_at` of the files below a folder not named `besides`; of an empty folder, its own."""
    walked = [os.path.join(folder, name) for folder, _, names in _walk(base) for name in names]
    times = []
    for path in [path for path in walked if os.path.basename(path) != besides] or ([] if walked else [base]):
        with contextlib.suppress(FileNotFoundError):
            times.append(changed_at(path))
    return max(times, default=None)


def changed_at(path: str) -> float:
    """When a file came here or changed: a copy may keep the mtime of what it was made from, but not its ctime."""
    status = os.lstat(path)
    return max(status.st_mtime, status.st_ctime)


def walk_files(base: str) -> Iterator[tuple[str, int]]:
    """(name relative to the folder, bytes) of every finished file below it, sorted within each folder."""
    for folder, folders, names in _walk(base):
        folders.sort()
        for name in sorted(names):
            if TEMPORARY not in name:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield os.path.relpath(path, base).replace(os.sep, "/"), os.stat(path).st_size


def _walk(base: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, in which a folder that can't be listed (ESTALE, EIO) is an error: taken for empty, what is in it would
    be made anew, or deleted.
    """

    def raise_it(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(base, onerror=raise_it)
