"""The table of vision encoders: name -> architecture, input preparation, where features are taken."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from repae_core.digits.networks import VIT_DIM, VIT_PATCH

DIGITS_VIT = "digits-vit"


@dataclass(frozen=True)
class EncoderSpec:
    """One frozen encoder.

    architecture: timm's model name; hub: its weights' tag there, "" if timm's hub has none;
    dim: feature channels; patch: pixels; mean, std: of images in [0,1], one value a colour;
    normalize_first: normalise, then resize, or the other way round; final_norm: features after the last norm;
    grid: tokens a side unless said otherwise, those of the images it is meant for (256 pixels; digits: 32).
    """

    architecture: str
    hub: str
    dim: int
    patch: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    normalize_first: bool = True
    final_norm: bool = True
    grid: int = 16


_HALF = (0.5, 0.5, 0.5)

ENCODERS = {
    DIGITS_VIT: EncoderSpec("", "", VIT_DIM, VIT_PATCH, mean=_HALF, std=_HALF, grid=4),
    "dinov2-vit-b": EncoderSpec("vit_base_patch14_dinov2", "lvd142m", 768, 14),
    "dinov2-vit-l": EncoderSpec("vit_large_patch14_dinov2", "lvd142m", 1024, 14),
    "dinov2-vit-g": EncoderSpec("vit_giant_patch14_dinov2", "lvd142m", 1536, 14),
    "dinov1-vit-b": EncoderSpec("vit_base_patch16_224", "dino", 768, 16),
    "mocov3-vit-b": EncoderSpec("vit_base_patch16_224", "", 768, 16),
    "mocov3-vit-l": EncoderSpec("vit_large_patch16_224", "", 1024, 16),
    "mae-vit-l": EncoderSpec("vit_large_patch16_224", "mae", 1024, 16, final_norm=False),
    "clip-vit-L": EncoderSpec(
        "vit_large_patch14_clip_quickgelu_224",
        "openai",
        1024,
        14,
        mean=OPENAI_CLIP_MEAN,
        std=OPENAI_CLIP_STD,
        normalize_first=False,
        final_norm=False,
    ),
    "jepa-vit-h": EncoderSpec("vit_huge_patch14_gap_224", "in1k_ijepa", 1280, 14),
    "dinov3-vit-s": EncoderSpec("vit_small_patch16_dinov3", "lvd1689m", 384, 16),
    "dinov3-vit-b": EncoderSpec("vit_base_patch16_dinov3", "lvd1689m", 768, 16),
    "dinov3-vit-l": EncoderSpec("vit_large_patch16_dinov3", "lvd1689m", 1024, 16),
    "dinov3-vit-h": EncoderSpec("vit_huge_plus_patch16_dinov3", "lvd1689m", 1280, 16),
    "siglip2-vit-b": EncoderSpec("vit_base_patch16_siglip_256", "v2_webli", 768, 16, mean=_HALF, std=_HALF),
    "siglip2-vit-l": EncoderSpec("vit_large_patch16_siglip_256", "v2_webli", 1024, 16, mean=_HALF, std=_HALF),
    "siglip2-vit-so400m": EncoderSpec("vit_so400m_patch16_siglip_256", "v2_webli", 1152, 16, mean=_HALF, std=_HALF),
}


def encoder_names() -> list[str]:
    """Names `build_encoder` knows, apart from `timm/<model>`."""
    return list(ENCODERS)


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of a table name or of `timm/<model>` (any plain vision transformer of timm).

    Raises:
        ValueError: unknown name, or a timm model without patch tokens.
    """
    if name.startswith("timm/"):
        return _timm_spec(name.removeprefix("timm/"))
    if name not in ENCODERS:
        close = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown encoder {name!r}{hint}; known: {', '.join(ENCODERS)}, timm/<model>")
    return ENCODERS[name]


def encoder_dim(name: str) -> int:
    """Feature channels of an encoder, without loading weights; ValueError for an unknown name."""
    return encoder_spec(name).dim


def encoder_patch(name: str) -> int:
    """Patch side of an encoder in pixels, without loading weights; ValueError for an unknown name."""
    return encoder_spec(name).patch


@lru_cache
def _timm_spec(model: str) -> EncoderSpec:
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"unknown encoder 'timm/{model}': timm {timm.__version__} has no model {architecture!r}")
    config = timm.get_pretrained_cfg(model)
    with torch.device("meta"):  # shapes only
        network: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    patches = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if config is None or patches is None or not hasattr(network, "num_prefix_tokens"):
        raise ValueError(f"encoder 'timm/{model}' has no patch tokens: choose a plain vision transformer")
    assert patches[0] == patches[1]
    return EncoderSpec(
        architecture,
        tag or config.tag or "",
        network.num_features,
        patches[0],
        mean=tuple(config.mean),
        std=tuple(config.std),
    )
