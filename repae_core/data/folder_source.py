"""Folders of images, local or behind any fsspec URL."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import PurePosixPath

from repae_core.data.layouts import Listing, arrange, is_hidden, is_image
from repae_core.data.source_location import Location, is_local
from repae_core.data.source_reader import StoredReader, change_mark
from repae_core.data.sources import BadImageError, ImageSource, SourceItem

# Errors of one file; others (no memory, too many open files, a lost network drive) are not the file's fault.
_FILE_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}


class FolderReader(StoredReader):
    """Reads files below a folder by name."""

    def read_bytes(self, item: SourceItem) -> bytes:
        """The file's content. BadImageError if it cannot be read; OSError if the store cannot be reached.

        ValueError if it has not the size that was listed: the data set is changing, so no result would be of it.
        """
        path = f"{self.root}/{item.name}"
        content = self._content(path)
        if len(content) != item.size:
            raise ValueError(
                f"preprocess.source: {path} has {len(content)} bytes, but had {item.size} when it was listed: "
                "it changed meanwhile; run again"
            )
        return content

    def _content(self, path: str) -> bytes:
        try:
            if not is_local(self.fs):
                return bytes(self.fs.cat_file(path))
            with open(path, "rb") as file:  # a tenth of the time that fsspec takes to open it
                return file.read()
        except FileNotFoundError:
            raise BadImageError("file not found") from None
        except PermissionError:
            raise BadImageError("permission denied") from None
        except OSError as error:
            if is_local(self.fs) and error.errno in _FILE_ERRORS:
                raise BadImageError(os.strerror(error.errno)) from None
            raise OSError(f"{path} cannot be read: {error}") from error

    def change_mark(self, item: SourceItem) -> str:
        """ETag or time of change."""
        try:
            return change_mark(self.fs, f"{self.root}/{item.name}")
        except (FileNotFoundError, PermissionError):
            return "unreadable"


def open_folder(location: Location) -> ImageSource:
    """A folder in any layout: images, WebDataset shards, or Parquet tables; see `sources.open_source`."""
    listing = _list_local(location.path) if is_local(location.fs) else _list_remote(location)
    listing.files = dict(sorted(listing.files.items()))
    if "dataset.json" not in listing.files and not any(map(is_image, listing.files)):
        shards = [name for name in listing.files if name.lower().endswith(".tar")]
        tables = [name for name in listing.files if name.lower().endswith(".parquet")]
        if shards and tables:
            raise ValueError(
                f"preprocess.source: {location.source} holds WebDataset shards ({shards[0]}) and Parquet tables "
                f"({tables[0]}): give one of them as a pattern, e.g. {location.source}/*.tar"
            )
        if shards:
            from repae_core.data.webdataset_source import open_webdataset

            return open_webdataset(location, shards, others=[name for name in listing.files if name not in {*shards}])
        if tables:
            from repae_core.data.parquet_source import open_parquet

            return open_parquet(location, tables, others=[name for name in listing.files if name not in {*tables}])
    return arrange(location.source, FolderReader(location.url, location.path), listing)


def _list_remote(location: Location) -> Listing:
    listing = Listing()
    for path, info in location.fs.find(location.path, detail=True).items():
        name = path[len(location.path) + 1 :]
        if name and not name.endswith("/"):
            listing.add(name, int(info["size"] or 0))
    return listing


def _list_local(root: str) -> Listing:
    """Links are followed, also out of the folder (data sets are often made of links); every folder is entered once.

    Folders come before links to them, so that a folder inside the data set is listed under its own name.
    """
    # fsspec's own walk neither follows links nor gives the size of a linked file.
    listing = Listing()
    entered: dict[str, str] = {}
    names = [""]
    while names:
        names = [link for name in sorted(names) for link in _walk(listing, root, name, entered)]
    return listing


def _walk(listing: Listing, root: str, start: str, entered: dict[str, str]) -> list[str]:
    """List the files below one folder; returns the links to folders found there, which are not followed yet.

    entered: real path of each folder listed so far -> its name, to which this one's are added.
    """

    def unreadable(error: OSError) -> None:
        name = os.path.relpath(str(error.filename), root)
        if name == ".":
            raise ValueError(f"preprocess.source: {root} cannot be listed: {error.strerror}")
        listing.skip(name + "/", f"the folder cannot be listed: {error.strerror}")

    links = []
    for folder, folders, names in os.walk(os.path.join(root, start), onerror=unreadable):
        below = PurePosixPath(os.path.relpath(folder, root))
        here = os.path.realpath(folder)
        if here in entered:
            listing.skip(f"{below}/", f"the same folder as {entered[here]}/")
            folders.clear()
            continue
        entered[here] = str(below)
        folders[:] = [
            name for name in folders if not is_hidden(name) and not _is_above(os.path.join(folder, name), here)
        ]
        if not below.parts:
            listing.folders.update(folders)
        links += [str(below / name) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names:
            _add(listing, str(below / name), os.path.join(folder, name))
    return links


def _is_above(folder: str, here: str) -> bool:
    """Whether a link leads to the folder `here` or one that holds it."""
    return os.path.islink(folder) and os.path.commonpath([here, target := os.path.realpath(folder)]) == target


def _add(listing: Listing, name: str, path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        listing.skip(name, "a link to nothing" if os.path.islink(path) else error.strerror or "cannot be read")
        return
    if stat.S_ISREG(status.st_mode):
        listing.add(name, status.st_size)
    else:
        listing.skip(name, "a pipe, socket or device")
