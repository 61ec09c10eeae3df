"""KL divergence of the autoencoder's posterior from a standard normal."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Posterior(Protocol):
    """Anything with a per-image KL, summed over latent dimensions."""

    def kl(self) -> Tensor:
        """KL to N(0, 1), nats, [B]."""
        ...


def kl_loss(posterior: Posterior) -> Tensor:
    """KL in nats, summed over latent dimensions, averaged over the batch (system.md section 3.2)."""
    return posterior.kl().mean()
