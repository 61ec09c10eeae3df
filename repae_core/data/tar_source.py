"""Uncompressed tar archives: members are found once, by their headers, and read by byte range."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

from repae_core.data.layouts import LABELS_FILE, Listing, arrange, is_hidden, safe_name, without_wrapper
from repae_core.data.source_location import Location
from repae_core.data.source_reader import StoredReader
from repae_core.data.sources import ImageSource, SourceItem

_LABEL_BYTES = 2**16  # a .cls or .json member up to this size is read while the headers are


class Member(NamedTuple):
    """What a tar holds under one name.

    place: (number of the tar, offset of the content, time of change); link: the name in this tar that it stands for;
    content: of small .cls and .json members; problem: why it gives nothing.
    """

    name: str
    size: int
    place: tuple[int, ...]
    link: str | None = None
    content: bytes | None = None
    problem: str | None = None


class TarReader(StoredReader):
    """Reads members of one or several tars; (tar, offset, time) of each comes with its item."""

    def __init__(self, url: str, root: str, tars: tuple[str, ...]) -> None:
        super().__init__(url, root)
        self.tars = tars

    def read_bytes(self, item: SourceItem) -> bytes:
        """The member's content, one range request."""
        tar, offset, _ = item.place
        return self.read_range(f"{self.root}/{self.tars[tar]}", offset, item.size)

    def change_mark(self, item: SourceItem) -> str:
        """The time of change that the tar itself states: it does not depend on where the tar lies."""
        return str(item.place[2])


def open_tar(location: Location) -> ImageSource:
    """One or several tars: WebDataset shards if labels stand beside the images, else one archive of files.

    Listing reads every header and seeks over the contents. On a local disk that takes about a minute for a million
    images; of a remote tar most bytes are transferred once more, as headers lie between the images.
    """
    from repae_core.data.webdataset_source import is_webdataset, open_webdataset

    if len(location.names) > 1:
        return open_webdataset(location, location.names)
    members = resolved(list(tar_members(location, location.names[0], 0)))
    listing = without_wrapper(_listing(members))
    if LABELS_FILE not in listing.files and is_webdataset(members):
        return open_webdataset(location, location.names)
    return arrange(location.source, TarReader(location.url, location.path, location.names), listing)


def tar_members(location: Location, tar: str, number: int) -> Iterator[Member]:
    """Every file of a tar in its order.

    Raises:
        ValueError: it is damaged or cut off: what comes after that place is unknown, so nothing is taken from it.
    """
    path = f"{location.path}/{tar}"
    last = "its start"
    try:
        with location.fs.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a million of them would be kept otherwise
                last = info.name
                if not info.isdir():
                    yield _member(info, number, stream)
                elif name := safe_name(info.name):
                    yield Member(name + "/", 0, ())
            stream.seek(archive.offset)
            end = stream.read(tarfile.BLOCKSIZE)
            if any(end):
                raise tarfile.ReadError("no header where one must be")
            if len(end) < tarfile.BLOCKSIZE:  # one of the two that end a tar is enough to know that all is there
                raise tarfile.ReadError("no block of zeros, which ends an archive")
    except (tarfile.TarError, ValueError, OverflowError) as error:  # also sizes and times beyond bounds
        raise ValueError(
            f"preprocess.source: {path} is damaged or cut off after {ascii(last)[1:-1]}: {error}"
        ) from None


def _member(info: tarfile.TarInfo, number: int, stream: IO[bytes]) -> Member:
    name = safe_name(info.name)
    if name is None:
        return Member(info.name, 0, (), problem="a name that points out of the archive")
    if info.issym() or info.islnk():
        base = posixpath.dirname(name) if info.issym() else ""
        target = safe_name(posixpath.normpath(posixpath.join(base, info.linkname)))
        return Member(name, 0, (), link=target or "", problem=None)
    if not info.isreg() or info.issparse():
        return Member(name, 0, (), problem="no plain file (a pipe, device or sparse file)")
    content = None
    if name.lower().endswith((".cls", ".json")) and info.size <= _LABEL_BYTES:
        stream.seek(info.offset_data)
        content = stream.read(info.size)
    return Member(name, info.size, (number, info.offset_data, int(info.mtime) % 2**63), content=content)


def resolved(members: list[Member]) -> list[Member]:
    """The members with links, also to links, replaced by what they stand for."""
    known = {member.name: member for member in members if member.place}
    links = {member.name: member.link for member in members if member.link is not None}
    found = []
    for member in members:
        if member.link is not None:
            target = known.get(_end(member.link, known, links))
            if target is None:
                member = member._replace(problem="a link to nothing in the archive, or to a folder")
            else:
                member = member._replace(size=target.size, place=target.place, content=target.content)
        found.append(member)
    return found


def _end(name: str, known: Mapping[str, Member], links: Mapping[str, str]) -> str:
    """Where a chain of links ends; some name that is no file's if it is a circle."""
    for _ in range(len(links)):
        if name in known or name not in links:
            break
        name = links[name]
    return name


def _listing(members: list[Member]) -> Listing:
    listing = Listing()
    for member in members:
        if member.name.endswith("/"):
            if not is_hidden(member.name[:-1]):
                listing.folders.add(member.name[:-1])
        elif member.problem:
            listing.skip(member.name, member.problem)
        else:
            listing.add(member.name, member.size, member.place)
    return listing
