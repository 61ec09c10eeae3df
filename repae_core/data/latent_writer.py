"""Writing latent shards: shard k holds the posteriors of the images of image shard k, in the same order.

latents/00000.safetensors   mean, std [n,C,h,w], labels [n]; optional mean_flip, std_flip (of the mirrored
                            images), features.0 ... and features_flip.0 ... [n,T,C] (float16)
latents/00000.json          written after it, its commit marker: bytes and sha256, keys, labels, statistics
latent_stats.json           scale and bias per channel of sampled latents, over all images (not the mirrored)
index.json                  what there is, written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from repae_core.artifacts import Artifact, FileEntry
from repae_core.data.image_shards import ImageShards
from repae_core.data.latent_statistics import LatentStatistics

INDEX = "index.json"
STATS = "latent_stats.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def latent_shard_name(k: int) -> str:
    """The tensors of latent shard k."""
    return f"latents/{k:05d}.safetensors"


def latent_sidecar_name(k: int) -> str:
    """The commit marker of latent shard k."""
    return f"latents/{k:05d}.json"


def write_latent_shard(
    artifact: Artifact,
    k: int,
    *,
    keys: Sequence[str],
    labels: np.ndarray,
    mean: Tensor,
    std: Tensor,
    dtype: str = "float32",
    mean_flip: Tensor | None = None,
    std_flip: Tensor | None = None,
    features: Sequence[Tensor] = (),
    features_flip: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """Write one shard and its sidecar, which is returned.

    keys, labels: of the n images; mean, std and their mirrored forms: [n, C, h, w], stored as `dtype`;
    features: one [n, T, C] an encoder, stored as float16. Statistics are those of the stored (rounded) values.

    Raises:
        ValueError: a tensor has another number of images, or values that are not finite in the stored type.
    """
    tensors = {"mean": mean, "std": std}
    if mean_flip is not None and std_flip is not None:
        tensors |= {"mean_flip": mean_flip, "std_flip": std_flip}
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    for prefix, group in (("features", features), ("features_flip", features_flip)):
        tensors |= {f"{prefix}.{i}": feature.to(LatentWriter.feature_dtype) for i, feature in enumerate(group)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _require_sound(tensors, k, len(keys))
    statistics = LatentStatistics(mean.shape[1])
    statistics.update(tensors["mean"], tensors["std"])
    tensors["labels"] = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    assert len(tensors["labels"]) == len(keys)
    with artifact.writer(latent_shard_name(k)) as stream:
        stream.write(save(tensors))
    entry = FileEntry(name=latent_shard_name(k), bytes=stream.bytes, sha256=stream.sha256)
    sidecar = {
        "file": entry.model_dump(),
        "keys": list(keys),
        "labels": tensors["labels"].tolist(),
        "statistics": statistics.state(),
        "tensors": {
            name: [list(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in sorted(tensors.items())
        },
    }
    artifact.write_json(latent_sidecar_name(k), sidecar)
    return sidecar


def _require_sound(tensors: Mapping[str, Tensor], k: int, count: int) -> None:
    for name, tensor in tensors.items():
        if len(tensor) != count:
            raise ValueError(f"latent shard {k}: {name} holds {len(tensor)} images, expected {count}")
        if not torch.isfinite(tensor).all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"latent shard {k}: {name} has values that are not finite as {kind}")


class LatentWriter:
    """Fills a `cache-latents` artifact shard by shard; shards of an interrupted run are kept.

    images: whose order, keys and labels the latents follow. encoders, encoder_grid: names of the encoders whose
    features are given, and their tokens a side; recorded for the reader.
    """

    feature_dtype = torch.float16

    def __init__(
        self,
        artifact: Artifact,
        images: ImageShards,
        *,
        dtype: str = "float32",
        flip: bool = False,
        encoders: Sequence[str] = (),
        encoder_grid: int | None = None,
    ) -> None:
        assert dtype in DTYPES
        self.artifact, self.images = artifact, images
        self.dtype, self.flip = dtype, flip
        self.encoders, self.encoder_grid = tuple(encoders), encoder_grid if encoders else None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one stored value of mean or std."""
        return DTYPES[self.dtype].itemsize

    def missing(self) -> list[int]:
        """Shards still to be written; those whose images were all skipped have no latents and are left out."""
        files = self.artifact.files()
        started = [k for k in self._filled() if {latent_shard_name(k), latent_sidecar_name(k)} <= files.keys()]
        sidecars = self.artifact.read_all_json([latent_sidecar_name(k) for k in started])
        written = {
            k for k, sidecar in zip(started, sidecars, strict=True)
            if sidecar["file"]["bytes"] == files[latent_shard_name(k)]
        }  # fmt: skip
        return [k for k in self._filled() if k not in written]

    def _filled(self) -> list[int]:
        return [k for k in range(self.images.num_shards) if len(self.images.shard_indices(k))]

    def write(
        self,
        k: int,
        *,
        mean: Tensor,
        std: Tensor,
        mean_flip: Tensor | None = None,
        std_flip: Tensor | None = None,
        features: Sequence[Tensor] = (),
        features_flip: Sequence[Tensor] = (),
    ) -> None:
        """Write shard k from the posteriors of `images.shard_indices(k)`, in that order; see write_latent_shard."""
        assert (mean_flip is not None) == (std_flip is not None) == self.flip
        assert len(features) == len(self.encoders)
        assert len(features_flip) == (len(self.encoders) if self.flip else 0)
        indices = self.images.shard_indices(k)
        write_latent_shard(
            self.artifact,
            k,
            keys=[self.images.keys[i] for i in indices],
            labels=self.images.labels[indices],
            mean=mean,
            std=std,
            dtype=self.dtype,
            mean_flip=mean_flip,
            std_flip=std_flip,
            features=features,
            features_flip=features_flip,
        )

    def finish(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write `latent_stats.json`, then `index.json`; returns the summary for the manifest.

        given: contents of `latent_stats.json` in place of statistics of these latents.
        Statistics are merged in the order of the shards, so they do not depend on who wrote which shard.
        """
        names = [latent_sidecar_name(k) for k in self._filled()]
        sidecars = dict(zip(self._filled(), self.artifact.read_all_json(names), strict=True))
        tensors = next(iter(sidecars.values()))["tensors"]
        statistics = LatentStatistics(tensors["mean"][0][0])
        for sidecar in sidecars.values():
            assert sidecar["tensors"] == tensors
            statistics.merge(LatentStatistics.from_state(sidecar["statistics"]))
        measured = {
            "scale": statistics.scale().tolist(),
            "bias": statistics.bias().tolist(),
            "images": len(self.images),
        }
        stats = dict(given or measured)
        self.artifact.write_json(STATS, stats)
        summary = {
            "num_images": len(self.images),
            "num_classes": self.images.num_classes,
            "latent_shape": tensors["mean"][0],
            "dtype": self.dtype,
            "flip": self.flip,
            "encoders": list(self.encoders),
            "encoder_grid": self.encoder_grid,
        }
        shards = [
            {"file": sidecar["file"], "sidecar": latent_sidecar_name(k), "num_images": len(sidecar["keys"])}
            for k, sidecar in sidecars.items()
        ]
        index = summary | {
            "images": self.images.artifact.fingerprint,
            "class_names": self.images.class_names,
            "tensors": tensors,
            "shards": shards,
        }
        self.artifact.write_json(INDEX, index)
        return summary | stats | {"bytes": sum(shard["file"]["bytes"] for shard in shards)}
