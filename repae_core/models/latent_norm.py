"""SiT's latent norm: batch normalisation of latents without affine parameters (system.md section 3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class LatentNorm(nn.BatchNorm2d):
    """zbar = (z - mean) / sqrt(var + 1e-4), per channel.

    Training: statistics of the global batch over all ranks (biased variance to normalise, unbiased into
    running_var). Evaluation: running statistics, constants to the gradient. Own synchronisation because torch's
    SyncBatchNorm does not run on a CPU.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=1e-4, momentum=momentum, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """Normalise z [B,C,H,W]."""
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            # Copies: batch_norm keeps the buffers for its backward pass, which may come after their next update.
            mean, var = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(z, mean, var, training=False, eps=self.eps)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(z)
        count = torch.tensor([z.numel() / z.shape[1]], device=z.device, dtype=torch.float32)
        z32 = z.float()
        total = _sum_over_ranks(torch.cat([z32.sum((0, 2, 3)), count]))
        n, mean = total[-1], total[:-1] / total[-1]
        # A second reduction, of centred squares: E[z^2] - E[z]^2 would cancel in fp32.
        centred = z32 - mean[None, :, None, None]
        var = _sum_over_ranks(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            momentum = self.momentum or 0.0
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(var.detach() * n / (n - 1), momentum)
        return (centred * torch.rsqrt(var + self.eps)[None, :, None, None]).to(z.dtype)

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


def _sum_over_ranks(values: Tensor) -> Tensor:
    if values.requires_grad:
        return all_reduce(values)
    dist.all_reduce(values)
    return values
