"""Encoders by name: those of the table, and any plain vision transformer of timm."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed

from repae_core.config.encoders import ENCODERS, EncoderSpec, require_encoder


def encoder_names() -> list[str]:
    """Names `build_encoder` knows, apart from `timm/<model>`."""
    return list(ENCODERS)


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of a table name or of `timm/<model>` (any plain vision transformer of timm).

    Raises:
        ValueError: unknown name, or a timm model without patch tokens.
    """
    require_encoder(name)
    return ENCODERS[name] if name in ENCODERS else _timm_spec(name.removeprefix("timm/"))


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
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # no such tag
        raise ValueError(f"unknown encoder 'timm/{model}': {error}") from None
    with torch.device("meta"):  # shapes only
        network: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    embedding = getattr(network, "patch_embed", None)
    # Of hybrids and convolutional stems the patch is no image patch; other models give no tokens of patches.
    if config is None or not isinstance(embedding, PatchEmbed) or not hasattr(network, "num_prefix_tokens"):
        raise ValueError(f"encoder 'timm/{model}' has no patch tokens: choose a plain vision transformer")
    assert embedding.patch_size[0] == embedding.patch_size[1]
    return EncoderSpec(
        architecture,
        tag or config.tag or "",
        network.num_features,
        embedding.patch_size[0],
        mean=tuple(config.mean),
        std=tuple(config.std),
    )
