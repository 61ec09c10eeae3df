"""ADM's reference `.npz`: looked at by its headers before any work, read when it is needed; never unpickled."""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

import numpy as np

from repae_core.remote_files import local_copy, sha256_of, split_checksum

_NAMES = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")
_SMALLEST_SIDE = 8  # as preprocess.resolution
# What zipfile, zlib and numpy raise on bytes of another kind.
DAMAGED = (
    OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, RuntimeError, SyntaxError, ArithmeticError,
    MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip


class Header(NamedTuple):
    """Of one array in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ReferenceFile:
    """ADM's `.npz`: images `arr_0` uint8 [N,H,W,3], and/or statistics `mu, sigma, mu_s, sigma_s`."""

    name: str
    sha256: str
    images: np.ndarray | None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)


def check_reference_file(path: str) -> None:
    """Whether a local or remote file can be a reference, by names, types and shapes: no array is loaded.

    Raises:
        ValueError: unreadable, not such a file, or neither statistics nor images are in it; one line naming it.
    """
    with _opened(path) as archive:
        headers = {name: _header(archive, name) for name in _names(archive)}
    _check(path, headers)


def read_reference_file(path: str) -> ReferenceFile:
    """An ADM reference; `path`: local or remote.

    Raises:
        ValueError: as `check_reference_file`, or its content is damaged or not finite.
    """
    check_reference_file(path)
    with _opened(path) as archive:
        arrays = {name: _array(archive, name) for name in _names(archive)}
    images = arrays.pop("arr_0", None)
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"evaluate.reference: {path}: {name} holds values that are not finite")
    file, _ = split_checksum(path)
    return ReferenceFile(file.rsplit("/", 1)[-1], sha256_of(local_copy(path)), images, arrays)


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever its bytes make a reader raise becomes one line."""
    try:
        local = local_copy(path)
    except ValueError as error:
        raise ValueError(f"evaluate.reference: {error}") from None
    try:
        with zipfile.ZipFile(local) as archive:
            yield archive
    except DAMAGED as error:
        # Only the first line: numpy's next ones advise to unpickle.
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"evaluate.reference: {path}: damaged, or not an .npz file ({told})") from None


def _names(archive: zipfile.ZipFile) -> list[str]:
    members = set(archive.namelist())
    return [name for name in _NAMES if f"{name}.npy" in members]


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        header = _read_header(stream)
        if header.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are never read")
        if info.file_size != stream.tell() + math.prod(header.shape) * header.dtype.itemsize:
            raise ValueError(f"{name} is {info.file_size} bytes, which are not {header.dtype} {list(header.shape)}")
    return header


def _read_header(stream: IO[bytes]) -> Header:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(cast(Any, stream))
    if version not in read:
        raise ValueError(f"arrays of format {version} are not read")
    shape, _, dtype = read[version](cast(Any, stream))
    return Header(dtype, shape)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        array: np.ndarray = np.lib.format.read_array(cast(Any, stream), allow_pickle=False)
        stream.read()  # to its end, where the checksum is compared
        return array


def _check(path: str, headers: dict[str, Header]) -> None:
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in headers) != (covariance in headers):
            raise ValueError(f"evaluate.reference: {path} holds only one of {mean} and {covariance}")
        if mean in headers:
            width = headers[mean].shape[0] if headers[mean].shape else 0
            _require(path, mean, headers[mean], (width,))
            _require(path, covariance, headers[covariance], (width, width))
    if "arr_0" in headers:
        _check_images(path, headers["arr_0"])
    elif "mu" not in headers:
        raise ValueError(f"evaluate.reference: {path} holds neither mu and sigma nor arr_0")


def _require(path: str, name: str, header: Header, shape: tuple[int, ...]) -> None:
    if not np.issubdtype(header.dtype, np.number) or np.issubdtype(header.dtype, np.complexfloating):
        raise ValueError(f"evaluate.reference: {path}: {name} is {header.dtype}, not numbers")
    if header.shape != shape or not shape[0]:
        wanted = "[D]" if len(shape) == 1 else f"[{shape[0]},{shape[0]}] as its mean"
        raise ValueError(f"evaluate.reference: {path}: {name} has the shape {list(header.shape)}, not {wanted}")


def _check_images(path: str, header: Header) -> None:
    shape, kind = header.shape, f"{header.dtype} {list(header.shape)}"
    if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"evaluate.reference: {path}: arr_0 is {kind}, not uint8 [N,H,W,3]")
    if shape[0] < 2:
        raise ValueError(f"evaluate.reference: {path}: arr_0 holds {shape[0]} image(s); at least 2 are needed")
    if shape[1] != shape[2] or shape[1] < _SMALLEST_SIDE:
        raise ValueError(
            f"evaluate.reference: {path}: arr_0 is {kind}: images must be square, of {_SMALLEST_SIDE} pixels or more"
        )
