"""The table of vision encoders: name -> architecture, input preparation, where features are taken."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

DIGITS_VIT = "digits-vit"
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    normalize_first: bool = True
    final_norm: bool = True
    grid: int = 16


ENCODERS = {
    DIGITS_VIT: EncoderSpec("", "", 96, 8, mean=_HALF, std=_HALF, grid=4),
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
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
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


def require_encoder(name: str) -> None:
    """Refuse a name that is neither in the table nor `timm/<model>` (whether timm has that model is not looked up).

    Raises:
        ValueError: unknown name, with the nearest one.
    """
    if name not in ENCODERS and not name.startswith("timm/"):
        close = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown encoder {name!r}{hint}; known: {', '.join(ENCODERS)}, timm/<model>")
