"""Writing image shards: WebDataset tar files, each with a JSON sidecar that is its commit marker.

    shards/00000.tar    <key>.cls and <key>.png (or .webp, .jpg) of each image, key = position in the sorted source
    shards/00000.json   written after the tar: its bytes and sha256, keys, labels, offsets, skipped files
    skipped.jsonl       {"path", "reason", "failure"} of every file that gave no image
    index.json          the data set in figures, written last

A shard is a fixed range of a seeded permutation, made by whoever comes first: bytes depend on the source, seed and
settings only, never on the number of processes or on interruptions.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from repae_core.artifacts import Artifact, FileEntry, HashingWriter
from repae_core.data.crop import center_crop
from repae_core.data.sources import BadImageError, ImageReader, ImageSource, Skipped, SourceItem

logger = logging.getLogger(__name__)

INDEX = "index.json"
SKIPPED = "skipped.jsonl"
SUFFIXES = {"png": "png", "webp": "webp", "jpeg": "jpg"}
SHARD_BYTES = 256_000_000
_SIDECARS = 8  # read at a time
# Bytes a pixel of photographs, seen at 256 px: what `images_per_shard` follows from.
_BYTES_PER_PIXEL = {"png": 1.9, "webp": 1.4, "jpeg": 0.6}


class Sample(NamedTuple):
    """One planned image: its key in the shards and where it comes from."""

    key: str
    item: SourceItem


def shard_name(k: int) -> str:
    """The tar of shard k."""
    return f"shards/{k:05d}.tar"


def sidecar_name(k: int) -> str:
    """The commit marker of shard k."""
    return f"shards/{k:05d}.json"


def plan_shards(n: int, images_per_shard: int, seed: int) -> list[np.ndarray]:
    """Source positions of each shard: consecutive parts of one permutation of range(n), drawn by PCG64(seed)."""
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard must be at least 1, got {images_per_shard}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    return [order[start : start + images_per_shard] for start in range(0, n, images_per_shard)]


def shard_samples(source: ImageSource, positions: Iterable[int]) -> list[Sample]:
    """The planned images at these positions of the sorted source."""
    return [Sample(f"{position:08d}", source.items[position]) for position in positions]


def default_images_per_shard(count: int, resolution: int, encoding: str) -> int:
    """Images that make a shard of about 256 MB: 2,056 photographs of 256 px as PNG.

    Of a data set with fewer than 16 such shards a sixteenth, but not under 64: workers share whole shards.
    """
    by_size = round(SHARD_BYTES / (resolution**2 * _BYTES_PER_PIXEL[encoding]))
    return max(1, min(by_size, max(64, -(-count // 16))))


def encode_image(image: Image.Image, encoding: str, jpeg_quality: int = 95) -> bytes:
    """Image file of an RGB image: `png` and `webp` lossless, `jpeg` of that quality without chroma subsampling.

    PNG at zlib level 1 takes half the time of the default and 10 % more space on photographs; WebP takes up to twice
    the time of that and saves a quarter.
    """
    buffer = io.BytesIO()
    if encoding == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif encoding == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=0, method=1)
    else:
        assert encoding == "jpeg"
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()


class ShardSettings(NamedTuple):
    """How images are stored, and how many of the whole data set may be skipped as unreadable."""

    resolution: int
    encoding: str = "png"
    jpeg_quality: int = 95
    max_failures: int = 0


def write_shard(
    reader: ImageReader, samples: Iterable[Sample], k: int, artifact: Artifact, settings: ShardSettings
) -> dict[str, Any]:
    """Write shard k: the tar, then its sidecar, which is returned.

    Raises:
        ValueError: more images than settings.max_failures could not be read in this shard alone; names the first.
    """
    columns = _Columns()
    with artifact.writer(shard_name(k)) as stream:
        for sample in samples:
            try:
                image = Image.fromarray(center_crop(reader.read(sample.item), settings.resolution))
            except BadImageError as error:
                columns.skip(sample, error)
                check_failures(columns.skipped, settings.max_failures)
                continue
            blob = encode_image(image, settings.encoding, settings.jpeg_quality)
            _write_member(stream, f"{sample.key}.cls", str(sample.item.label).encode())
            offset = _write_member(stream, f"{sample.key}.{SUFFIXES[settings.encoding]}", blob)
            columns.add(sample, image, offset, len(blob))
        end = 2 * tarfile.BLOCKSIZE
        stream.write(bytes(end + -(stream.bytes + end) % tarfile.RECORDSIZE))
    entry = FileEntry(name=shard_name(k), bytes=stream.bytes, sha256=stream.sha256)
    sidecar = {"tar": entry.model_dump()} | columns.to_json()
    artifact.write_json(sidecar_name(k), sidecar)
    return sidecar


def _write_member(stream: HashingWriter, name: str, content: bytes) -> int:
    """Append a file to a tar; returns where its content starts.

    As WebDataset's writer does it, which imports torch in every process, in a tenth of the time of TarFile.addfile.
    """
    member = tarfile.TarInfo(name)  # owner 0 and time 0 by default: bytes depend on nothing else
    member.size, member.mode = len(content), 0o444
    stream.write(member.tobuf(tarfile.USTAR_FORMAT))
    offset = stream.bytes
    stream.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset


_VALUES = np.arange(256, dtype=np.int64)


class _Columns:
    """What a sidecar says of its images: one list a column, in the tar's order."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, int, int]] = []
        self.skipped: list[Skipped] = []
        self.histogram = np.zeros(3 * 256, dtype=np.int64)

    def add(self, sample: Sample, image: Image.Image, offset: int, size: int) -> None:
        self.rows.append((sample.key, sample.item.name, sample.item.label, offset, size))
        self.histogram += image.histogram()

    def skip(self, sample: Sample, error: BadImageError) -> None:
        logger.warning("skipped %s: %s", ascii(sample.item.name)[1:-1], error)
        self.skipped.append(Skipped(sample.item.name, str(error)))

    def to_json(self) -> dict[str, Any]:
        keys, names, labels, offsets, sizes = zip(*self.rows, strict=True) if self.rows else ((),) * 5
        counts = self.histogram.reshape(3, 256)
        return {
            "keys": keys,
            "names": names,
            "labels": labels,
            "offsets": offsets,
            "sizes": sizes,
            # of values and of squares, per channel: exact integers
            "pixel_sums": [(counts @ _VALUES**power).tolist() for power in (1, 2)],
            "skipped": [list(entry) for entry in self.skipped],
        }


def check_failures(skipped: Iterable[Skipped], allowed: int) -> None:
    """ValueError naming the first failure (by name) when there are more than allowed."""
    failures = sorted(entry for entry in skipped if entry.failure)
    if len(failures) > allowed:
        first = failures[0]
        raise ValueError(
            f"{first.name}: {first.reason} ({len(failures)} unreadable so far, preprocess.max_skipped_fraction "
            f"allows {allowed} of this data set)"
        )


def finished_shards(artifact: Artifact, num_shards: int) -> dict[int, list[Skipped]]:
    """What was skipped in each shard that is there already: sidecar present, tar of the bytes that it states."""
    files = artifact.files()
    started = [k for k in range(num_shards) if {shard_name(k), sidecar_name(k)} <= files.keys()]
    return {
        k: skipped_in(sidecar)
        for k, sidecar in zip(started, _sidecars(artifact, started), strict=True)
        if sidecar["tar"]["bytes"] == files[shard_name(k)]
    }


def _sidecars(artifact: Artifact, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Sidecars of these shards, some at a time: all of a large data set would take 250 bytes an image."""
    for start in range(0, len(numbers), _SIDECARS):
        yield from artifact.read_all_json([sidecar_name(k) for k in numbers[start : start + _SIDECARS]])


def skipped_in(sidecar: dict[str, Any]) -> list[Skipped]:
    """The files of a shard that gave no image."""
    return [Skipped(*entry) for entry in sidecar["skipped"]]


def finish(
    source: ImageSource,
    artifact: Artifact,
    settings: ShardSettings,
    *,
    num_shards: int,
    images_per_shard: int,
) -> dict[str, Any]:
    """Write `skipped.jsonl`, then `index.json`, from the sidecars; returns the index.

    Raises:
        ValueError: more unreadable files than allowed over all shards, or not one image left.
    """
    skipped, shards, sums = list(source.skipped), [], np.zeros((2, 3), dtype=object)
    filled: set[int] = set()
    for k, sidecar in enumerate(_sidecars(artifact, range(num_shards))):
        skipped += skipped_in(sidecar)
        filled.update(sidecar["labels"])
        sums += np.array(sidecar["pixel_sums"], dtype=object)
        shards.append({"tar": sidecar["tar"], "sidecar": sidecar_name(k), "num_images": len(sidecar["keys"])})
    check_failures(skipped, settings.max_failures)
    num_images = sum(shard["num_images"] for shard in shards)
    if not num_images:
        raise ValueError(f"no image of the source could be read; the first: {min(skipped).name}: {min(skipped).reason}")
    skipped += _empty_classes(source.class_names, filled, skipped)
    lines = ({"path": name, "reason": reason, "failure": failure} for name, reason, failure in sorted(skipped))
    artifact.write_bytes(SKIPPED, "".join(json.dumps(line) + "\n" for line in lines).encode())
    mean, std = _pixel_moments(sums, num_images * settings.resolution**2)
    failures = sum(entry.failure for entry in skipped)
    index = {
        "num_images": num_images,
        "num_classes": len(source.class_names),
        "class_names": source.class_names,
        "resolution": settings.resolution,
        "encoding": settings.encoding,
        "images_per_shard": images_per_shard,
        "pixel_mean": mean,
        "pixel_std": std,
        "num_skipped": failures,
        "num_other_files": len(skipped) - failures,
        "shards": shards,
    }
    artifact.write_json(INDEX, index)
    return index


def _empty_classes(class_names: Sequence[str], filled: Set[int], skipped: Iterable[Skipped]) -> list[Skipped]:
    """Classes without an image in the shards that are not listed yet: numbers left out, or all images unreadable.

    No failures: such numbers may be left out on purpose, and unreadable images count by themselves.
    """
    listed = {entry.name for entry in skipped}
    names = [f"{name}/" for label, name in enumerate(class_names) if label not in filled]
    return [Skipped(name, "class without images", failure=False) for name in names if name not in listed]


def _pixel_moments(sums: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Mean and (population) standard deviation per channel of values in [0, 1], from exact integer sums."""
    mean = [total / count / 255 for total in sums[0]]
    variance = [(count * square - total * total) / count**2 for total, square in zip(*sums, strict=True)]
    return mean, [value**0.5 / 255 for value in variance]
