"""Zip archives: members are found in the central directory and read by byte range."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib

from repae_core.data.layouts import Listing, arrange, is_hidden, safe_name, without_wrapper
from repae_core.data.source_location import Location
from repae_core.data.source_reader import MAX_IMAGE_BYTES, StoredReader, too_large
from repae_core.data.sources import BadImageError, ImageSource, SourceItem

_HEADER = 30  # bytes before the name in a member's own header
_NAME = 1024  # more than name and extra fields usually take there, so that one request brings the content too
_ENCRYPTED = 0x1


class ZipReader(StoredReader):
    """Reads members of one zip; (offset, compressed bytes, method, CRC) of each comes with its item."""

    def __init__(self, url: str, root: str, name: str) -> None:
        super().__init__(url, root)
        self.name = name

    def read_bytes(self, item: SourceItem) -> bytes:
        """The member's content, unpacked; never more bytes than the directory promises."""
        start, packed, method, crc = item.place
        data = self._packed(start, packed)
        if method == zipfile.ZIP_DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = unpacker.decompress(data, item.size + 1)
            except zlib.error as error:
                raise BadImageError(f"damaged in the archive: {error}") from None
        if len(data) != item.size or zlib.crc32(data) != crc:
            raise BadImageError("damaged in the archive: size or CRC is not that of its directory")
        return data

    def change_mark(self, item: SourceItem) -> str:
        """The CRC of the content, from the directory."""
        return f"crc32 {item.place[3]:08x}"

    def _packed(self, start: int, packed: int) -> bytes:
        """The member's bytes as they are stored, behind its own header of a length known only there."""
        path = f"{self.root}/{self.name}"
        try:
            block = self.fs.cat_file(path, start=start, end=start + _HEADER + _NAME + packed)
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error}") from error
        if len(block) < _HEADER or not block.startswith(b"PK\x03\x04"):
            raise BadImageError("damaged in the archive: no header where its directory says")
        begin = _HEADER + sum(struct.unpack_from("<HH", block, 26))
        if len(block) < begin + packed and begin > _HEADER + _NAME:
            return self.read_range(path, start + begin, packed)
        return block[begin : begin + packed]


def open_zip(location: Location) -> ImageSource:
    """List a zip; the central directory is read once, about 100 bytes an image.

    Raises:
        ValueError: damaged or cut off (the directory stands at the end), or several files given.
    """
    if len(location.names) > 1:
        raise ValueError(f"preprocess.source: {location.source} names {len(location.names)} zip archives: give one")
    name = location.names[0]
    try:
        with location.fs.open(f"{location.path}/{name}", "rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"preprocess.source: {location.path}/{name} is damaged or cut off: {error}") from None
    listing = Listing()
    for info in members:
        _add(listing, info)
    listing = without_wrapper(listing)
    return arrange(location.source, ZipReader(location.url, location.path, name), listing)


def _add(listing: Listing, info: zipfile.ZipInfo) -> None:
    # Programs on Windows write backslashes.
    name = safe_name(info.filename.replace("\\", "/"))
    if name is None:
        listing.skip(info.filename, "a name that points out of the archive")
    elif info.filename.endswith(("/", "\\")):
        if not is_hidden(name):
            listing.folders.add(name)
    elif stat.S_ISLNK(info.external_attr >> 16):
        listing.skip(name, "a link inside an archive")
    elif info.flag_bits & _ENCRYPTED:
        listing.skip(name, "encrypted")
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        listing.skip(name, f"packed by method {info.compress_type}; only stored and deflated members are read")
    elif (size := max(info.file_size, info.compress_size)) > MAX_IMAGE_BYTES:
        listing.skip(name, too_large(size))
    else:
        listing.add(name, info.file_size, (info.header_offset, info.compress_size, info.compress_type, info.CRC))
