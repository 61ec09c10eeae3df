"""Frozen vision encoders whose patch features SiT is aligned with (system.md section 4)."""

from repae_core.encoders.registry import encoder_dim, encoder_names, encoder_patch
from repae_core.encoders.spatial_norm import spatial_normalize
from repae_core.encoders.vision import FrozenEncoder, build_encoder

__all__ = [
    "FrozenEncoder",
    "build_encoder",
    "encoder_dim",
    "encoder_names",
    "encoder_patch",
    "spatial_normalize",
]
