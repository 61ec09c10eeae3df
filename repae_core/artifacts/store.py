"""All access to the artifact store: one fsspec location, atomic writes, retries within a time budget."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from repae_core.artifacts.local_files import (
    TEMPORARY,
    HashingWriter,
    newest_change,
    read_local_range,
    temporary_beside,
    walk_files,
)

T = TypeVar("T")
_CHECK_SECONDS = 15.0
# Answers, not disturbances: asking again would not change them.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)


class StoreError(OSError):
    """The store cannot be used; one line that names it."""


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
        """Write and remove a probe file; StoreError (within half a minute) when that fails."""
        probed = copy.copy(self)
        probed.retry_seconds = min(self.retry_seconds, _CHECK_SECONDS)
        answer: futures.Future[None] = futures.Future()
        # A thread that nobody waits for: a server that takes a request and never answers (its disk is full) keeps a
        # call for minutes, since the client's own attempts multiply.
        threading.Thread(target=_probe, args=(probed, answer), daemon=True).start()
        if not futures.wait([answer], timeout=2 * _CHECK_SECONDS).done:
            raise StoreError(f"store {self.url}: no answer within {2 * _CHECK_SECONDS:.0f} s")
        try:
            answer.result()
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"store {self.url}: {_reason(error)}") from None

    def uri(self, key: str) -> str:
        """Where a key is, for people and other programs."""
        return f"{self.url}/{_checked(key)}"

    def local_root(self) -> Path:
        """Folder of a local store, created if absent."""
        assert self.is_local
        root = Path(self.root)
        root.mkdir(parents=True, exist_ok=True)
        return root

    def read_bytes(self, key: str) -> bytes:
        """Content of a file; FileNotFoundError naming it."""
        return self._get(key, lambda: self.fs.cat_file(self._path(key)))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; FileNotFoundError naming the file."""
        return self.read_ranges([key], [start], [length])[0]

    def read_ranges(self, keys: Sequence[str], starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Several byte ranges, of a remote store at the same time; FileNotFoundError naming the first missing file."""
        if self.is_local:
            return [read_local_range(self._path(k), s, n) for k, s, n in zip(keys, starts, lengths, strict=True)]
        paths = [self._path(key) for key in keys]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        return self._get(keys[0], lambda: self.fs.cat_ranges(paths, list(starts), ends, on_error="raise"))

    def download(self, key: str, target: str) -> None:
        """Copy a file to this machine; FileNotFoundError naming it."""
        self._get(key, lambda: self.fs.get_file(self._path(key), target))

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
        """Write a file only if there is none; whether it was this call that did. `data` names the writer."""
        try:
            if self.is_local:
                with self._full_disk_told(key):
                    self._link_new(self._path(key), data)
            else:
                self._try(key, lambda: self._pipe_new(self._path(key), data))
        except FileExistsError:
            # A retry after a lost answer finds what it wrote itself.
            return not self.is_local and self._get(key, lambda: self.fs.cat_file(self._path(key))) == data
        return True

    def exists(self, key: str) -> bool:
        """Whether a file is there."""
        return bool(self._try(key, lambda: self.fs.isfile(self._path(key))))

    def files(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by its name relative to it; empty where there is none."""
        base = self._path(prefix) if prefix else self.root
        if self.is_local:
            return self._try(prefix or None, lambda: dict(walk_files(base)))
        found = self._try(prefix or None, lambda: self.fs.find(base, detail=True))
        # S3 servers also list markers of folders.
        files = {name: info for name, info in sorted(found.items()) if info["type"] == "file" and name != base}
        return {name[len(base) + 1 :]: int(info["size"]) for name, info in files.items()}

    def last_change(self, prefix: str, *, besides: str = "") -> datetime | None:
        """When the newest file below a folder, not named `besides`, was written; None if there is none."""
        base = self._path(prefix)
        if self.is_local:
            seconds = self._try(prefix, lambda: newest_change(base, besides))
            return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
        found = self._try(prefix, lambda: self.fs.find(base, detail=True))
        times = [  # S3's listing says it; others are asked for each file
            info.get("LastModified") or self._try(prefix, partial(self.fs.modified, name))
            for name, info in found.items()
            if info["type"] == "file" and name.rsplit("/", 1)[-1] != besides
        ]
        return max(times, default=None)

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

    def clear_leftovers(self, prefix: str) -> None:
        """Remove what killed writers left half-written below a folder; a lease that is just being written is spared."""
        if self.is_local:
            for path in Path(self._path(prefix)).rglob(f"*{TEMPORARY}*"):
                if not path.name.startswith("lease.json"):
                    path.unlink(missing_ok=True)

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
            with self._full_disk_told(key), temporary_beside(path) as (scratch, file):
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
            remote.closed = True  # else fsspec would try to finish it when it is collected
            raise
        self._try(key, remote.close)

    def _path(self, key: str) -> str:
        return f"{self.root}/{_checked(key)}"

    @contextlib.contextmanager
    def _full_disk_told(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(f"store {self.url}: {key}: {_reason(error)}") from None

    def _link_new(self, path: str, data: bytes) -> None:
        with temporary_beside(path) as (scratch, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.link(scratch, path)

    def _pipe_new(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if error.errno == errno.EINVAL:  # s3fs' word for S3's 412, "precondition failed"
                raise FileExistsError(path) from None
            raise

    def _get(self, key: str, action: Callable[[], T]) -> T:
        try:
            return self._try(key, action)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri(key)} does not exist") from None

    def _try(self, key: str | None, action: Callable[[], T]) -> T:
        """Run an idempotent action on a key (None: the store), again after disturbances while the time budget lasts."""
        if key is not None:
            _checked(key)  # here too: a refusal is no disturbance
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


def _probe(store: Store, answer: futures.Future[None]) -> None:
    name = f".probe-{uuid.uuid4().hex}"
    try:
        store.write_bytes(name, b"probe")
        store.delete(name)
        answer.set_result(None)
    except BaseException as error:
        answer.set_exception(error)


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


def _is_final(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "ParamValidationError", "NoSuchBucket")


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]
