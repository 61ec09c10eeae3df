"""`cache-latents`: posterior mean and std of every image, with the encoders' features if asked."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, LatentWriter, Selection, load_batches, work_share
from repae_core.encoders import FrozenEncoder, build_encoder, encoder_dim
from repae_core.models import KLVAE

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LatentWork:
    """All latent shards of one data set: shard k holds the images of image shard k, whoever encodes them."""

    vae: KLVAE
    images: ImageShards
    writer: LatentWriter
    encoder_weights: Sequence[str]


def plan_latents(
    vae: KLVAE,
    images: ImageShards,
    out: Artifact,
    *,
    dtype: str,
    flip: bool,
    encoders: Sequence[str] = (),
    encoder_weights: Sequence[str] = (),
    encoder_grid: int | None = None,
    patch_size: int = 1,
) -> LatentWork:
    """What is to be encoded, the same in every worker.

    encoder_grid: tokens a side of the features; None = the grid of a SiT of `patch_size` on these latents.
    """
    grid = encoder_grid or images.resolution // vae.downsample_factor // patch_size
    writer = LatentWriter(out, images, dtype=dtype, flip=flip, encoders=encoders, encoder_grid=grid)
    return LatentWork(vae, images, writer, encoder_weights or ("",) * len(encoders))


def cache_size(work: LatentWork) -> dict[str, int]:
    """Bytes of the whole cache: `latents` and `features`."""
    writer = work.writer
    side = work.images.resolution // work.vae.downsample_factor
    mirrored = 2 if writer.flip else 1
    values = 2 * work.vae.latent_channels * side**2  # mean and std
    tokens = (writer.encoder_grid or 0) ** 2
    features = sum(tokens * encoder_dim(name) for name in writer.encoders)
    images = len(work.images) * mirrored
    return {
        "latents": images * values * writer.dtype_bytes,
        "features": images * features * writer.feature_dtype.itemsize,
    }


def require_space(work: LatentWork) -> None:
    """Say how large the cache will be; before any work.

    Raises:
        ValueError: a local store has less free space than the shards still to be written take.
    """
    size, writer = cache_size(work), work.writer
    total = sum(size.values())
    logger.info(
        "latents take %s, features of %s %s",
        _gigabytes(size["latents"]), ", ".join(writer.encoders) or "no encoder", _gigabytes(size["features"]),
    )  # fmt: skip
    store = writer.artifact.store
    if not store.is_local:
        return
    missing = sum(len(work.images.shard_indices(k)) for k in writer.missing())
    needed = total * missing // len(work.images)
    free = shutil.disk_usage(store.local_root()).free
    if needed > free:
        raise ValueError(
            f"store {store.url} has {_gigabytes(free)} free, the latent cache needs {_gigabytes(needed)} "
            f"({_gigabytes(size['features'])} of all for features); free some, or leave cache_latents.encoder empty"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"


@torch.no_grad()
def write_missing_latents(
    work: LatentWork,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    batch_size: int,
    loader_workers: int = 0,
    progress: Progress,
) -> None:
    """Encode this worker's share of the shards that are not there yet. Batches never span shards.

    progress: images of this worker's shards and of those found finished (rank 0 counts these), of all.

    Raises:
        ValueError: an encoder or its weights cannot be had.
    """
    device = device or torch.device("cpu")
    vae, images, writer = work.vae.to(device), work.images, work.writer
    networks = [
        build_encoder(name, path, grid=writer.encoder_grid or 0).to(device)
        for name, path in zip(writer.encoders, work.encoder_weights, strict=True)
    ]
    missing = writer.missing()
    kept = len(images) - sum(len(images.shard_indices(k)) for k in missing)
    done = kept if rank == 0 else 0
    progress(done, len(images))
    missing = work_share(missing, rank, world)
    selections = [part for k in missing for part in _batches(images.shard_indices(k), batch_size)]
    pixels = load_batches(images.images, selections, workers=loader_workers)
    for k in missing:
        parts: dict[str, list[Any]] = {}
        for chunk in _batches(images.shard_indices(k), batch_size):
            batch = next(pixels).to(device)
            _encode(parts, vae, networks, batch, writer, suffix="")
            if writer.flip:
                _encode(parts, vae, networks, batch.flip(-1), writer, suffix="_flip")
            done += len(chunk.indices)
            progress(done, len(images))
        writer.write(k, **_joined(parts))


def _batches(indices: np.ndarray, batch_size: int) -> Iterator[Selection]:
    for start in range(0, len(indices), batch_size):
        yield Selection(indices[start : start + batch_size])


def _encode(
    parts: dict[str, list[Any]],
    vae: KLVAE,
    networks: Sequence[FrozenEncoder],
    pixels: Tensor,
    writer: LatentWriter,
    *,
    suffix: str,
) -> None:
    posterior = vae.encode(pixels.float() / 127.5 - 1)
    parts.setdefault(f"mean{suffix}", []).append(posterior.mean.cpu())
    parts.setdefault(f"std{suffix}", []).append(posterior.std.cpu())
    # In the stored type at once: a shard's features in fp32 would be gigabytes.
    features = [network(pixels).to(writer.feature_dtype).cpu() for network in networks]
    parts.setdefault(f"features{suffix}", []).append(features)


def _joined(parts: dict[str, list[Any]]) -> dict[str, Any]:
    """Batches concatenated, features one tensor an encoder; `parts` is emptied: all of both would be a shard twice."""
    joined: dict[str, Any] = {}
    while parts:
        name, batches = parts.popitem()
        if name.startswith("features"):
            of_encoders = [list(of_encoder) for of_encoder in zip(*batches, strict=True)]
            batches.clear()
            joined[name] = [torch.cat(of_encoders.pop(0)) for _ in range(len(of_encoders))]
        else:
            joined[name] = torch.cat(batches)
    return joined
