"""From a listing of files, in a folder or an archive, to labelled images: class folders, or dataset.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from repae_core.data.source_reader import MAX_IMAGE_BYTES, StoredReader, too_large
from repae_core.data.sources import LAYOUTS, ImageSource, Skipped, SourceItem

# .heic and .heif are pictures that Pillow alone cannot read: they fail by name instead of counting as other files.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif"}
    | {".ppm", ".pgm", ".heic", ".heif"}
)
LABELS_FILE = "dataset.json"
MAX_CLASSES = 1_000_000  # a larger class number is a mistake, and would fill the memory with class names


class StoredFile(NamedTuple):
    """A file of a listing: bytes, and where the reader finds it inside an archive."""

    size: int
    place: tuple[int, ...] = ()


@dataclass
class Listing:
    """All files of a folder or archive by relative name; names that start with a dot are no part of a data set."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, name: str, size: int, place: tuple[int, ...] = ()) -> None:
        """List a file; of several with one name the first counts, the others are failures."""
        if is_hidden(name):
            return
        if name in self.files:
            self.skipped.append(Skipped(name, "a second file of this name"))
        else:
            self.files[name] = StoredFile(size, place)

    def skip(self, name: str, reason: str) -> None:
        """List a name that gives no image."""
        if not is_hidden(name):
            self.skipped.append(Skipped(name, reason))


def is_hidden(name: str) -> bool:
    """Whether a name is no part of a data set: of the operating system, or hidden by its user."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a file should be an image, by its suffix."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def not_an_image(name: str) -> Skipped:
    """The entry of a file that was never meant to be an image."""
    return Skipped(name, f"not an image file (suffix {PurePosixPath(name).suffix or 'missing'})", failure=False)


def safe_name(name: str) -> str | None:
    """An archive member's name below the archive's root; None if it points elsewhere (nothing is ever written)."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith("/") or ".." in parts or parts[0].endswith(":"):
        return None
    return "/".join(parts)


def found_in(names: Iterable[str]) -> str:
    """What there is instead of images, for an error line: `3 .txt, 1 .zip`."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "files without suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) or "nothing"


def arrange(source: str, reader: StoredReader, listing: Listing) -> ImageSource:
    """The labelled images of a listing.

    Raises:
        ValueError: no images, images outside class folders, or a dataset.json of another form; in one line.
    """
    listing.files = dict(sorted(listing.files.items()))
    if LABELS_FILE in listing.files:
        return _labelled(reader, listing)
    images = [name for name in listing.files if is_image(name)]
    loose = [name for name in images if "/" not in name]
    if loose:
        raise ValueError(
            f"preprocess.source: {source} has images outside class folders ({loose[0]}, {len(loose)} in all) and no "
            f"{LABELS_FILE}; {LAYOUTS}"
        )
    if not images:
        raise ValueError(f"preprocess.source: no images found in {source} ({found_in(listing.files)}); {LAYOUTS}")
    return _class_folders(reader, listing, images)


def without_wrapper(listing: Listing) -> Listing:
    """The listing below the one folder that holds all of an archive (`tar cf data.tar train/`), as often as that is so.

    A folder that holds images itself is a class, not a wrapper.
    """
    while True:
        names = [*listing.files, *listing.folders]
        top = {name.split("/")[0] for name in names}
        if len(top) != 1 or any("/" not in name for name in listing.files):
            return listing
        start = len(top.pop()) + 1
        files = {name[start:]: file for name, file in listing.files.items()}
        if LABELS_FILE not in files and (not files or any(is_image(name) and "/" not in name for name in files)):
            return listing
        listing = Listing(files, {name[start:] for name in listing.folders} - {""}, listing.skipped)


def _class_folders(reader: StoredReader, listing: Listing, images: list[str]) -> ImageSource:
    inside = {name.split("/")[0] for name in listing.files if "/" in name}
    classes = sorted(inside | {name.split("/")[0] for name in listing.folders})
    number = {name: label for label, name in enumerate(classes)}
    items = [SourceItem(name, number[name.split("/")[0]], *listing.files[name]) for name in images]
    filled = {item.label for item in items}
    skipped = listing.skipped + [not_an_image(name) for name in listing.files if not is_image(name)]
    # A class without images because a folder of it is not listed is one problem, not two.
    told = {entry.name.split("/")[0] for entry in listing.skipped if entry.name.endswith("/")}
    empty = [name for name in classes if number[name] not in filled and name not in told]
    skipped += [Skipped(f"{name}/", "class folder without images") for name in empty]
    return ImageSource("class-folders", reader, classes, items, sorted(skipped))


def _labelled(reader: StoredReader, listing: Listing) -> ImageSource:
    labels, skipped = _read_labels(reader, listing.files[LABELS_FILE])
    skipped += listing.skipped
    listed = {entry.name for entry in skipped if entry.failure} - (labels.keys() & listing.files.keys())
    items = []
    for name in sorted((labels.keys() | listing.files.keys()) - listed - {LABELS_FILE}):
        if name not in listing.files:
            skipped.append(Skipped(name, f"named in {LABELS_FILE} but not there"))
        elif not is_image(name):
            skipped.append(not_an_image(name))
        elif name not in labels:
            skipped.append(Skipped(name, f"no label in {LABELS_FILE}"))
        else:
            items.append(SourceItem(name, labels[name], *listing.files[name]))
    there = listing.files.keys() | {entry.name for entry in listing.skipped}  # a mistyped name must make no classes
    num_classes = 1 + max((label for name, label in labels.items() if name in there), default=-1)
    return ImageSource("labelled-folder", reader, [str(i) for i in range(num_classes)], items, sorted(skipped))


def _read_labels(reader: StoredReader, file: StoredFile) -> tuple[dict[str, int], list[Skipped]]:
    """Name to class number, and the names that have none or two. ValueError naming the first malformed entry."""
    where = f"preprocess.source: {LABELS_FILE}"
    if file.size > MAX_IMAGE_BYTES:
        raise ValueError(f"{where}: {too_large(file.size)}")
    try:
        entries = json.loads(reader.read_bytes(SourceItem(LABELS_FILE, 0, *file)))["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError(f'{where} must be JSON of the form {{"labels": [["name.png", 3], ...]}}')
    labels: dict[str, int | None] = {}
    problems: dict[str, Skipped] = {}
    for entry in entries:
        match entry:
            case [str(name), label] if label is None or (type(label) is int and 0 <= label < MAX_CLASSES):
                name = name.replace("\\", "/")
                name = safe_name(name) or name  # `./a.png` is a.png
            case _:
                raise ValueError(f"{where}: {json.dumps(entry)[:200]} is not [name, class number from 0]")
        if name not in labels:
            labels[name] = label
        elif labels[name] != label:
            problems[name] = Skipped(name, f"two labels in {LABELS_FILE}, {labels[name]} and {label}")
        else:
            problems.setdefault(name, Skipped(name, f"named twice in {LABELS_FILE}, with one label", failure=False))
    for name, label in labels.items():
        if label is None:
            problems.setdefault(name, Skipped(name, f"no label in {LABELS_FILE}"))
    wrong = {name for name, entry in problems.items() if entry.failure}
    known = {name: label for name, label in labels.items() if label is not None and name not in wrong}
    return known, list(problems.values())
