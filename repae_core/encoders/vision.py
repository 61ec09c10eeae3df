"""A frozen vision encoder: uint8 images in, patch features out."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_core.config.encoders import EncoderSpec
from repae_core.encoders.registry import encoder_spec
from repae_core.encoders.spatial_norm import spatial_normalize
from repae_core.encoders.weights import load_vision_transformer


class FrozenEncoder(nn.Module):
    """Patch features [B,T,C] of uint8 images [B,3,H,W], T = grid*grid tokens in row-major order.

    Frozen and always in eval mode. No class or register tokens.
    spatial_norm: iREPA's coefficient, applied to the features; None = off.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: EncoderSpec, *, grid: int, spatial_norm: float | None = None) -> None:
        super().__init__()
        self.network = network
        self.spec, self.grid, self.dim = spec, grid, spec.dim
        self.spatial_norm = spatial_norm
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,H,H] -> normalised fp32 [B,3,S,S], S = patch*grid, bicubic without antialias.

        Raises:
            ValueError: not uint8, not three channels, or not square.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"encoder input must be uint8 [B,3,H,W], not {images.dtype} {list(images.shape)}")
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"encoder input must be square, not {list(images.shape[2:])}")
        x = images.float() / 255
        if self.spec.normalize_first:
            return self._resize((x - self.mean) / self.std)
        return (self._resize(x) - self.mean) / self.std

    def _resize(self, x: Tensor) -> Tensor:
        side = self.spec.patch * self.grid
        if x.shape[-1] == side:
            return x
        return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,H,H] -> patch features [B,grid*grid,dim]."""
        network: Any = self.network
        tokens: Tensor = network.forward_features(self.prepare(images))  # [B, prefix + T, C]
        tokens = tokens[:, network.num_prefix_tokens :]
        if self.spec.final_norm and hasattr(network, "fc_norm"):
            tokens = network.fc_norm(tokens)  # where timm keeps the last norm of average-pooled models
        return tokens if self.spatial_norm is None else spatial_normalize(tokens, self.spatial_norm)


def build_encoder(
    name: str, weights: str | None = None, *, grid: int | None = None, spatial_norm: float | None = None
) -> FrozenEncoder:
    """The frozen encoder `name` for a grid of `grid` x `grid` tokens (SiT's grid side).

    grid: None = 16, that of 256-pixel images in every published model (`digits-vit`: 4).
    weights: a local or remote safetensors or .pth file in timm's or the original authors' layout (DINO, DINOv2,
    MoCo v3, MAE, OpenAI CLIP, I-JEPA), `#sha256=<hex>` behind it if known. None: timm's hub, for `digits-vit` the
    committed file. The position table is resampled once, here. `.dim` and `.grid` give the features' shape.
    spatial_norm: see `spatial_normalize`; None = off.

    Raises:
        ValueError: unknown name, unreadable or unfitting weights, or no weights and no network.
    """
    spec = encoder_spec(name)
    grid = spec.grid if grid is None else grid
    if grid < 1:
        raise ValueError(f"encoder grid must be at least 1, not {grid}")
    network = load_vision_transformer(name, spec, weights or None, grid=grid)
    if not spec.final_norm:
        network.norm = nn.Identity()
    return FrozenEncoder(network, spec, grid=grid, spatial_norm=spatial_norm)
