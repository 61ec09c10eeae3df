"""Sizes of the published architectures (system.md section 4), as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class SiTSize(NamedTuple):
    """Depth in blocks, width in channels, attention heads."""

    depth: int
    hidden_size: int
    num_heads: int


SIT_SIZES = {
    "Tiny": SiTSize(4, 128, 4),  # not published: the quick start's size for a CPU
    "S": SiTSize(12, 384, 6),
    "B": SiTSize(12, 768, 12),
    "L": SiTSize(24, 1024, 16),
    "XL": SiTSize(28, 1152, 16),
}

VAE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "f8d4": {
        "base_channels": 128,
        "channel_multipliers": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "latent_channels": 4,
        "attn_lowest": False,
        "norm_groups": 32,
        "quant_conv": True,
    },
    "f16d32": {
        "base_channels": 128,
        "channel_multipliers": (1, 1, 2, 2, 4),
        "num_res_blocks": 2,
        "latent_channels": 32,
        "attn_lowest": True,
        "norm_groups": 32,
        "quant_conv": True,
    },
}


def parse_sit_name(name: str) -> tuple[SiTSize, int]:
    """`SiT-B/2` -> (size, patch); ValueError naming the known sizes otherwise."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if not name.startswith("SiT-") or size not in SIT_SIZES or patch not in ("1", "2", "4", "8"):
        raise ValueError(f"unknown model {name!r}; known: SiT-{{{','.join(SIT_SIZES)}}}/{{1,2,4,8}}")
    return SIT_SIZES[size], int(patch)


def diffusers_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our VAE's numbers for the `config.json` of a diffusers `AutoencoderKL` (SD, SD 3.5, FLUX and their like).

    Raises:
        ValueError: an entry that our autoencoder cannot express, or that is missing.
    """
    if not isinstance(config, Mapping):
        raise ValueError("not the settings of a model")
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"_class_name is {config.get('_class_name')!r}, not 'AutoencoderKL'")
    missing = [name for name in ("block_out_channels", "layers_per_block", "latent_channels") if name not in config]
    if missing:
        raise ValueError(f"no {missing[0]}")
    widths = config["block_out_channels"]
    down = config.get("down_block_types", ["DownEncoderBlock2D"] * len(widths))
    attentive = [name.startswith("Attn") for name in down]
    quant, post_quant = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    refusals = {
        "block_out_channels": any(width % widths[0] for width in widths),
        "down_block_types": any(attentive[:-1]) or not all(name.endswith("DownEncoderBlock2D") for name in down),
        "use_post_quant_conv": quant != post_quant,
        "mid_block_add_attention": not config.get("mid_block_add_attention", True),
        "act_fn": config.get("act_fn", "silu") != "silu",
        "in_channels": config.get("in_channels", 3) != 3 or config.get("out_channels", 3) != 3,
    }
    for name, refused in refusals.items():
        if refused:
            raise ValueError(f"{name}={config.get(name)} is not supported")
    return {
        "base_channels": widths[0],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "attn_lowest": attentive[-1],
        "norm_groups": config.get("norm_num_groups", 32),
        "quant_conv": quant,
    }
