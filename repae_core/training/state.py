"""What a training step reads and changes: networks with their optimizers, EMA, objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repae_core.diffusion import Interpolant
from repae_core.losses import LeCamEMA
from repae_core.models import KLVAE, PatchGAN, SiT
from repae_core.training.distributed import Group
from repae_core.training.optim import Network
from repae_core.training.timing import PhaseTimer


@dataclass(frozen=True)
class Batch:
    """This worker's part of a global batch.

    images: uint8 [B,3,H,W] (joint step); latents: z [B,C,h,w] (latent-only step); labels: int64 [B];
    features: frozen encoders' patch tokens, one [B,T,C_k] an encoder.
    """

    labels: Tensor
    features: Sequence[Tensor]
    images: Tensor | None = None
    latents: Tensor | None = None

    def chunk(self, count: int) -> list[Batch]:
        """Equal parts, in order."""
        labels = self.labels.chunk(count)
        features = [list(of_part) for of_part in zip(*(f.chunk(count) for f in self.features), strict=True)]
        images = self.images.chunk(count) if self.images is not None else [None] * count
        latents = self.latents.chunk(count) if self.latents is not None else [None] * count
        return [Batch(*part) for part in zip(labels, features or [[]] * count, images, latents, strict=True)]


@dataclass(frozen=True)
class FlowObjective:
    """Settings of the SiT loss (system.md section 3.4).

    weighting: distribution of t, where a step draws it itself.
    accumulation_steps: micro-batches a worker splits its batch into; the result is that of one large batch.
    """

    interpolant: Interpolant
    weighting: str = "uniform"
    proj_coeff: float = 0.5
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    mixed_precision: str = "no"
    accumulation_steps: int = 1


@dataclass(frozen=True)
class JointObjective(FlowObjective):
    """Settings of the joint step's losses (system.md section 3.2-3.3).

    perceptual: images in [-1,1] (a, b) -> distance [B], or None.
    vae_mixed_precision: autocast of the VAE and the discriminator; their losses are fp32 in any case.
    vae_ema_decay: of the VAE's moving average, where the state has one.
    """

    perceptual: nn.Module | None = None
    reconstruction_loss: str = "l1"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    discriminator_weight: float = 0.1
    discriminator_start: int = 0
    lecam_weight: float = 0.0
    vae_align_proj_coeff: float = 1.5
    vae_mixed_precision: str = "no"
    vae_ema_decay: float = 0.0


@dataclass
class LDMState:
    """SiT, its moving average, and the steps it has taken (warm-up of the VAE not counted)."""

    group: Group
    sit: Network[SiT]
    ema: SiT
    step: int = 0
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def networks(self) -> dict[str, Network[Any]]:
        """Trained networks by name."""
        return {"sit": self.sit}

    def moving_averages(self, objective: FlowObjective) -> list[tuple[nn.Module, nn.Module, float]]:
        """(average, the module it follows, decay a step)."""
        return [(self.ema, self.sit.module, objective.ema_decay)]

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.group.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the networks' weights."""
        return self.sit.module.pos_embed.dtype


@dataclass
class JointState(LDMState):
    """The joint step's three networks."""

    vae: Network[KLVAE] = field(kw_only=True)
    discriminator: Network[PatchGAN] = field(kw_only=True)
    lecam: LeCamEMA | None = None
    vae_ema: KLVAE | None = None

    def networks(self) -> dict[str, Network[Any]]:
        """Trained networks by name."""
        return {"sit": self.sit, "vae": self.vae, "discriminator": self.discriminator}

    def moving_averages(self, objective: FlowObjective) -> list[tuple[nn.Module, nn.Module, float]]:
        """(average, the module it follows, decay a step)."""
        averages = super().moving_averages(objective)
        if self.vae_ema is not None and isinstance(objective, JointObjective):
            averages.append((self.vae_ema, self.vae.module, objective.vae_ema_decay))
        return averages


Metrics = dict[str, Tensor]
