"""SiT's embeddings of positions, time and class (system.md section 4)."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn


def sincos_position_table(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sin-cos table [grid*grid, width], float64, row-major tokens.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos].
    """
    if width % 4:
        raise ValueError(f"hidden_size={width} is not divisible by 4, as the 2-D sin-cos positions need")
    rows, columns = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64), indexing="ij")
    return np.concatenate([_sincos(width // 2, columns), _sincos(width // 2, rows)], axis=1)


def _sincos(width: int, positions: np.ndarray) -> np.ndarray:
    frequencies = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.reshape(-1), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def timestep_features(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features [B,width] = [cos | sin] of t [B], which is in [0,1] and not scaled by 1000."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return nn.functional.pad(features, (0, width % 2))


class PatchEmbedding(nn.Module):
    """Latents [B,C,H,W] -> tokens [B,T,D] by one strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed. Contiguous: the residual stream keeps the layout it starts with, and every norm would copy it."""
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """t [B] in [0,1] -> [B,D]."""

    def __init__(self, hidden_size: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Embed."""
        dtype = next(self.mlp.parameters()).dtype
        return cast(Tensor, self.mlp(timestep_features(t, self.features).to(dtype)))


class LabelEmbedder(nn.Module):
    """Class labels [B] -> [B,D]; the last row is the null class, present when labels are dropped in training."""

    def __init__(self, num_classes: int, hidden_size: int, *, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embed."""
        return self.embedding_table(y)


def drop_labels(
    y: Tensor,
    p: float,
    *,
    null_class: int,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Labels [B] with the null class in place of a share p of them; `mask` (bool [B]) says which ones instead."""
    if mask is None:
        mask = torch.rand(len(y), generator=generator, device=y.device) < p
    return torch.where(mask, null_class, y)
