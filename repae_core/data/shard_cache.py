"""Whole shards of a remote store, kept on this machine's disk up to a limit."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from filelock import FileLock

from repae_core.artifacts import Store
from repae_core.artifacts.local_files import read_local_range
from repae_core.config.environment import repae_home

_PARTIAL = ".partial"


def open_shard_cache(gib: float) -> ShardCache | None:
    """The cache in REPAE_HOME, shared by all runs there; None for a size of 0."""
    return ShardCache(repae_home() / "shards", int(gib * 2**30)) if gib else None


class ShardCache:
    """Shards read lately, shared by all processes that name the same folder; the oldest go when the limit is passed.

    folder: created if absent; holds nothing else. limit_bytes: a single larger shard is kept all the same while it is
    read.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def read_range(self, store: Store, key: str, start: int, length: int) -> bytes:
        """As `store.read_range`, from the local copy of the whole file, which is fetched first if it is not here."""
        while True:
            copy = self._fetched(store, key)
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it just now
                return read_local_range(str(copy), start, length)

    def _fetched(self, store: Store, key: str) -> Path:
        copy = self.folder / hashlib.sha256(store.uri(key).encode()).hexdigest()[:32]
        try:
            os.utime(copy)  # marks it as used
            return copy
        except FileNotFoundError:
            pass
        with FileLock(f"{copy}.lock"):
            if not copy.exists():
                partial = f"{copy}{_PARTIAL}"
                store.download(key, partial)
                os.replace(partial, copy)
                self._evict(keep=copy)
        return copy

    def _evict(self, keep: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            if not path.suffix:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
