"""`generate`: images in shards, the `.npz` that ADM's evaluator reads, and grids of samples.

shards/00000.npz   `images` uint8 NHWC and `labels` of a fixed range of indices; there as a whole or not at all
samples.npz        `arr_0`, uint8 NHWC, all images in index order
grid.png           a row of samples for each of the first ten classes; grids/<class>.png more of one class
samples.json       how they were made
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from repae_core.artifacts import Artifact, FileEntry
from repae_core.config import PipelineConfig
from repae_core.data import work_share
from repae_core.evaluation.grids import png_bytes
from repae_core.generation import Generator, sample_labels
from repae_core.generation.pictures import GRID_ROWS, OF_ONE_CLASS, class_grid, one_class_grid
from repae_core.generation.sample_file import npz_bytes, write_sample_file

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleWork:
    """All images of one artifact: shard k holds a fixed range of indices, whoever samples them."""

    out: Artifact
    labels: np.ndarray  # int64 [N]
    protocol: str
    num_classes: int
    seed: int
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        """Shards of the whole set, the last one perhaps shorter."""
        return -(-len(self.labels) // self.images_per_shard)

    def indices(self, k: int) -> range:
        """Indices of shard k's images."""
        start = k * self.images_per_shard
        return range(start, min(start + self.images_per_shard, len(self.labels)))

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        present = self.out.files("shards")
        return [k for k in range(self.num_shards) if shard_name(k).removeprefix("shards/") not in present]


def plan_samples(
    out: Artifact, *, num_images: int, labels: str, num_classes: int, seed: int, images_per_shard: int
) -> SampleWork:
    """What is to be sampled, the same in every worker.

    Raises:
        ValueError: a listed class does not exist.
    """
    chosen = sample_labels(labels, num_images, num_classes, seed)
    return SampleWork(out, chosen, labels, num_classes, seed, images_per_shard)


def write_missing_samples(
    work: SampleWork, generator: Generator, *, rank: int = 0, world: int = 1, batch_size: int, progress: Progress
) -> None:
    """Sample this worker's share of the shards that are not there yet.

    Batch j always holds images j*batch_size and on, whatever shards they fall into, the last one padded: bytes depend
    neither on the number of workers nor on where a run was stopped.
    progress: images of this worker's shards and of those found finished (rank 0 counts these), of all.
    """
    missing, total = work.missing(), len(work.labels)
    kept = total - sum(len(work.indices(k)) for k in missing)
    done = kept if rank == 0 else 0
    progress(done, total)
    batches = _Batches(work, generator, min(batch_size, total))
    for k in work_share(missing, rank, world):
        indices = work.indices(k)

        def sampled(images: int, done: int = done, size: int = len(indices)) -> None:
            progress(done + min(images, size), total)

        pixels = batches.images(indices, sampled)
        work.out.write_bytes(shard_name(k), npz_bytes(images=pixels, labels=work.labels[indices.start : indices.stop]))
        done += len(indices)
        progress(done, total)


class _Batches:
    """Sampler batches at fixed places; the newest is kept for the next shard, which may begin in its middle."""

    def __init__(self, work: SampleWork, generator: Generator, size: int) -> None:
        self.work, self.generator, self.size = work, generator, size
        self._newest: tuple[int, np.ndarray] | None = None

    def images(self, indices: range, sampled: Callable[[int], None]) -> np.ndarray:
        """uint8 [N,H,W,3] of consecutive images; `sampled` is told how many are done, in parts of a batch."""
        first, last = indices.start // self.size, (indices.stop - 1) // self.size
        parts = []
        for j in range(first, last + 1):
            before = j * self.size - indices.start

            def step(number: int, steps: int, before: int = before) -> None:
                sampled(max(0, before + self.size * number // steps))

            low, high = max(0, indices.start - j * self.size), min(self.size, indices.stop - j * self.size)
            parts.append(self._batch(j, step)[low:high])
        return np.concatenate(parts)

    def _batch(self, j: int, step: Progress) -> np.ndarray:
        if self._newest is None or self._newest[0] != j:
            start = j * self.size
            labels = torch.zeros(self.size, dtype=torch.int64)
            wanted = torch.from_numpy(self.work.labels[start : start + self.size])
            labels[: len(wanted)] = wanted
            images = self.generator.sample(labels, seed=self.work.seed, first=start, progress=step)
            self._newest = j, images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return self._newest[1]


def sampler_settings(config: PipelineConfig) -> dict[str, Any]:
    """Fields of `SamplerSettings` as `generate` has them; the path is the checkpoint's."""
    section = config.generate
    return {
        "sampler": section.sampler,
        "steps": section.sampler_steps,
        "guidance": section.guidance,
        "interval": section.guidance_interval,
        "rounding": section.rounding,
        "mixed_precision": section.mixed_precision,
        "bn_inverse_without_eps": config.compat.bn_inverse_without_eps,
    }


def describe_generator(generator: Generator) -> dict[str, Any]:
    """What `samples.json` says of the networks and the sampler; JSON-able."""
    scale, bias = generator.sit.latent_stats()
    settings = generator.settings
    return {
        "sit": generator.sit.spec,
        "guide_sit": generator.guide.spec if generator.guide is not None else None,
        "sampler": settings.__dict__ | {"interval": list(settings.interval)},
        "scale": scale.tolist(),
        "bias": bias.tolist(),
    }


def finish_samples(
    work: SampleWork, description: Mapping[str, Any], *, grid_classes: int
) -> tuple[dict[str, Any], list[FileEntry]]:
    """Out of the shards: `samples.npz`, the grids and `samples.json`; returns that JSON and the shards' hashes.

    One shard is in memory at a time.
    """
    kept, entries = _Kept(work, grid_classes), []

    def images() -> Iterator[np.ndarray]:
        for k in range(work.num_shards):
            data = work.out.read_bytes(shard_name(k))
            digest = hashlib.sha256(data).hexdigest()
            entries.append(FileEntry(name=shard_name(k), bytes=len(data), sha256=digest))
            with np.load(io.BytesIO(data), allow_pickle=False) as shard:
                pixels = shard["images"]
            kept.take(work.indices(k), pixels)
            yield pixels

    with work.out.writer("samples.npz") as stream:
        write_sample_file(stream, len(work.labels), images())
    pixels, labels = kept.arrays()
    work.out.write_bytes("grid.png", png_bytes(class_grid(pixels, labels)))
    for label in kept.of_their_own:
        picture = one_class_grid(pixels[labels == label])
        work.out.write_bytes(f"grids/{label:04d}.png", png_bytes(picture))
    info = {
        "num_images": len(work.labels),
        "shards": work.num_shards,
        "labels": work.protocol,
        # `equal`: so many classes have one image more than the others.
        "label_remainder": len(work.labels) % work.num_classes if work.protocol == "equal" else None,
        "seed": work.seed,
    } | dict(description)
    work.out.write_json("samples.json", info)
    return info, entries


class _Kept:
    """The few samples that are shown: the first ones, in index order, of the first classes that occur."""

    def __init__(self, work: SampleWork, grid_classes: int) -> None:
        present = np.unique(work.labels).tolist()
        shown = present[: max(grid_classes, GRID_ROWS)]
        self.of_their_own = present[:grid_classes]
        self._labels, self._count = work.labels, Counter[int](dict.fromkeys(shown, 0))
        self._pixels: list[np.ndarray] = []
        self._chosen: list[int] = []

    def take(self, indices: range, pixels: np.ndarray) -> None:
        """Look at the images of these indices."""
        for index, image in zip(indices, pixels, strict=True):
            label = int(self._labels[index])
            if label in self._count and self._count[label] < OF_ONE_CLASS:
                self._count[label] += 1
                self._pixels.append(image.copy())
                self._chosen.append(label)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images [K,H,W,3] and labels [K]."""
        return np.stack(self._pixels), np.array(self._chosen, dtype=np.int64)


def shard_name(k: int) -> str:
    """File of shard k."""
    return f"shards/{k:05d}.npz"


def read_samples(artifact: Artifact, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,H,W,3] and their labels [N]."""
    loaded = [np.load(io.BytesIO(artifact.read_bytes(shard_name(k))), allow_pickle=False) for k in range(shards)]
    return np.concatenate([s["images"] for s in loaded]), np.concatenate([s["labels"] for s in loaded])
