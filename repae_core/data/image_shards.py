"""Reading image shards: any image by its number, straight from the tar."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repae_core.artifacts import Artifact, FileEntry
from repae_core.data.shard_cache import ShardCache
from repae_core.data.shards import INDEX


class ImageShards(Dataset[tuple[Tensor, int]]):
    """Images, labels and keys of a `preprocess` artifact, in the order of its shards.

    Map-style: `dataset[i]` is (uint8 [3, H, W], label), so a torch DataLoader can use it; `images` reads a batch.
    memory_bytes: decoded images are kept in memory when all of them fit into this. shard_cache: where whole shards of
    a remote store are kept; without it images are read by byte ranges, those of a batch at the same time.

    Attributes: labels int64 [N], keys (N names, position in the sorted source), class_names, num_classes,
    resolution, num_shards, shard_starts, index (what `index.json` says).

    Raises:
        ValueError: the artifact holds no image shards.
    """

    def __init__(self, artifact: Artifact, *, memory_bytes: int = 0, shard_cache: ShardCache | None = None) -> None:
        if not artifact.exists(INDEX):
            raise ValueError(f"{artifact.uri} holds no image shards; make them with `repae stage preprocess`")
        self.artifact = artifact
        self.index: dict[str, Any] = artifact.read_json(INDEX)
        self.resolution: int = self.index["resolution"]
        self.class_names: list[str] = self.index["class_names"]
        self.num_classes: int = self.index["num_classes"]
        shards = self.index["shards"]
        self.num_shards = len(shards)
        self._tars = [FileEntry(**shard["tar"]) for shard in shards]
        sidecars = artifact.read_all_json([shard["sidecar"] for shard in shards])
        self.keys: list[str] = [key for sidecar in sidecars for key in sidecar["keys"]]
        self.labels = _column(sidecars, "labels")
        self._offsets, self._sizes = _column(sidecars, "offsets"), _column(sidecars, "sizes")
        self._starts = np.cumsum([0] + [len(sidecar["keys"]) for sidecar in sidecars])
        self.shard_starts: tuple[int, ...] = tuple(self._starts[:-1].tolist())
        self._shard_cache = None if artifact.store.is_local else shard_cache
        self._fits = len(self) * 3 * self.resolution**2 <= memory_bytes
        self._memory: Tensor | None = None
        self._held = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        number = range(len(self))[i]  # IndexError beyond the end; negative numbers count from it
        return self.images(np.array([number]))[0], int(self.labels[number])

    @property
    def content_sha256(self) -> str:
        """Of the shards' hashes: the manifest holds times, so there equal images have different hashes."""
        shards = [tar.sha256 for tar in self._tars]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def shard_indices(self, k: int) -> np.ndarray:
        """Numbers of the images in shard k, int64."""
        return np.arange(self._starts[k], self._starts[k + 1])

    def images(self, indices: np.ndarray, flip_mask: np.ndarray | None = None) -> Tensor:
        """Images uint8 [B, 3, H, W], RGB, decoded anew or from memory; mirrored where `flip_mask` (bool [B]) says so.

        Raises:
            ValueError: a stored image is damaged; names the shard and the key.
        """
        pixels = self._upright(np.asarray(indices))
        if flip_mask is not None:
            rows = torch.from_numpy(np.flatnonzero(flip_mask))
            pixels[rows] = pixels[rows].flip(-1)
        return pixels

    def _upright(self, indices: np.ndarray) -> Tensor:
        if not self._fits:
            return self._decoded(indices)
        if self._memory is None:
            self._memory = torch.empty((len(self), 3, self.resolution, self.resolution), dtype=torch.uint8)
        absent = np.unique(indices[~self._held[indices]])
        if len(absent):
            self._memory[torch.from_numpy(absent)] = self._decoded(absent)
            self._held[absent] = True
        return self._memory[torch.from_numpy(indices)]

    def _decoded(self, indices: np.ndarray) -> Tensor:
        """uint8 [B, 3, H, W]."""
        pixels = np.empty((len(indices), self.resolution, self.resolution, 3), dtype=np.uint8)
        for row, (i, blob) in enumerate(zip(indices, self._blobs(indices), strict=True)):
            try:
                pixels[row] = np.asarray(Image.open(io.BytesIO(blob)))
            except (OSError, SyntaxError, ValueError) as error:
                reason = str(error).split("<_io")[0].strip()  # without the address of the bytes in memory
                raise ValueError(
                    f"{self.artifact.uri}/{self._tar(i).name}: image {self.keys[i]} is damaged: {reason}"
                ) from None
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _blobs(self, indices: np.ndarray) -> list[bytes]:
        """The encoded images."""
        store, tars = self.artifact.store, [self._tar(i) for i in indices]
        keys = [self.artifact.key(tar.name) for tar in tars]
        offsets, sizes = self._offsets[indices].tolist(), self._sizes[indices].tolist()
        if self._shard_cache is None:
            return store.read_ranges(keys, offsets, sizes)
        cache = self._shard_cache
        return [cache.read_range(store, *where) for where in zip(keys, tars, offsets, sizes, strict=True)]

    def _tar(self, i: int) -> FileEntry:
        return self._tars[np.searchsorted(self._starts, i, side="right") - 1]

    def __getstate__(self) -> dict[str, Any]:
        # Another process (a loader worker) starts with an empty memory of its own.
        return self.__dict__ | {"_memory": None, "_held": np.zeros(len(self), dtype=bool)}


def _column(sidecars: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(sidecar[name], dtype=np.int64) for sidecar in sidecars])
