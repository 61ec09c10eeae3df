"""Files that weights come from: a local copy of a remote one, checked against its SHA-256 where that is known."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import fsspec
from filelock import FileLock

from repae_core.config.environment import repae_home

_BLOCK = 1 << 20


def split_checksum(path: str) -> tuple[str, str]:
    """`file#sha256=<hex>` -> (file, hex). Torch hub's own files carry the first digits in their name.

    Raises:
        ValueError: what follows `#sha256=` is no SHA-256.
    """
    file, _, digits = path.partition("#sha256=")
    if digits and not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
        raise ValueError(f"{path}: after #sha256= come 64 hexadecimal digits")
    if not digits and file.startswith("https://download.pytorch.org/"):
        named = re.search(r"-([0-9a-f]{8,})\.pth$", file)
        digits = named[1] if named else ""
    return file, digits.lower()


def local_copy(path: str) -> str:
    """Local path of a file given as a path or fsspec URL (s3://, https://, ...), `#sha256=<hex>` behind it if known.

    A remote file is downloaded once into REPAE_HOME/downloads: one process does it, the others wait. A changed remote
    file (by its size, ETag or time) is downloaded anew.

    Raises:
        ValueError: one line naming the file: cannot be read, or its SHA-256 is not the expected one.
    """
    file, expected = split_checksum(path)
    try:
        copy = _download(file) if "://" in file and not file.startswith("file://") else file.removeprefix("file://")
        found = sha256_of(copy) if expected else ""
        os.stat(copy)
    except (OSError, ImportError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: cannot be read ({reason})") from None
    if not found.startswith(expected):
        raise ValueError(f"{file}: its SHA-256 is {found}, not {expected}: damaged on its way, or another file")
    return copy


def sha256_of(path: str) -> str:
    """SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def downloads_folder() -> Path:
    """REPAE_HOME/downloads, made if missing."""
    folder = repae_home() / "downloads"
    folder.mkdir(exist_ok=True)
    return folder


def _download(url: str) -> str:
    filesystem, remote = fsspec.core.url_to_fs(url)
    key = hashlib.sha256(f"{url} {filesystem.ukey(remote)}".encode()).hexdigest()[:16]
    target = downloads_folder() / f"{key}-{Path(remote).name}"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = f"{target}.partial"
            filesystem.get_file(remote, partial)
            os.replace(partial, target)
    return str(target)
