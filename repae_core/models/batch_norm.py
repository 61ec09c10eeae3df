"""Batch normalisation over the global batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repae_core.collectives import sum_over_ranks
from repae_core.models.precision import at_least_fp32


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks: biased variance to normalise, unbiased into running_var.

    Own synchronisation because torch's SyncBatchNorm does not run on a CPU. Gradients flow through the global
    statistics. State-dict names are BatchNorm2d's.

    One way for any number of ranks, with sums in fp64: an image's activations then hardly depend on how the batch is
    split. The discriminator's first norms scale their inputs up a hundredfold, and a LeakyReLU that is on its other
    side for one rounding is a visible difference a few steps later.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B,C,H,W]; B is this rank's part."""
        if not self.training:
            return super().forward(x)
        normalised = self._by_global_statistics(at_least_fp32(x))
        if self.affine:
            normalised = normalised * self.weight[None, :, None, None] + self.bias[None, :, None, None]
        return normalised.to(x.dtype)

    def _by_global_statistics(self, x: Tensor) -> Tensor:
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device, dtype=torch.float64)
        total = sum_over_ranks(torch.cat([x.sum((0, 2, 3), dtype=torch.float64), count]))
        n, mean = total[-1], total[:-1] / total[-1]
        # A second reduction, of centred squares: E[x^2] - E[x]^2 would cancel.
        centred = x - mean.to(x.dtype)[None, :, None, None]
        var = sum_over_ranks(centred.square().sum((0, 2, 3), dtype=torch.float64)) / n
        self._update_running(mean.detach(), var.detach() * n / (n - 1).clamp(min=1))  # a single value varies by 0
        return centred * torch.rsqrt(var + self.eps).to(x.dtype)[None, :, None, None]

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
