"""The images of a `generate` artifact, read shard by shard."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.stages.generate import shard_name


class SampleShards:
    """Labels int64 [N] of all samples; images by their range. One shard's pixels are in memory, not those of all.

    shards: how many there are (`samples.json`).
    """

    def __init__(self, artifact: Artifact, shards: int) -> None:
        self.artifact = artifact
        labels = [self._labels(k) for k in range(shards)]
        self.labels = np.concatenate(labels)
        self._starts = np.cumsum([0] + [len(part) for part in labels])
        self._newest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, start: int, stop: int) -> Tensor:
        """Images start..stop-1, uint8 [B,3,H,W]."""
        first, last = (int(np.searchsorted(self._starts, i, side="right")) - 1 for i in (start, stop - 1))
        parts = []
        for k in range(first, last + 1):
            begin = int(self._starts[k])
            parts.append(self._pixels(k)[max(start - begin, 0) : stop - begin])
        return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Images start..stop-1 in batches."""
        for low in range(start, stop, batch_size):
            yield self.images(low, min(low + batch_size, stop))

    def _labels(self, k: int) -> np.ndarray:
        # Shards are not compressed: of the stream only the archive's directory and the labels are read.
        with self.artifact.reader(shard_name(k)) as stream, np.load(stream, allow_pickle=False) as shard:
            return np.asarray(shard["labels"])

    def _pixels(self, k: int) -> np.ndarray:
        if self._newest is None or self._newest[0] != k:
            self._newest = None  # first, so that never two are in memory
            with np.load(io.BytesIO(self.artifact.read_bytes(shard_name(k))), allow_pickle=False) as shard:
                self._newest = k, shard["images"]
        return self._newest[1]
