"""The networks in whose features images are compared: Inception-v3 of FID, DINOv2, any encoder, the digits' own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_core.config.encoders import ENCODERS
from repae_core.config.stages import require_extractor
from repae_core.digits.networks import load_digit_features
from repae_core.encoders import build_encoder
from repae_core.encoders.weights import load_vision_transformer
from repae_core.evaluation.inception import INCEPTION_SHA256, load_inception
from repae_core.remote_files import local_copy, sha256_of
from repae_core.weights import load_weights, read_state_dict

_DINOV2_GRID = 16  # 224 pixels in patches of 14


@dataclass(frozen=True)
class Features:
    """Of N images, fp32: features [N,D]; class logits [N,K] and spatial features [N,S] where the network has them."""

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@dataclass(frozen=True)
class FeatureExtractor:
    """uint8 images [N,3,H,W] -> Features.

    distance_name: what its Fréchet distance is called; only Inception's is "fid".
    weights_sha256: of the weights file; without one (committed weights, timm's hub) of the tensors in use.
    """

    name: str
    network: nn.Module
    extract: Callable[[Tensor], Features]
    weights_sha256: str = ""

    @property
    def distance_name(self) -> str:
        """Column of the Fréchet distance."""
        return "fid" if self.name == "inception" else f"fd_{self.name}"

    @property
    def published_weights(self) -> bool:
        """False for an Inception that is not the one every published FID is computed with."""
        return self.name != "inception" or self.weights_sha256 == INCEPTION_SHA256

    def to(self, device: torch.device) -> FeatureExtractor:
        """Compute on this device; results always come back to the CPU."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def batch(self, images: Tensor) -> Features:
        """Features of one batch, on the CPU."""
        device = next(self.network.parameters()).device
        found = self.extract(images.to(device))
        parts = (found.features, found.logits, found.spatial)
        return Features(*(None if part is None else part.float().cpu() for part in parts))  # type: ignore[arg-type]

    def __call__(self, batches: Iterable[Tensor]) -> Features:
        """Features of all batches, in order."""
        return join_features([self.batch(batch) for batch in batches])


def join_features(parts: list[Features]) -> Features:
    """Features of several batches as one."""

    def joined(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    return Features(joined("features"), joined("logits"), joined("spatial"))


def build_extractor(name: str, weights: str | None = None) -> FeatureExtractor:
    """`inception`, `dinov2` (ViT-L/14, class token), `digits`, or any vision encoder (mean of its patch tokens).

    weights: a local or remote file. None: the committed ones for `digits`, timm's hub for encoders; `inception` has
    no default, so that no other network ever takes its place.

    Raises:
        ValueError: unknown name, missing or unfitting weights; one line that names the file.
    """
    require_extractor(name)
    build = {"inception": _inception, "dinov2": _dinov2, "digits": _digits}.get(name)
    extractor = build(weights) if build else _encoder(name, weights)
    extractor.network.eval().requires_grad_(False)
    found = sha256_of(local_copy(weights)) if weights else _tensors_sha256(extractor.network)
    return replace(extractor, weights_sha256=found)


def _tensors_sha256(network: nn.Module) -> str:
    """Of names, shapes and values, in order of the names: what a hub serves under one name can change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _inception(weights: str | None) -> FeatureExtractor:
    network = load_inception(weights or "")
    return FeatureExtractor("inception", network, lambda images: Features(*network(images)))


def _digits(weights: str | None) -> FeatureExtractor:
    network = load_digit_features()
    if weights:
        load_weights(network, read_state_dict(weights), weights)

    def extract(images: Tensor) -> Features:
        features = network.features(images)
        return Features(features, network.head(features))

    return FeatureExtractor("digits", network, extract)


def _dinov2(weights: str | None) -> FeatureExtractor:
    """FD-DINOv2 (Stein et al. 2023): ViT-L/14's class token after the last norm, of images resized to 224."""
    spec = ENCODERS["dinov2-vit-l"]
    network: Any = load_vision_transformer("dinov2-vit-l", spec, weights, grid=_DINOV2_GRID)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    side = spec.patch * _DINOV2_GRID

    def extract(images: Tensor) -> Features:
        x = F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True, align_corners=False)
        x = (x - mean.to(x.device)) / std.to(x.device)
        return Features(network.forward_features(x)[:, 0])

    return FeatureExtractor("dinov2", network, extract)


def _encoder(name: str, weights: str | None) -> FeatureExtractor:
    encoder = build_encoder(name, weights)
    return FeatureExtractor(name, encoder, lambda images: Features(encoder(images).mean(dim=1)))
