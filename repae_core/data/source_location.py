"""Where a source is and what lies there: a folder, an archive, a table, or the files of a pattern."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import fsspec

from repae_core.data.sources import LAYOUTS

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Location:
    """A source found: `kind` is folder, tar, zip or parquet.

    path: the folder itself, or the folder below which `names` (one file, or those of a pattern) lie.
    """

    source: str
    url: str
    fs: Any
    path: str
    kind: str
    names: tuple[str, ...] = ()


def is_local(fs: Any) -> bool:
    """Whether a filesystem is this machine's."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def locate(source: str) -> Location:
    """Find a folder, file, or brace or glob pattern.

    Raises:
        ValueError: nothing there, or nothing that holds images; one line that names what was found.
    """
    url = source.removeprefix("file://")
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))  # workers may have another working folder
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        path = path.rstrip("/")
        if fs.isdir(path):
            return Location(source, url, fs, path, "folder")
        if fs.exists(path):
            return _files(source, url, fs, [path])
        paths = _expand(source, fs, path)
    except (ImportError, ValueError, NotImplementedError) as error:
        if str(error).startswith("preprocess.source"):
            raise
        raise ValueError(f"preprocess.source: {source} cannot be opened: {error}") from None
    if not paths:
        raise ValueError(f"preprocess.source: {source} does not exist; {LAYOUTS}")
    return _files(source, url.split("{")[0].split("*")[0].split("?")[0], fs, paths)


def _expand(source: str, fs: Any, path: str) -> list[str]:
    """The files of a brace or glob pattern, in its order; none if it is no pattern or matches nothing."""
    from braceexpand import braceexpand

    paths: list[str] = []
    if not any(sign in path for sign in "{*?["):
        return paths
    for name in braceexpand(path):
        if any(sign in name for sign in "*?["):
            paths += sorted(fs.glob(name))
        elif fs.exists(name):
            paths.append(name)
        else:
            raise ValueError(f"preprocess.source: {source}: {name} does not exist")
    return list(dict.fromkeys(paths))


def _files(source: str, url: str, fs: Any, paths: list[str]) -> Location:
    """The location of files that are all of one kind."""
    kinds = {path: _kind(source, fs, path) for path in paths}
    kind = kinds[paths[0]]
    other = next((path for path in paths if kinds[path] != kind), None)
    if other:
        raise ValueError(f"preprocess.source: {source}: {paths[0]} is {kind}, {other} is {kinds[other]}")
    folders = [path.split("/")[:-1] for path in paths]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    shared = "/".join(level[0] for level in levels)
    names = tuple(path[len(shared) :].lstrip("/") for path in paths)
    return Location(source, url, fs, shared, kind, names)


def _kind(source: str, fs: Any, path: str) -> str:
    if fs.isdir(path):
        raise ValueError(f"preprocess.source: {source}: {path} is a folder; a pattern must name files")
    try:
        head = fs.cat_file(path, start=0, end=512)
    except OSError as error:
        raise ValueError(f"preprocess.source: {path} cannot be read: {error}") from None
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"preprocess.source: {path} is compressed with {name}, so no single image can be read from it: "
                "decompress it to a plain .tar (images do not shrink), or unpack it"
            )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or path.lower().endswith(".tar"):
        return "tar"
    raise ValueError(f"preprocess.source: {source} is a file, and no archive or table; {LAYOUTS}")
