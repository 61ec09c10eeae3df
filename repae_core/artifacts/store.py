"""All access to the artifact store: one fsspec location, atomic writes, retries within a time budget."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

T = TypeVar("T")
_TEMPORARY = ".tmp-"
_CHECK_SECONDS = 15.0
# Answers, not disturbances: asking again would not change them.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)


class StoreError(OSError):
    """The store cannot be used; one line that names it."""


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


class Store:
    """Files below one URL (a local path, s3://, gs://, memory://), addressed by relative keys with slashes.

    Writes are atomic: a reader sees the old content or the new one. Disturbances of a remote store are retried
    for `retry_seconds`, then become a StoreError.

    Raises:
        StoreError: the URL's protocol is unknown or its package is missing.
    """

    def __init__(self, url: str, *, retry_seconds: float = 180.0) -> None:
        self.retry_seconds = retry_seconds
        self.url = absolute_url(url)
        try:
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {self.url}: {error}") from None
        self.fs: Any = fs
        self.root = root.rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)

    def check(self) -> None:
        """Write and remove a probe file; StoreError (in seconds) when that fails."""
        probe = f".probe-{uuid.uuid4().hex}"
        patient, self.retry_seconds = self.retry_seconds, min(self.retry_seconds, _CHECK_SECONDS)
        try:
            self.write_bytes(probe, b"probe")
            self.delete(probe)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"store {self.url}: {_reason(error)}") from None
        finally:
            self.retry_seconds = patient

    def uri(self, key: str) -> str:
        """Where a key is, for people and other programs."""
        return f"{self.url}/{_checked(key)}"

    def local_path(self, key: str) -> Path | None:
        """Path of a key in a local store, else None."""
        return Path(self._path(key)) if self.is_local else None

    def read_bytes(self, key: str) -> bytes:
        """Content of a file; FileNotFoundError naming it."""
        return self._get(key, lambda: self.fs.cat_file(self._path(key)))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; FileNotFoundError naming the file."""
        return self._get(key, lambda: self.fs.cat_file(self._path(key), start=start, end=start + length))

    def read_json(self, key: str) -> Any:
        """A JSON file's content; ValueError naming it when damaged."""
        try:
            return json.loads(self.read_bytes(key))
        except ValueError as error:
            raise ValueError(f"{self.uri(key)} is not JSON: {error}") from None

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a whole file atomically."""
        if self.is_local:
            with self.writer(key) as stream:
                stream.write(data)
        else:
            self._try(key, lambda: self.fs.pipe_file(self._path(key), data))

    def upload(self, key: str, path: Path) -> None:
        """Write a local file's content atomically."""
        if self.is_local:
            with open(path, "rb") as source, self.writer(key) as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
        else:
            self._try(key, lambda: self.fs.put_file(str(path), self._path(key)))

    def write_json(self, key: str, value: Any) -> None:
        """Write JSON, indented, with a fixed layout."""
        self.write_bytes(key, (json.dumps(value, indent=1) + "\n").encode())

    def create(self, key: str, data: bytes) -> bool:
        """Write a file only if there is none; whether it was this call that did."""
        try:
            if self.is_local:
                self._link_new(self._path(key), data)
            else:
                self._try(key, lambda: self.fs.pipe_file(self._path(key), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def exists(self, key: str) -> bool:
        """Whether a file is there."""
        return bool(self._try(key, lambda: self.fs.isfile(self._path(key))))

    def files(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by its name relative to it; empty where there is none."""
        base = self._path(prefix) if prefix else self.root
        if self.is_local:
            return dict(_walk(base))
        found = self._try(prefix or ".", lambda: self.fs.find(base, detail=True))
        return {name[len(base) + 1 :]: int(info["size"]) for name, info in sorted(found.items())}

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        try:
            entries = self._try(prefix, lambda: self.fs.ls(self._path(prefix), detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    def delete(self, key: str, *, recursive: bool = False) -> None:
        """Remove a file (or all below a folder); nothing there is no error."""
        path = self._path(key)
        if self.is_local and recursive:
            shutil.rmtree(path, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._try(key, lambda: self.fs.rm(path, recursive=True) if recursive else self.fs.rm_file(path))

    @contextlib.contextmanager
    def reader(self, key: str) -> Iterator[IO[bytes]]:
        """A seekable binary stream; FileNotFoundError naming the file."""
        with self._get(key, lambda: self.fs.open(self._path(key), "rb")) as stream:
            yield stream

    @contextlib.contextmanager
    def writer(self, key: str) -> Iterator[HashingWriter]:
        """A stream for large files: there, under its name, only when the block ends without an exception."""
        path = self._path(key)
        if self.is_local:
            with _temporary(path) as (scratch, file):
                stream = HashingWriter(file)
                yield stream
                file.flush()
                os.fsync(file.fileno())
                os.replace(scratch, path)
            return
        remote = self._try(key, lambda: self.fs.open(path, "wb"))
        try:
            yield HashingWriter(remote)
        except BaseException:
            remote.discard()
            raise
        self._try(key, remote.close)

    def _path(self, key: str) -> str:
        return f"{self.root}/{_checked(key)}"

    def _link_new(self, path: str, data: bytes) -> None:
        with _temporary(path) as (scratch, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.link(scratch, path)

    def _get(self, key: str, action: Callable[[], T]) -> T:
        try:
            return self._try(key, action)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri(key)} does not exist") from None

    def _try(self, key: str, action: Callable[[], T]) -> T:
        """Run an idempotent action, again after a disturbance while the time budget lasts."""
        deadline, pause = time.monotonic() + self.retry_seconds, 0.2
        while True:
            try:
                return action()
            except _FINAL:
                raise
            except Exception as error:
                if self.is_local or time.monotonic() + pause > deadline or _is_final(error):
                    raise StoreError(f"store {self.url}: {key or '.'}: {_reason(error)}") from None
            time.sleep(pause)
            pause = min(pause * 2, 10.0)


def absolute_url(url: str) -> str:
    """A store's URL without trailing slash; local paths are made absolute (workers have other folders)."""
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" in url:
        return url.rstrip("/")
    return str(Path(os.path.abspath(os.path.expanduser(url))))


def _checked(key: str) -> str:
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key:
        raise ValueError(f"{key!r} is not a path inside the store")
    return key


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[tuple[str, IO[bytes]]]:
    """A new file beside `path`, removed in the end if it is still there."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    scratch = os.path.join(folder, f"{name}{_TEMPORARY}{uuid.uuid4().hex[:12]}")
    try:
        with open(scratch, "xb") as file:
            yield scratch, cast(IO[bytes], file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def _walk(base: str) -> Iterator[tuple[str, int]]:
    for folder, folders, names in os.walk(base):
        folders.sort()
        for name in sorted(names):
            if _TEMPORARY not in name:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield os.path.relpath(path, base).replace(os.sep, "/"), os.stat(path).st_size


def _is_final(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "ParamValidationError", "NoSuchBucket")


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]
