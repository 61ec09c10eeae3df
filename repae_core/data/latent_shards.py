"""Reading latent shards: posteriors and features of any image by its number, from memory where they fit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact, FileEntry
from repae_core.data.image_shards import ImageShards
from repae_core.data.latent_writer import INDEX, STATS
from repae_core.data.shard_cache import ShardCache

_HEADER_LENGTH = 8


class LatentShards:
    """Posterior mean and std, features and labels of a `cache-latents` artifact, in the order of its shards.

    memory_bytes: whole tensors are held in memory, in the order mean, std, mirrored ones, features, while they fit
    into this; the others are read row by row, those of a batch at the same time. shard_cache: where whole shards of a
    remote store are kept.

    Attributes: labels int64 [N], keys (N names, those of the images), class_names, num_classes, latent_shape
    (C, h, w), scale and bias (float64 [C]), flip (mirrored images are there), encoders (names), encoder_grid
    (tokens a side, or None), shard_starts, index (what `index.json` says).

    Raises:
        ValueError: the artifact holds no latents.
    """

    def __init__(self, artifact: Artifact, *, memory_bytes: int = 0, shard_cache: ShardCache | None = None) -> None:
        if not artifact.exists(INDEX) or not artifact.exists(STATS):
            raise ValueError(f"{artifact.uri} holds no latents; make them with `repae stage cache-latents`")
        self.artifact = artifact
        self.index: dict[str, Any] = artifact.read_json(INDEX)
        stats = artifact.read_json(STATS)
        self.scale = torch.tensor(stats["scale"], dtype=torch.float64)
        self.bias = torch.tensor(stats["bias"], dtype=torch.float64)
        self.class_names: list[str] = self.index["class_names"]
        self.num_classes: int = self.index["num_classes"]
        self.latent_shape: tuple[int, int, int] = tuple(self.index["latent_shape"])
        self.flip: bool = self.index["flip"]
        self.encoders: tuple[str, ...] = tuple(self.index["encoders"])
        self.encoder_grid: int | None = self.index["encoder_grid"]
        shards = self.index["shards"]
        sidecars = artifact.read_all_json([shard["sidecar"] for shard in shards])
        self.keys: list[str] = [key for sidecar in sidecars for key in sidecar["keys"]]
        self.labels = np.concatenate([np.asarray(sidecar["labels"], dtype=np.int64) for sidecar in sidecars])
        self._shard_cache = None if artifact.store.is_local else shard_cache
        self._files = [_TensorFile(artifact, FileEntry(**shard["file"]), self._shard_cache) for shard in shards]
        self._starts = np.cumsum([0] + [len(sidecar["keys"]) for sidecar in sidecars])
        self.shard_starts: tuple[int, ...] = tuple(self._starts[:-1].tolist())
        self._memory: dict[str, _InMemory] = {}
        self._plan_memory(memory_bytes)

    def __len__(self) -> int:
        return len(self.labels)

    def latents(self, indices: np.ndarray, flip_mask: np.ndarray | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior (mean, std) float32 [B, C, h, w]; of the mirrored image where `flip_mask` (bool [B]) says so.

        Raises:
            ValueError: mirrored latents are asked for and were not cached.
        """
        return self._rows("mean", "mean_flip", indices, flip_mask), self._rows("std", "std_flip", indices, flip_mask)

    def features(self, indices: np.ndarray, flip_mask: np.ndarray | Tensor | None = None) -> list[Tensor]:
        """Cached features float32 [B, T, C], one an encoder; [] when none were cached.

        Raises:
            ValueError: those of mirrored images are asked for and were not cached.
        """
        return [
            self._rows(f"features.{i}", f"features_flip.{i}", indices, flip_mask) for i in range(len(self.encoders))
        ]

    def require_same_images(self, images: ImageShards) -> None:
        """Before images are joined with latents by their number.

        Raises:
            ValueError: another artifact's images, other keys, or another label of a key; names the first.
        """
        made_of, given, keys, labels = self.index["images"], images.artifact.fingerprint, images.keys, images.labels
        if made_of != given:  # keys are positions in the source: other images may have the same
            raise ValueError(
                f"{self.artifact.uri}: the latents are of the images {made_of}, not of {given}: made of other images"
            )
        if len(keys) != len(self):
            raise ValueError(
                f"{self.artifact.uri} holds {len(self)} latents for {len(keys)} images: made of other images"
            )
        for i, (ours, theirs) in enumerate(zip(self.keys, keys, strict=True)):
            if ours != theirs or self.labels[i] != labels[i]:
                raise ValueError(
                    f"{self.artifact.uri}: latent {i} is of image {ours} with label {self.labels[i]}, but image {i} is "
                    f"{theirs} with label {labels[i]}; the latents were made of other images"
                )

    def _rows(self, name: str, mirrored: str, indices: np.ndarray, flip_mask: np.ndarray | Tensor | None) -> Tensor:
        indices = np.asarray(indices)
        rows = self._gather(name, indices)
        flips = np.flatnonzero(np.asarray(flip_mask)) if flip_mask is not None else ()
        if len(flips):
            if not self.flip:
                raise ValueError(f"{self.artifact.uri} holds no mirrored images; set cache_latents.flip=true")
            rows[torch.from_numpy(flips)] = self._gather(mirrored, indices[flips])
        return rows.float()

    def _gather(self, name: str, indices: np.ndarray) -> Tensor:
        """Stored rows [B, ...] of one tensor; a new tensor."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        if name in self._memory:
            return self._memory[name].rows(indices, shards, self._read_shard)
        rows = zip(shards.tolist(), (indices - self._starts[shards]).tolist(), strict=True)
        return torch.cat(self._read([self._files[shard].span(name, row, row + 1) for shard, row in rows]))

    def _read_shard(self, name: str, shard: int) -> tuple[int, Tensor]:
        start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
        return start, self._read([self._files[shard].span(name, 0, stop - start)])[0]

    def _read(self, spans: Sequence[_Span]) -> list[Tensor]:
        store = self.artifact.store
        if self._shard_cache is None:
            keys = [span.file.key for span in spans]
            blobs = store.read_ranges(keys, [span.first for span in spans], [span.length for span in spans])
        else:
            blobs = [span.file.read(span.first, span.length) for span in spans]
        for span, blob in zip(spans, blobs, strict=True):
            if len(blob) != span.length:
                raise ValueError(f"{store.uri(span.file.key)} is shorter than its header says")
        return [
            torch.frombuffer(bytearray(blob), dtype=span.dtype).view(span.shape)
            for span, blob in zip(spans, blobs, strict=True)
        ]

    def _plan_memory(self, budget: int) -> None:
        tensors: dict[str, tuple[list[int], str]] = self.index["tensors"]
        order = ["mean", "std", "mean_flip", "std_flip", *sorted(n for n in tensors if n.startswith("features"))]
        for name in (name for name in order if name in tensors):
            shape, dtype = tensors[name]
            size = len(self) * math.prod(shape) * getattr(torch, dtype).itemsize
            if size <= budget:
                budget -= size
                self._memory[name] = _InMemory(name, len(self), shape, getattr(torch, dtype), len(self._files))

    def __getstate__(self) -> dict[str, Any]:
        # Another process (a loader worker) starts with an empty memory of its own.
        return self.__dict__ | {"_memory": {name: memory.empty() for name, memory in self._memory.items()}}


class _InMemory:
    """One tensor over all shards, filled a shard at a time when first asked for."""

    def __init__(self, name: str, count: int, shape: Sequence[int], dtype: torch.dtype, shards: int) -> None:
        self._spec = (name, count, list(shape), dtype, shards)
        self._name = name
        self._values: Tensor | None = None
        self._filled = np.zeros(shards, dtype=bool)

    def empty(self) -> _InMemory:
        return _InMemory(*self._spec)

    def rows(self, indices: np.ndarray, shards: np.ndarray, read: Callable[[str, int], tuple[int, Tensor]]) -> Tensor:
        if self._values is None:
            _, count, shape, dtype, _ = self._spec
            self._values = torch.empty((count, *shape), dtype=dtype)
        for shard in np.unique(shards[~self._filled[shards]]):
            start, values = read(self._name, int(shard))
            self._values[start : start + len(values)] = values
            self._filled[shard] = True
        return self._values[torch.from_numpy(indices)]


class _Span(NamedTuple):
    """Bytes of consecutive rows in a file, and what they are."""

    file: _TensorFile
    first: int
    length: int
    shape: list[int]
    dtype: torch.dtype


class _TensorFile:
    """Where the rows of the tensors in one safetensors file lie."""

    def __init__(self, artifact: Artifact, entry: FileEntry, shard_cache: ShardCache | None) -> None:
        self._store, self.key = artifact.store, artifact.key(entry.name)
        self._entry, self._shard_cache = entry, shard_cache
        self._header: dict[str, Any] | None = None
        self._data = 0

    def span(self, name: str, start: int, stop: int) -> _Span:
        """Rows [start, stop) of one tensor."""
        if self._header is None:
            self._read_header()
        assert self._header is not None
        entry = self._header[name]
        shape, dtype = [stop - start, *entry["shape"][1:]], _DTYPES[entry["dtype"]]
        row = math.prod(shape[1:]) * dtype.itemsize
        first = self._data + entry["data_offsets"][0] + start * row
        return _Span(self, first, (stop - start) * row, shape, dtype)

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, through the cache of shards if there is one."""
        if self._shard_cache is None:
            return self._store.read_range(self.key, start, length)
        return self._shard_cache.read_range(self._store, self.key, self._entry, start, length)

    def _read_header(self) -> None:
        (length,) = struct.unpack("<Q", self.read(0, _HEADER_LENGTH))
        self._data = _HEADER_LENGTH + length
        self._header = json.loads(self.read(_HEADER_LENGTH, length))


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
