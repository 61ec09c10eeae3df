"""Weights for a KL autoencoder from whatever published file holds them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from repae_core.interop.diffusers_vae import from_diffusers, is_diffusers_state
from repae_core.models import KLVAE
from repae_core.weights import load_weights, read_state_dict

# Original VA-VAE files carry these beside the autoencoder: losses, the foundation model and its projection.
_TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.")


def load_vae_weights(vae: KLVAE, path: str) -> None:
    """Load a VAE's file strictly: CompVis names (SD-VAE, IN-VAE, VA-VAE, E2E-VAEs), diffusers names, or the VAE in a
    published joint checkpoint; bare or under `state_dict`.

    Raises:
        ValueError: one line naming the file: unreadable, or names or shapes that do not fit.
    """
    state = autoencoder_part(read_state_dict(path, within=("state_dict", "vae")))
    load_weights(vae, from_diffusers(state, vae) if is_diffusers_state(state) else state, path)


def autoencoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the named parts that only the original training of VA-VAE needs; everything else stays."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_ONLY)}
