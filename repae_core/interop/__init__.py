"""Weights in and out: diffusers VAEs."""

from repae_core.interop.diffusers_vae import export_diffusers_vae, import_diffusers_vae

__all__ = ["export_diffusers_vae", "import_diffusers_vae"]
