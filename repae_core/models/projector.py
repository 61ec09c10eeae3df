"""Projectors from SiT's hidden tokens to an encoder's feature width."""

from __future__ import annotations

import math

from torch import Tensor, nn


def build_projector(kind: str, hidden_size: int, projector_dim: int, z_dim: int) -> nn.Module:
    """`mlp`: three linear layers with SiLU (REPA); `conv`: one 3x3 convolution (iREPA, arXiv 2512.10794)."""
    if kind == "conv":
        return ConvProjector(hidden_size, z_dim)
    if kind != "mlp":
        raise ValueError(f"projector={kind!r}; known: mlp, conv")
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


class ConvProjector(nn.Conv2d):
    """Tokens [B,T,D] on a square grid -> [B,T,z_dim] by one 3x3 convolution."""

    def __init__(self, hidden_size: int, z_dim: int) -> None:
        super().__init__(hidden_size, z_dim, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project."""
        b, t, d = tokens.shape
        side = math.isqrt(t)
        grid = tokens.transpose(1, 2).reshape(b, d, side, side)
        return super().forward(grid).flatten(2).transpose(1, 2)
