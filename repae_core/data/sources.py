"""Where images come from: the built-in digits, class folders, or a flat folder with labels; no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image

logger = logging.getLogger(__name__)


class SourceItem(NamedTuple):
    """One image of a source: name relative to the source, class number, bytes."""

    name: str
    label: int
    size: int


class Skipped(NamedTuple):
    """A name that gives no image, and why. `failure`: it should have given one, so it counts against the limit."""

    name: str
    reason: str
    failure: bool = True


class BadImageError(ValueError):
    """A file that gives no picture: the reason, without the place of the source (it enters the artifact)."""


class ImageReader(Protocol):
    """How one kind of source is read; small and picklable, for it travels to worker processes."""

    def read(self, name: str) -> Image.Image:
        """The picture of that name, opened. BadImageError if it gives none; OSError if the store cannot be reached."""
        ...

    def digest(self, items: Sequence[SourceItem]) -> dict[str, Any]:
        """What identifies the content of these items."""
        ...


@dataclass(frozen=True)
class ImageSource:
    """A listed data set; `items` are sorted by name, `skipped` are what the listing already ruled out."""

    kind: str
    reader: ImageReader
    class_names: list[str]
    items: list[SourceItem]
    skipped: list[Skipped]

    def read(self, item: SourceItem) -> Image.Image:
        """One picture, opened and not yet decoded.

        Raises:
            BadImageError: the file gives no picture; says why.
            OSError: a remote source cannot be reached; the file may be sound.
        """
        return self.reader.read(item.name)

    def content_digest(self) -> dict[str, Any]:
        """What the fingerprint of `preprocess` hashes: classes, listing and content; no path, no host.

        Two sources with equal digests make equal artifacts (api.md, Artifacts).
        """
        listing = json.dumps([self.class_names, self.skipped], ensure_ascii=False)
        return {
            "kind": self.kind,
            "images": len(self.items),
            "classes": len(self.class_names),
            "listing_sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
            **self.reader.digest(self.items),
        }


def open_source(source: str) -> ImageSource:
    """List an image source.

    source: `digits` (built in), or a folder, local or any fsspec URL, of one of two layouts:
        <class>/<anything>.jpg   a folder a class; classes are numbered in the order of their sorted names
        dataset.json + images    {"labels": [["name.png", 3], ...]}, names relative to the folder

    Names that start with a dot are no part of a data set. Other files that are not images by their suffix are
    listed as skipped without counting as failures; an image without a label, a label without its image and a class
    folder without images count as failures (such a class keeps its number).

    Raises:
        ValueError: the source does not exist, holds no images, or has another layout; in one line.
    """
    if source == "digits":
        from repae_core.data.digits_source import open_digits

        return open_digits()
    from repae_core.data.folder_source import open_folder

    opened = open_folder(source)
    if not opened.items:
        raise ValueError(f"preprocess.source: no images found in {source}")
    failures = sum(entry.failure for entry in opened.skipped)
    if failures:
        first = next(entry for entry in opened.skipped if entry.failure)
        logger.warning("%s: %d names give no image; the first: %s: %s", source, failures, first.name, first.reason)
    return opened
