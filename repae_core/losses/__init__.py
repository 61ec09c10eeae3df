"""What the networks are trained to minimise: tensors in, scalars out (system.md section 3)."""

from repae_core.losses.adversarial import LeCamEMA, generator_loss, hinge_discriminator_loss, lecam_loss
from repae_core.losses.alignment import alignment_loss
from repae_core.losses.flow_matching import flow_matching_loss
from repae_core.losses.kl import kl_loss
from repae_core.losses.perceptual import build_perceptual
from repae_core.losses.reconstruction import reconstruction_loss

__all__ = [
    "LeCamEMA",
    "alignment_loss",
    "build_perceptual",
    "flow_matching_loss",
    "generator_loss",
    "hinge_discriminator_loss",
    "kl_loss",
    "lecam_loss",
    "reconstruction_loss",
]
