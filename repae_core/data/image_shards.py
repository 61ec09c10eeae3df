"""Reading image shards: any image by its number, straight from the tar."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repae_core.artifacts import Artifact
from repae_core.data.shards import INDEX

GIB = 2**30
_READ_THREADS = 16


class ImageShards(Dataset[tuple[Tensor, int]]):
    """Images, labels and keys of a `preprocess` artifact, in the order of its shards.

    Map-style: `dataset[i]` is (uint8 [3, H, W], label), so a torch DataLoader can use it; `images` reads a batch.
    cache_bytes: decoded images are kept in memory when all of them fit into this.

    Attributes: labels int64 [N], keys (N names, position in the sorted source), class_names, num_classes,
    resolution, num_shards, index (what `index.json` says).

    Raises:
        ValueError: the artifact holds no image shards.
    """

    def __init__(self, artifact: Artifact, *, cache_bytes: int = 2 * GIB) -> None:
        if not artifact.exists(INDEX):
            raise ValueError(f"{artifact.uri} holds no image shards; make them with `repae stage preprocess`")
        self.artifact = artifact
        self.index: dict[str, Any] = artifact.read_json(INDEX)
        self.resolution: int = self.index["resolution"]
        self.class_names: list[str] = self.index["class_names"]
        self.num_classes: int = self.index["num_classes"]
        shards = self.index["shards"]
        self.num_shards = len(shards)
        self._tars = [shard["tar"]["name"] for shard in shards]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            sidecars = list(pool.map(artifact.read_json, [shard["sidecar"] for shard in shards]))
        self.keys: list[str] = [key for sidecar in sidecars for key in sidecar["keys"]]
        self.labels = _column(sidecars, "labels")
        self._offsets, self._sizes = _column(sidecars, "offsets"), _column(sidecars, "sizes")
        self._starts = np.cumsum([0] + [len(sidecar["keys"]) for sidecar in sidecars])
        self._fits = len(self) * 3 * self.resolution**2 <= cache_bytes
        self._cache: Tensor | None = None
        self._cached = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images(np.array([i]))[0], int(self.labels[i])

    def shard_indices(self, k: int) -> np.ndarray:
        """Numbers of the images in shard k, int64."""
        return np.arange(self._starts[k], self._starts[k + 1])

    def images(self, indices: np.ndarray) -> Tensor:
        """Images uint8 [B, 3, H, W], RGB, decoded anew or from memory.

        Raises:
            ValueError: a stored image is damaged; names the shard and the key.
        """
        indices = np.asarray(indices)
        if not self._fits:
            return torch.stack([self._decode(i) for i in indices])
        if self._cache is None:
            self._cache = torch.empty((len(self), 3, self.resolution, self.resolution), dtype=torch.uint8)
        for i in indices[~self._cached[indices]]:
            self._cache[i] = self._decode(i)
            self._cached[i] = True
        return self._cache[torch.from_numpy(indices)]

    def _decode(self, i: int) -> Tensor:
        tar = self._tars[np.searchsorted(self._starts, i, side="right") - 1]
        blob = self.artifact.store.read_range(self.artifact.key(tar), int(self._offsets[i]), int(self._sizes[i]))
        try:
            pixels = np.array(Image.open(io.BytesIO(blob)))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.artifact.uri}/{tar}: image {self.keys[i]} is damaged: {error}") from None
        assert pixels.shape == (self.resolution, self.resolution, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        # Another process (a loader worker) starts with an empty memory of its own.
        return self.__dict__ | {"_cache": None, "_cached": np.zeros(len(self), dtype=bool)}


def _column(sidecars: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(sidecar[name], dtype=np.int64) for sidecar in sidecars])
