"""Weights in and out: published REPA-E checkpoints, diffusers VAEs."""

from repae_core.interop.artifacts import (
    import_checkpoint,
    measured_statistics,
    reference_checkpoint,
    reference_vae_files,
)
from repae_core.interop.diffusers_vae import export_diffusers_vae, import_diffusers_vae
from repae_core.interop.reference_checkpoint import (
    ReferenceCheckpoint,
    load_reference_checkpoint,
    read_latent_stats,
    save_reference_checkpoint,
)
from repae_core.interop.vae_weights import load_vae_weights

__all__ = [
    "ReferenceCheckpoint",
    "export_diffusers_vae",
    "import_checkpoint",
    "import_diffusers_vae",
    "load_reference_checkpoint",
    "load_vae_weights",
    "measured_statistics",
    "read_latent_stats",
    "reference_checkpoint",
    "reference_vae_files",
    "save_reference_checkpoint",
]
