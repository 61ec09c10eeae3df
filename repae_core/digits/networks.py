"""The small networks of the quick start: architectures, and the weights committed beside this file."""

from __future__ import annotations

from importlib.resources import as_file, files
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repae_core.config.encoders import DIGITS_VIT, ENCODERS
from repae_core.digits.data import NUM_CLASSES, SIZE

VIT_DIM, VIT_PATCH = ENCODERS[DIGITS_VIT].dim, ENCODERS[DIGITS_VIT].patch


class DigitCNN(nn.Module):
    """Digit classifier of five convolutions whose pooled 64 features and three taps other parts use."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 48, 64, 64)) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        strides = (1, 2, 1, 2, 1)  # 16, 8, 8, 4, 4 pixels for a 32x32 image
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
            )
            for (c_in, c_out), stride in zip(pairwise((12, *widths)), strides, strict=True)
        )
        self.head = nn.Linear(widths[-1], NUM_CLASSES)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Images float [B,3,H,W] in [-1,1], even sides -> activations after convolutions 1, 3 and 5."""
        x, taps = self.unshuffle(images), []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index % 2 == 0:
                taps.append(x)
        return taps

    def forward(self, images: Tensor) -> Tensor:
        """Images float [B,3,H,W] in [-1,1] -> logits [B,10]."""
        return cast(Tensor, self.head(self.taps(images)[-1].mean(dim=(2, 3))))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,H,W] -> pooled features fp32 [B,64], of the images resized to 32x32."""
        return self.taps(_prepare(images))[-1].mean(dim=(2, 3)).float()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,H,W] -> class logits fp32 [B,10], of the images resized to 32x32."""
        return cast(Tensor, self.head(self.features(images)))


def _prepare(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [B,3,H,W], not {images.dtype} {list(images.shape)}")
    x = images.float() / 127.5 - 1
    if x.shape[-2:] != (SIZE, SIZE):
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x


def digit_vit(*, img_size: int = SIZE, num_classes: int = 0) -> VisionTransformer:
    """The quick start's vision encoder: width 96, 4 blocks, 3 heads, patch 8; 4x4 tokens for 32x32 pixels."""
    return VisionTransformer(
        img_size=img_size, patch_size=VIT_PATCH, embed_dim=VIT_DIM, depth=4, num_heads=3, num_classes=num_classes
    )


def read_committed(name: str) -> dict[str, Tensor]:
    """State dict, in fp32, of a committed network: `vit`, `features` or `perceptual`.

    Raises:
        ValueError: the file is not in the installed package.
    """
    resource = files("repae_core.digits") / f"{name}.safetensors"
    if not resource.is_file():
        raise ValueError(f"repae_core/digits/{name}.safetensors is missing: python -m repae_core.digits.train")
    with as_file(resource) as path:
        state = load_file(path)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def load_digit_features() -> DigitCNN:
    """The metric's network, frozen, in eval mode: `.features(uint8 images)` -> [B,64]. In no loss."""
    return _load_cnn("features")


def load_digit_perceptual() -> DigitCNN:
    """The perceptual loss's network, frozen, in eval mode: `.taps(images in [-1,1])`. In no metric."""
    return _load_cnn("perceptual")


def _load_cnn(name: str) -> DigitCNN:
    network = DigitCNN()
    network.load_state_dict(read_committed(name))
    return network.eval().requires_grad_(False)
