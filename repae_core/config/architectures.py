"""Sizes of the published architectures (system.md section 4), as plain numbers."""

from __future__ import annotations

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
    },
    "f16d32": {
        "base_channels": 128,
        "channel_multipliers": (1, 1, 2, 2, 4),
        "num_res_blocks": 2,
        "latent_channels": 32,
        "attn_lowest": True,
        "norm_groups": 32,
    },
}


def parse_sit_name(name: str) -> tuple[SiTSize, int]:
    """`SiT-B/2` -> (size, patch); ValueError naming the known sizes otherwise."""
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if not name.startswith("SiT-") or size not in SIT_SIZES or patch not in ("1", "2", "4", "8"):
        raise ValueError(f"unknown model {name!r}; known: SiT-{{{','.join(SIT_SIZES)}}}/{{1,2,4,8}}")
    return SIT_SIZES[size], int(patch)
