"""Latent statistics measured on a VAE (system.md section 3, "Measured")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from repae_core.data import ImageShards, LatentStatistics
from repae_core.models import KLVAE


@torch.no_grad()
def measure_latents(
    vae: KLVAE,
    images: ImageShards,
    indices: np.ndarray,
    *,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-channel (scale, bias) of sampled z over these images, float64 (system.md section 3, "Measured")."""
    device = next(vae.parameters()).device
    statistics = LatentStatistics(vae.latent_channels)
    for start in range(0, len(indices), batch_size):
        pixels = images.images(indices[start : start + batch_size]).to(device)
        posterior = vae.encode(pixels.float() / 127.5 - 1)
        statistics.update(posterior.mean, posterior.std)
        if progress:
            progress(min(start + batch_size, len(indices)), len(indices))
    return statistics.scale(), statistics.bias()
