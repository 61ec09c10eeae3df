"""Whole shards of a remote store, kept on this machine's disk up to a limit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from repae_core.artifacts import FileEntry, Store
from repae_core.artifacts.local_files import read_local_range
from repae_core.config.environment import repae_home

_PARTIAL, _LOCK = ".partial", ".lock"
_ABANDONED_SECONDS = 24 * 3600.0  # no download of a shard takes so long


def open_shard_cache(gib: float) -> ShardCache | None:
    """The cache in REPAE_HOME, shared by all runs there; None for a size of 0."""
    return ShardCache(repae_home() / "shards", int(gib * 2**30)) if gib else None


class ShardCache:
    """Shards read lately, shared by all processes that name the same folder; the oldest go when the limit is passed.

    A copy is named by the sha256 of its content, so a shard that is made again is never mistaken for the old one, and
    equal shards of two stores are kept once.
    folder: created if absent; holds nothing else. limit_bytes: a single larger shard is kept all the same while it is
    read.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def read_range(self, store: Store, key: str, entry: FileEntry, start: int, length: int) -> bytes:
        """As `store.read_range`, from the local copy of the whole file, which is fetched first if it is not here.

        entry: what the file must be.

        Raises:
            ValueError: the store's file has another size or content; names it.
        """
        while True:
            copy = self._fetched(store, key, entry)
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it just now
                return read_local_range(str(copy), start, length)

    def _fetched(self, store: Store, key: str, entry: FileEntry) -> Path:
        copy = self.folder / entry.sha256
        with contextlib.suppress(FileNotFoundError):
            os.utime(copy)  # marks it as used
            if _is_whole(copy, entry):
                return copy
        with FileLock(f"{copy}{_LOCK}"):
            if not _is_whole(copy, entry):
                partial = Path(f"{copy}{_PARTIAL}")
                store.download(key, str(partial))
                with open(partial, "rb") as downloaded:
                    digest = hashlib.file_digest(downloaded, "sha256").hexdigest()
                if digest != entry.sha256:
                    size = partial.stat().st_size
                    partial.unlink()
                    raise ValueError(
                        f"{store.uri(key)}: {size} bytes with sha256 {digest[:12]}..., but its index says "
                        f"{entry.bytes} bytes with {entry.sha256[:12]}...: damaged, or made again meanwhile"
                    )
                os.replace(partial, copy)
                self._evict(keep=copy)
        return copy

    def _evict(self, keep: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                old = status.st_mtime < time.time() - _ABANDONED_SECONDS
                if not path.suffix:
                    found.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == _PARTIAL and old:
                    path.unlink()
                elif path.suffix == _LOCK and old and not path.with_suffix("").exists():
                    _remove(path.with_suffix(""))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != keep:
                _remove(path)
                total -= size


def _remove(copy: Path) -> None:
    """A copy and its lock; the lock only from who holds it, so that those who wait for it see that it is gone."""
    copy.unlink(missing_ok=True)
    with contextlib.suppress(Timeout), FileLock(f"{copy}{_LOCK}", timeout=0):
        Path(f"{copy}{_LOCK}").unlink(missing_ok=True)


def _is_whole(copy: Path, entry: FileEntry) -> bool:
    """Whether a copy is there in its full size: a full disk or a crash of the machine can cut it after its rename."""
    try:
        return copy.stat().st_size == entry.bytes
    except FileNotFoundError:
        return False
