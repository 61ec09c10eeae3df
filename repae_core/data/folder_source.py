"""Folders of images, local or behind any fsspec URL."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import PurePosixPath

from repae_core.data.layouts import Listing, arrange, is_hidden, is_image, is_of_system
from repae_core.data.source_location import Location, is_local
from repae_core.data.source_reader import NO_NUMBER, StoredReader, change_mark, content_number
from repae_core.data.sources import BadImageError, ImageSource, SourceItem

# Errors of one file; others (no memory, too many open files, a lost network drive) are not the file's fault.
_FILE_ERRORS = {errno.ELOOP, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}


class FolderReader(StoredReader):
    """Reads files below a folder by name; the mark of change that its listing told comes with each item."""

    def read_bytes(self, item: SourceItem) -> bytes:
        """The file's content. BadImageError if it cannot be read; OSError if the store cannot be reached.

        ValueError if it is not what was listed: the data set is changing, so no result would be of it.
        """
        path = f"{self.root}/{item.name}"
        try:
            content, mark = self._read_local(path) if is_local(self.fs) else self._read_remote(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise _changed(path, "is no file any more") from None
        except PermissionError:
            raise BadImageError("permission denied") from None
        except OSError as error:
            if is_local(self.fs) and error.errno in _FILE_ERRORS:
                raise BadImageError(os.strerror(error.errno)) from None
            raise OSError(f"{path} cannot be read: {error}") from error
        if len(content) != item.size:
            raise _changed(path, f"has {len(content)} bytes, but had {item.size} when it was listed")
        if item.place != (mark,) and NO_NUMBER not in (mark, *item.place):
            raise _changed(path, "has another time of change or ETag than when it was listed")
        return content

    def _read_local(self, path: str) -> tuple[bytes, int]:
        with open(path, "rb") as file:  # a tenth of the time that fsspec takes to open it
            return file.read(), _time_mark(os.fstat(file.fileno()))

    def _read_remote(self, path: str) -> tuple[bytes, int]:
        # A second request: fsspec does not hand on the ETag that comes with the content.
        return bytes(self.fs.cat_file(path)), content_number(self.fs.info(path))

    def change_mark(self, item: SourceItem) -> str:
        """ETag or time of change."""
        try:
            return change_mark(self.fs, f"{self.root}/{item.name}")
        except (FileNotFoundError, PermissionError):
            return "unreadable"


def _changed(path: str, how: str) -> ValueError:
    return ValueError(f"preprocess.source: {path} {how}: it changed meanwhile; run again")


def open_folder(location: Location) -> ImageSource:
    """A folder in any layout: images, WebDataset shards, or Parquet tables; see `sources.open_source`."""
    listing = _list_local(location.path) if is_local(location.fs) else _list_remote(location)
    if "dataset.json" not in listing.files and not any(map(is_image, listing.files)):
        shards = sorted(name for name in listing.files if name.lower().endswith(".tar"))
        tables = sorted(name for name in listing.files if name.lower().endswith(".parquet"))
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
            listing.add(name, int(info["size"] or 0), (content_number(info),))
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
        folders[:] = [name for name in folders if _is_followed(listing, str(below / name), os.path.join(folder, name))]
        if not below.parts:
            listing.folders.update(folders)
        links += [str(below / name) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names:
            _add(listing, str(below / name), os.path.join(folder, name))
    return links


def _is_followed(listing: Listing, name: str, path: str) -> bool:
    """Whether the folder `name` is a part of the data set; what it holds else is listed."""
    if is_hidden(name):
        if not is_of_system(name):
            _list_hidden(listing, name, path)
        return False
    target = os.path.realpath(path)
    if os.path.islink(path) and os.path.commonpath([os.path.realpath(os.path.dirname(path)), target]) == target:
        listing.skip(name + "/", "a link to a folder that holds it", failure=False)
        return False
    return True


def _time_mark(status: os.stat_result) -> int:
    """Time of the last change in an int64: file systems keep years for which nanoseconds do not fit."""
    return status.st_mtime_ns % 2**63


def _list_hidden(listing: Listing, start: str, path: str) -> None:
    """Images below a hidden folder, no links followed: a visible link may still lead there."""
    if os.path.islink(path):
        return
    for folder, _, names in os.walk(path):
        for name in names:
            listing.skip(os.path.join(start, os.path.relpath(os.path.join(folder, name), path)), "")


def _add(listing: Listing, name: str, path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        nothing = error.errno == errno.ENOENT and os.path.islink(path)
        listing.skip(name, "a link to nothing" if nothing else error.strerror or "cannot be read")
        return
    if stat.S_ISREG(status.st_mode):
        listing.add(name, status.st_size, (_time_mark(status),))
    else:
        listing.skip(name, "a pipe, socket or device")
