"""The VAE's posterior: a diagonal Gaussian a latent element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussian:
    """Posterior from moments [B,2C,H,W] = [mean | logvar]; logvar is clamped to [-30, 20]."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation [B,C,H,W]."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance [B,C,H,W]."""
        return torch.exp(self.logvar)

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """mean + std * noise; noise is drawn (from one generator, or one an image) unless given."""
        if noise is None:
            if isinstance(generator, Sequence):
                noise = torch.stack([torch.randn(self.mean.shape[1:], generator=g) for g in generator])
            else:
                noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL divergence [B] to the standard normal or to another posterior, summed over C, H, W."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0
            terms = terms - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, z: Tensor) -> Tensor:
        """Negative log-likelihood [B] of z, summed over C, H, W."""
        log_2pi = torch.log(torch.tensor(2.0 * torch.pi, device=z.device))
        return 0.5 * (log_2pi + self.logvar + (z - self.mean).square() / self.var).sum(dim=(1, 2, 3))
