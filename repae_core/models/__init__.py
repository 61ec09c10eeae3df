"""SiT, the KL autoencoder and PatchGAN: compute only, no losses."""

from repae_core.models.discriminator import PatchGAN, build_discriminator
from repae_core.models.embeddings import drop_labels
from repae_core.models.gaussian import DiagonalGaussian
from repae_core.models.latent_norm import LatentNorm
from repae_core.models.sit import SiT, build_sit
from repae_core.models.vae import KLVAE, build_vae

__all__ = [
    "KLVAE",
    "DiagonalGaussian",
    "LatentNorm",
    "PatchGAN",
    "SiT",
    "build_discriminator",
    "build_sit",
    "build_vae",
    "drop_labels",
]
