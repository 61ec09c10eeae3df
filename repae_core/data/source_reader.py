"""What the readers of stored sources share: reading through fsspec, and the digest of the content."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
from PIL import Image

from repae_core.data.crop import open_image
from repae_core.data.sources import BadImageError, SourceItem

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 2**29  # one file of more than 512 MiB is no picture to train on, and must not fill the memory
HASHED_BYTES = 2 * 2**30  # content up to this total enters the fingerprint; the rest by what marks a change
NO_NUMBER = -1
_HASH_THREADS = 8
_HASH_BLOCK = 1024  # a task in the pool takes a kilobyte or two
_CHANGE_FIELDS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")


class StoredReader(ABC):
    """Reads images below one place in a filesystem.

    It holds only where that is, so it is cheap to send to another process; where an image lies inside a file
    travels with its item (`SourceItem.place`).
    """

    def __init__(self, url: str, root: str) -> None:
        self.url = url  # names the filesystem, with its options
        self.root = root  # path in that filesystem to which names are relative
        self._fs: Any = None

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, opened on first use."""
        if self._fs is None:
            self._fs = fsspec.core.url_to_fs(self.url)[0]
        return self._fs

    def read(self, item: SourceItem) -> Image.Image:
        """One picture; see ImageReader."""
        if item.size > MAX_IMAGE_BYTES:
            raise BadImageError(too_large(item.size))
        data = self.read_bytes(item)
        if not data:
            raise BadImageError("the file is empty")
        return open_image(data)

    @abstractmethod
    def read_bytes(self, item: SourceItem) -> bytes:
        """The file's content. BadImageError if this file has none; OSError if the store cannot be reached."""

    @abstractmethod
    def change_mark(self, item: SourceItem) -> str:
        """What changes when the file does, known without reading it."""

    def digest(self, items: Sequence[SourceItem]) -> dict[str, Any]:
        """sha256 over one line an image: name, label, bytes, and its content's sha256 or, past the limit, a mark."""
        return content_digest(self.url, items, self._content_mark, self.change_mark)

    def _content_mark(self, item: SourceItem) -> str:
        if item.size > MAX_IMAGE_BYTES:
            return "too large"
        try:
            return hashlib.sha256(self.read_bytes(item)).hexdigest()
        except BadImageError:
            return "unreadable"

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes of a file from `start` on. OSError, naming the file, if they cannot be had."""
        try:
            data = self.fs.cat_file(path, start=start, end=start + size)
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error}") from error
        if len(data) != size:
            raise OSError(f"{path} ends before byte {start + size}: changed since it was listed?")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fs": None}


def too_large(size: int) -> str:
    """Why a file of `size` bytes is not read."""
    return f"{size} bytes are too many for one image (limit {MAX_IMAGE_BYTES})"


def change_mark(fs: Any, path: str) -> str:
    """A file's ETag or time of change, as its store tells it."""
    info = fs.info(path)
    return next((str(info[field]) for field in _CHANGE_FIELDS if info.get(field)), "unknown")


def content_number(info: Mapping[str, Any]) -> int:
    """A number for the ETag or MD5 that a store tells of a file; NO_NUMBER if it tells none.

    No times: some stores tell another form of them in a listing than of one file.
    """
    mark = next((str(info[field]) for field in ("ETag", "etag", "md5Hash") if info.get(field)), None)
    return NO_NUMBER if mark is None else int.from_bytes(hashlib.sha256(mark.strip('"').encode()).digest()[:7])


def content_digest(
    where: str,
    items: Sequence[SourceItem],
    content_mark: Callable[[SourceItem], str],
    change_mark: Callable[[SourceItem], str],
) -> dict[str, Any]:
    """sha256 over (name, label, bytes, mark) of every item; the mark is of the content up to HASHED_BYTES in all."""
    total = sum(item.size for item in items)
    hashed, spent = 0, 0
    for item in items:
        spent += item.size
        if spent > HASHED_BYTES:
            break
        hashed += 1
    if hashed < len(items):
        logger.info(
            "%s holds %.1f GiB: the first %d files are hashed by content, the other %d by etag, time of change or CRC",
            where, total / 2**30, hashed, len(items) - hashed,
        )  # fmt: skip
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for start in range(0, len(items), _HASH_BLOCK):
            block = items[start : start + _HASH_BLOCK]
            by_content = max(0, hashed - start)
            marks = [*pool.map(content_mark, block[:by_content]), *pool.map(change_mark, block[by_content:])]
            for item, mark in zip(block, marks, strict=True):
                digest.update(json.dumps([item.name, item.label, item.size, mark]).encode())
    return {"bytes": total, "content_sha256": digest.hexdigest()}
