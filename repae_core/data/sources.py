"""Where images come from: folders, archives, WebDataset shards, Parquet tables, the built-in digits; no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

from PIL import Image

logger = logging.getLogger(__name__)

LAYOUTS = (
    "expected one folder per class (<class>/<image>), or images with dataset.json, either one also in a tar or zip; "
    "WebDataset shards (.tar); Parquet image tables; or `digits`"
)


_NAMED_CLASSES = 4


class SourceItem(NamedTuple):
    """One image of a source: name relative to the source, class number, bytes (0 where a table does not tell).

    place: where the reader finds it inside an archive or table, or what tells that the file was changed since; as many
    numbers for each item of a source. It travels with the item, so that readers stay small.
    """

    name: str
    label: int
    size: int
    place: tuple[int, ...] = ()


class ItemTable(Sequence[SourceItem]):
    """Many items in 32 to 56 bytes each and their names; a list of them takes 400. A source may have millions."""

    def __init__(self, items: Iterable[SourceItem]) -> None:
        self._names, self._ends, self._numbers = bytearray(), array("q", [0]), array("q")
        for name, label, size, place in items:
            self._names += name.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._names))
            self._numbers.extend((label, size, *place))
            self._width = 2 + len(place)
            assert len(self._numbers) == len(self) * self._width

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> SourceItem: ...

    @overload
    def __getitem__(self, i: slice) -> list[SourceItem]: ...

    def __getitem__(self, i: int | slice) -> SourceItem | list[SourceItem]:
        chosen = range(len(self))[i]  # IndexError beyond the end; negative numbers count from it
        if isinstance(chosen, range):
            return [self[k] for k in chosen]
        name = self._names[self._ends[chosen] : self._ends[chosen + 1]].decode("utf-8", "surrogatepass")
        label, size, *place = self._numbers[chosen * self._width : (chosen + 1) * self._width]
        return SourceItem(name, label, size, tuple(place))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Skipped(NamedTuple):
    """A name that gives no image, and why. `failure`: it should have given one, so it counts against the limit."""

    name: str
    reason: str
    failure: bool = True


class BadImageError(ValueError):
    """A file that gives no picture: the reason, without the place of the source (it enters the artifact)."""


class ImageReader(Protocol):
    """How one kind of source is read; small and picklable, for it travels to worker processes."""

    def read(self, item: SourceItem) -> Image.Image:
        """That picture, opened. BadImageError if it gives none; OSError if the store cannot be reached."""
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
    items: ItemTable
    skipped: list[Skipped]

    def read(self, item: SourceItem) -> Image.Image:
        """One picture, opened and not yet decoded.

        Raises:
            BadImageError: the file gives no picture; says why.
            OSError: a remote source cannot be reached; the file may be sound.
        """
        return self.reader.read(item)

    def content_digest(self) -> dict[str, Any]:
        """What the fingerprint of `preprocess` hashes: classes, listing and content; no path, no host.

        Two sources with equal digests make equal artifacts (api.md, Artifacts).
        """
        return {
            "kind": self.kind,
            "images": len(self.items),
            "classes": len(self.class_names),
            "listing_sha256": _sha256([self.class_names, self.skipped]),
            **self.reader.digest(self.items),
        }

    def describe(self) -> str:
        """One line for people: what was listed, so that folders mistaken for classes are seen before any work."""
        classes = ", ".join(ascii(name)[1:-1] for name in self.class_names[:_NAMED_CLASSES])
        more = ", ..." if len(self.class_names) > _NAMED_CLASSES else ""
        empty = len(self.class_names) - len({item.label for item in self.items})
        failures = sum(entry.failure for entry in self.skipped)
        return (
            f"{len(self.items)} images in {len(self.class_names)} classes ({classes}{more})"
            + (f", {empty} of them without images" if empty else "")
            + f"; {failures} names failed, {len(self.skipped) - failures} others are left out"
        )

    def listing_digest(self) -> str:
        """What differs when anybody lists other classes, names, labels, sizes or places."""
        digest = hashlib.sha256(_sha256([self.class_names, self.skipped]).encode())
        for item in self.items:
            digest.update(json.dumps(item).encode())
        return digest.hexdigest()


def _sha256(listing: Any) -> str:
    return hashlib.sha256(json.dumps(listing, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def open_source(source: str) -> ImageSource:
    """List an image source; what it is, is recognised from what is there.

    source: `digits` (built in), or a local path or any fsspec URL of
        a folder, tar or zip of  <class>/<anything>.jpg   a folder a class, numbered in the order of the sorted names
                             or  dataset.json + images    {"labels": [["name.png", 3], ...]}, names relative to it
        WebDataset shards        <key>.<image> with <key>.cls or .json (`label` or `cls`): a folder, a glob or brace
                                 pattern (`train-{000..099}.tar`), or one shard
        Parquet tables           image and label column, as Hugging Face writes them: a file, folder or pattern

    Names that start with a dot are no part of a data set; of these, images are listed as skipped without counting as
    failures, and so are other files that are not images by their suffix. An image without a label, a label without
    its image, a second file of the same name and a class folder without images count as failures (such a class keeps
    its number).
    What lies in an archive is never written to disk.

    Raises:
        ValueError: the source does not exist, holds no images, or has another layout; in one line.
    """
    opened = _open(source)
    if not opened.items:
        first = f" ({opened.skipped[0].name}: {opened.skipped[0].reason})" if opened.skipped else ""
        raise ValueError(f"preprocess.source: no images found in {source}{first}; {LAYOUTS}")
    failures = sum(entry.failure for entry in opened.skipped)
    if failures:
        worst = next(entry for entry in opened.skipped if entry.failure)
        logger.warning(
            "%s: %d names give no image; the first: %s: %s", source, failures, ascii(worst.name), worst.reason
        )
    return opened


def _open(source: str) -> ImageSource:
    if not source.strip():  # else an unset variable would make a data set of the working directory
        raise ValueError(f"preprocess.source is empty; {LAYOUTS}")
    if source == "digits":
        from repae_core.data.digits_source import open_digits

        return open_digits()
    from repae_core.data.source_location import locate

    location = locate(source)
    if location.kind == "folder":
        from repae_core.data.folder_source import open_folder

        return open_folder(location)
    if location.kind == "parquet":
        from repae_core.data.parquet_source import open_parquet

        return open_parquet(location, location.names)
    if location.kind == "zip":
        from repae_core.data.zip_source import open_zip

        return open_zip(location)
    from repae_core.data.tar_source import open_tar

    return open_tar(location)
