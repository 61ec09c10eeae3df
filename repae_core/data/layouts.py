"""From a listing of files, in a folder or an archive, to labelled images: class folders, or dataset.json."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from repae_core.data.source_reader import MAX_IMAGE_BYTES, StoredReader, too_large
from repae_core.data.sources import LAYOUTS, ImageSource, ItemTable, Skipped, SourceItem

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


class StoredFiles(Mapping[str, StoredFile]):
    """Files by name, with their numbers in one array: an object for each would take as much again."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._numbers, self._width = array("q"), 1

    def __setitem__(self, name: str, file: StoredFile) -> None:
        assert name not in self._rows
        self._rows[name] = len(self._rows)
        self._numbers.extend((file.size, *file.place))
        self._width = 1 + len(file.place)
        assert len(self._numbers) == len(self) * self._width

    def __getitem__(self, name: str) -> StoredFile:
        start = self._rows[name] * self._width
        size, *place = self._numbers[start : start + self._width]
        return StoredFile(size, tuple(place))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass
class Listing:
    """All files of a folder or archive by relative name; those that are hidden only as skipped images."""

    files: StoredFiles = field(default_factory=StoredFiles)
    folders: set[str] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, name: str, size: int, place: tuple[int, ...] = ()) -> None:
        """List a file; of several with one name the first counts, the others are failures."""
        if is_hidden(name):
            self.skip(name, "")
        elif name in self.files:
            self.skipped.append(Skipped(name, "a second file of this name"))
        else:
            self.files[name] = StoredFile(size, place)

    def skip(self, name: str, reason: str, *, failure: bool = True) -> None:
        """List a name that gives no image."""
        if not is_hidden(name):
            self.skipped.append(Skipped(name, reason, failure))
        elif entry := hidden_image(name):
            self.skipped.append(entry)


def is_hidden(name: str) -> bool:
    """Whether a name is no part of a data set: of the operating system, or hidden by its user."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def is_of_system(name: str) -> bool:
    """Whether a name is what macOS leaves everywhere: never anybody's image, whatever its suffix."""
    return any(part.startswith("._") or part in (".DS_Store", "__MACOSX") for part in name.split("/"))


def hidden_image(name: str, prefix: str = "") -> Skipped | None:
    """The entry of a hidden name that would be an image: no failure, but told; None for any other hidden name."""
    if is_of_system(name) or not is_image(name):
        return None
    return Skipped(prefix + name, "hidden: its name, or a folder's, starts with a dot", failure=False)


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
    if LABELS_FILE in listing.files:
        return _labelled(reader, listing)
    images = sorted(name for name in listing.files if is_image(name))
    loose = [name for name in images if "/" not in name]
    if loose:
        raise ValueError(
            f"preprocess.source: {source} has images outside class folders ({loose[0]}, {len(loose)} in all) and no "
            f"{LABELS_FILE}; {LAYOUTS}"
        )
    if not images:
        raise ValueError(
            f"preprocess.source: no images found in {source} ({found_in(sorted(listing.files))}); {LAYOUTS}"
        )
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
        wrapper = top.pop() + "/"
        start = len(wrapper)
        files = StoredFiles()
        for name, file in listing.files.items():
            files[name[start:]] = file
        if LABELS_FILE not in files and (not files or any(is_image(name) and "/" not in name for name in files)):
            return listing
        skipped = [entry._replace(name=entry.name.removeprefix(wrapper)) for entry in listing.skipped]
        listing = Listing(files, {name[start:] for name in listing.folders} - {""}, skipped)


def _class_folders(reader: StoredReader, listing: Listing, images: list[str]) -> ImageSource:
    inside = {name.split("/")[0] for name in listing.files if "/" in name}
    classes = sorted(inside | {name.split("/")[0] for name in listing.folders})
    number = {name: label for label, name in enumerate(classes)}
    items = ItemTable(SourceItem(name, number[name.split("/")[0]], *listing.files[name]) for name in images)
    filled = {number[name.split("/")[0]] for name in images}
    skipped = listing.skipped + [not_an_image(name) for name in listing.files if not is_image(name)]
    # A class without images because a folder of it is not listed is one problem, not two.
    told = {entry.name.split("/")[0] for entry in listing.skipped if entry.failure and entry.name.endswith("/")}
    empty = [name for name in classes if number[name] not in filled and name not in told]
    skipped += [Skipped(f"{name}/", "class folder without images") for name in empty]
    return ImageSource("class-folders", reader, classes, items, sorted(skipped))


def _labelled(reader: StoredReader, listing: Listing) -> ImageSource:
    labels, skipped = _read_labels(reader, listing.files[LABELS_FILE])
    skipped += [entry for entry in listing.skipped if entry.failure or entry.name not in labels]
    listed = {entry.name for entry in skipped if entry.failure} - (labels.keys() & listing.files.keys())
    items = []
    for name in sorted((labels.keys() | listing.files.keys()) - listed - {LABELS_FILE}):
        if name not in listing.files:
            skipped.append(Skipped(name, f"named in {LABELS_FILE} but {'hidden' if is_hidden(name) else 'not there'}"))
        elif not is_image(name):
            skipped.append(not_an_image(name))
        elif name not in labels:
            skipped.append(Skipped(name, f"no label in {LABELS_FILE}"))
        else:
            items.append(SourceItem(name, labels[name], *listing.files[name]))
    there = listing.files.keys() | {entry.name for entry in listing.skipped if entry.failure}
    # A mistyped name must make no classes.
    num_classes = 1 + max((label for name, label in labels.items() if name in there), default=-1)
    return ImageSource(
        "labelled-folder", reader, [str(i) for i in range(num_classes)], ItemTable(items), sorted(skipped)
    )


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
