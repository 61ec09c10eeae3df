"""SiT's latent norm: batch normalisation of latents without affine parameters (system.md section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repae_core.models.batch_norm import GlobalBatchNorm2d


class LatentNorm(GlobalBatchNorm2d):
    """zbar = (z - mean) / sqrt(var + 1e-4), per channel.

    Training: statistics of the global batch over all ranks (biased variance to normalise, unbiased into
    running_var). Evaluation: running statistics, constants to the gradient.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=1e-4, momentum=momentum, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """Normalise z [B,C,H,W]."""
        if self.training:
            return super().forward(z)
        assert self.running_mean is not None
        assert self.running_var is not None
        # Copies: batch_norm keeps the buffers for its backward pass, which may come after their next update.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(z, mean, var, training=False, eps=self.eps)

    def denormalize(self, zbar: Tensor, *, without_eps: bool = False) -> Tensor:
        """Exact inverse under the running statistics; `without_eps`: the published inverse zbar/scale + bias."""
        assert self.running_mean is not None
        assert self.running_var is not None
        eps = 0.0 if without_eps else self.eps
        std = torch.sqrt(self.running_var.to(zbar.dtype) + eps)
        return zbar * std[None, :, None, None] + self.running_mean.to(zbar.dtype)[None, :, None, None]

    @torch.no_grad()
    def set_stats(self, *, scale: Tensor, bias: Tensor) -> None:
        """running_mean = bias, running_var = scale**-2; [C] or the published [1,C,1,1]."""
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = self.running_mean.shape
        if scale.numel() != self.num_features or bias.numel() != self.num_features:
            raise ValueError(f"latent statistics of {scale.numel()} channels, the model has {self.num_features}")
        self.running_mean.copy_(bias.reshape(shape))
        self.running_var.copy_(scale.double().reshape(shape) ** -2)

    def stats(self) -> tuple[Tensor, Tensor]:
        """(scale, bias) [C], fp32: scale = running_var**-0.5 without eps, so that setting them back changes nothing."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_var.rsqrt(), self.running_mean.clone()
