"""Folders of images, local or behind any fsspec URL: one folder a class, or flat with dataset.json."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import fsspec
from PIL import Image, UnidentifiedImageError

from repae_core.data.crop import DECODING_ERRORS
from repae_core.data.sources import BadImageError, ImageSource, Skipped, SourceItem

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LABELS_FILE = "dataset.json"
HASHED_BYTES = 2 * 2**30  # content up to this total enters the fingerprint; the rest by etag or mtime
_HASH_THREADS = 8
_LAYOUT = f"expected one folder per class (<class>/<image>), or images with {LABELS_FILE} in the folder itself"


class FolderReader:
    """Reads files below a folder; holds the URL only, so it is cheap to send to another process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: tuple[Any, str] | None = None

    def filesystem(self) -> tuple[Any, str]:
        """The fsspec filesystem and the folder's path in it."""
        if self._opened is None:
            fs, root = fsspec.core.url_to_fs(self.url)
            self._opened = fs, root.rstrip("/")
        return self._opened

    def read_bytes(self, name: str) -> bytes:
        """The file's content. OSError if it cannot be read."""
        fs, root = self.filesystem()
        return fs.cat_file(f"{root}/{name}")

    def read(self, name: str) -> Image.Image:
        """One picture; see ImageReader."""
        try:
            data = self.read_bytes(name)
        except FileNotFoundError:
            raise BadImageError("file not found") from None
        except PermissionError:
            raise BadImageError("permission denied") from None
        except OSError as error:
            if is_local(self.filesystem()[0]) and error.strerror:
                raise BadImageError(error.strerror) from None
            raise OSError(f"{self.url}/{name} cannot be read: {error}") from error
        if not data:
            raise BadImageError("the file is empty")
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise BadImageError("not an image, or damaged at its start") from None
        except DECODING_ERRORS as error:
            raise BadImageError(str(error)) from None

    def digest(self, items: Sequence[SourceItem]) -> dict[str, Any]:
        """sha256 over one line a file: name, label, bytes, and its content's sha256 or, past the limit, its etag."""
        total = sum(item.size for item in items)
        hashed, spent = 0, 0
        for item in items:
            spent += item.size
            if spent > HASHED_BYTES:
                break
            hashed += 1
        if hashed < len(items):
            logger.info(
                "%s holds %.1f GiB: the first %d files are hashed by content, the other %d by etag or time of change",
                self.url, total / 2**30, hashed, len(items) - hashed,
            )  # fmt: skip
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            marks = [*pool.map(self._content_mark, items[:hashed]), *pool.map(self._change_mark, items[hashed:])]
        digest = hashlib.sha256()
        for item, mark in zip(items, marks, strict=True):
            digest.update(json.dumps([item.name, item.label, item.size, mark]).encode())
        return {"bytes": total, "content_sha256": digest.hexdigest()}

    def _content_mark(self, item: SourceItem) -> str:
        try:
            return hashlib.sha256(self.read_bytes(item.name)).hexdigest()
        except (PermissionError, FileNotFoundError):
            return "unreadable"

    def _change_mark(self, item: SourceItem) -> str:
        fs, root = self.filesystem()
        info = fs.info(f"{root}/{item.name}")
        for field in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"):
            if info.get(field):
                return str(info[field])
        return "unknown"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_opened": None}


def open_folder(source: str) -> ImageSource:
    """List a folder in either layout; see `sources.open_source`."""
    reader = FolderReader(os.path.expanduser(source))
    try:
        fs, root = reader.filesystem()
        found = fs.isdir(root)
    except (ImportError, ValueError) as error:
        raise ValueError(f"preprocess.source: {source} cannot be opened: {error}") from None
    if not found:
        wrong = "is a file, not a folder" if fs.exists(root) else "does not exist"
        raise ValueError(f"preprocess.source: {source} {wrong}; {_LAYOUT}, or `digits`")
    files = dict(sorted(_list(fs, root)))
    if LABELS_FILE in files:
        return _labelled(reader, files)
    return _class_folders(reader, files, source)


def _list(fs: Any, root: str) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of all files; (name + "/", 0) of the direct subfolders."""
    if is_local(fs):
        yield from _list_local(root)
        return
    for path, info in fs.find(root, detail=True).items():
        name = path[len(root) + 1 :]
        if not any(part.startswith(".") for part in name.split("/")):
            yield name, int(info["size"] or 0)
            if "/" in name:
                yield name.split("/")[0] + "/", 0


def is_local(fs: Any) -> bool:
    """Whether a filesystem is this machine's."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _list_local(root: str) -> Iterator[tuple[str, int]]:
    # fsspec's own walk neither follows links nor gives the size of a linked file; data sets are often links.
    for folder, folders, names in os.walk(root, followlinks=True):
        below = PurePosixPath(os.path.relpath(folder, root))
        here = os.path.realpath(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not (here + os.sep).startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        ]
        if folder == root:
            yield from ((name + "/", 0) for name in folders)
        for name in names:
            if not name.startswith("."):
                yield str(below / name), _size(os.path.join(folder, name))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # a dangling link: reading it will fail and be listed


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _not_an_image(name: str) -> Skipped:
    return Skipped(name, f"not an image file (suffix {PurePosixPath(name).suffix or 'missing'})", failure=False)


def _class_folders(reader: FolderReader, files: dict[str, int], source: str) -> ImageSource:
    names = [name for name in files if not name.endswith("/")]
    loose = [name for name in names if "/" not in name and _is_image(name)]
    if loose:
        raise ValueError(
            f"preprocess.source: {source} has images outside class folders ({loose[0]}, {len(loose)} in all); {_LAYOUT}"
        )
    images = [name for name in names if "/" in name and _is_image(name)]
    if not images:
        raise ValueError(f"preprocess.source: no images found in {source}; {_LAYOUT}")
    classes = sorted(name.rstrip("/") for name in files if name.endswith("/"))
    number = {name: label for label, name in enumerate(classes)}
    items = [SourceItem(name, number[name.split("/")[0]], files[name]) for name in images]
    filled = {item.label for item in items}
    skipped = [_not_an_image(name) for name in names if not _is_image(name)]
    skipped += [Skipped(f"{name}/", "class folder without images") for name in classes if number[name] not in filled]
    return ImageSource("class-folders", reader, classes, items, sorted(skipped))


def _labelled(reader: FolderReader, files: dict[str, int]) -> ImageSource:
    labels = _read_labels(reader)
    items, skipped = [], []
    for name in sorted(labels.keys() | {name for name in files if not name.endswith("/")}):
        if name == LABELS_FILE:
            continue
        if name not in files:
            skipped.append(Skipped(name, f"named in {LABELS_FILE} but not there"))
        elif not _is_image(name):
            skipped.append(_not_an_image(name))
        elif name not in labels:
            skipped.append(Skipped(name, f"no label in {LABELS_FILE}"))
        else:
            items.append(SourceItem(name, labels[name], files[name]))
    num_classes = 1 + max(labels.values(), default=-1)
    return ImageSource("labelled-folder", reader, [str(i) for i in range(num_classes)], items, skipped)


def _read_labels(reader: FolderReader) -> dict[str, int]:
    """Name to class number. ValueError naming the first wrong entry."""
    where = f"preprocess.source: {LABELS_FILE}"
    try:
        entries = json.loads(reader.read_bytes(LABELS_FILE))["labels"]
    except (ValueError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError(f'{where} must be JSON of the form {{"labels": [["name.png", 3], ...]}}')
    labels: dict[str, int] = {}
    for entry in entries:
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool) and label >= 0:
                name = name.replace("\\", "/")
            case _:
                raise ValueError(f"{where}: {json.dumps(entry)} is not [name, class number from 0]")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{where}: {name} has two labels, {labels[name]} and {label}")
    return labels
