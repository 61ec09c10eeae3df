"""Adversarial losses of the VAE (generator) and PatchGAN (discriminator), and LeCam's regulariser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repae_core.collectives import mean_over_ranks


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions; logits of any shape."""
    return -logits_fake.mean()


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss `0.5*(mean relu(1-D(x)) + mean relu(1+D(recon)))` (system.md section 3.3)."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


class LeCamEMA:
    """Moving averages of the mean logits of real images and of reconstructions, both starting at 0.

    Updated with the mean over all ranks where torch.distributed runs, so that every rank (and a checkpoint of
    one of them) holds the same values. They stay on the logits' device.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.values = torch.zeros(2)  # real, fake

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        """Move towards the mean logits of this step."""
        means = mean_over_ranks(torch.stack([logits_real.mean(), logits_fake.mean()]).float())
        self.values = self.values.to(means.device) * self.decay + means * (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        """`{"real": ..., "fake": ...}`, plain numbers."""
        real, fake = self.values.tolist()
        return {"real": real, "fake": fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` gave."""
        self.values = torch.tensor([state["real"], state["fake"]])


def lecam_loss(logits_real: Tensor, logits_fake: Tensor, ema_real: Tensor | float, ema_fake: Tensor | float) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, equation 5, on mean logits, one-sided), unweighted.

    `relu(mean D(x) - ema_fake)^2 + relu(ema_real - mean D(recon))^2` with the averages as they were before
    this step (`LeCamEMA.values`). The means are over all ranks, and so is the gradient.
    """
    mean_real, mean_fake = mean_over_ranks(torch.stack([logits_real.mean(), logits_fake.mean()]))
    return F.relu(mean_real - ema_fake).square() + F.relu(ema_real - mean_fake).square()
