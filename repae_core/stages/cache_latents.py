"""`cache-latents`: posterior mean and std of every image, with the encoders' features if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, LatentWriter
from repae_core.encoders import FrozenEncoder, build_encoder
from repae_core.models import KLVAE


@torch.no_grad()
def cache_latents(
    vae: KLVAE,
    images: ImageShards,
    out: Artifact,
    *,
    dtype: str,
    flip: bool,
    encoders: Sequence[str],
    encoder_weights: Sequence[str],
    encoder_grid: int | None,
    patch_size: int,
    spatial_norm: float | None,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Latent shard k mirrors image shard k; shards that exist already are kept. Returns the summary.

    encoder_grid: tokens a side of the features; None = the grid of a SiT of `patch_size` on these latents.

    Raises:
        ValueError: an encoder or its weights cannot be had.
    """
    grid = encoder_grid or images.resolution // vae.downsample_factor // patch_size
    networks = [
        build_encoder(name, path, grid=grid, spatial_norm=spatial_norm)
        for name, path in zip(encoders, encoder_weights or ("",) * len(encoders), strict=True)
    ]
    writer = LatentWriter(out, images, dtype=dtype, flip=flip, encoders=encoders, encoder_grid=grid)
    missing = writer.missing()
    done = len(images) - sum(len(images.shard_indices(k)) for k in missing)
    progress(done, len(images))
    for k in missing:
        parts: dict[str, list[Any]] = {}
        for chunk in torch.from_numpy(images.shard_indices(k)).split(batch_size):
            pixels = images.images(chunk.numpy())
            _encode(parts, vae, networks, pixels, suffix="")
            if flip:
                _encode(parts, vae, networks, pixels.flip(-1), suffix="_flip")
            done += len(chunk)
            progress(done, len(images))
        writer.write(k, **_joined(parts))
    return writer.finish()


def _encode(
    parts: dict[str, list[Any]], vae: KLVAE, networks: Sequence[FrozenEncoder], pixels: torch.Tensor, *, suffix: str
) -> None:
    posterior = vae.encode(pixels.float() / 127.5 - 1)
    parts.setdefault(f"mean{suffix}", []).append(posterior.mean)
    parts.setdefault(f"std{suffix}", []).append(posterior.std)
    parts.setdefault(f"features{suffix}", []).append([network(pixels) for network in networks])


def _joined(parts: dict[str, list[Any]]) -> dict[str, Any]:
    """Batches concatenated; features one tensor an encoder."""
    return {
        name: [torch.cat(of_encoder) for of_encoder in zip(*batches, strict=True)]
        if name.startswith("features")
        else torch.cat(batches)
        for name, batches in parts.items()
    }
