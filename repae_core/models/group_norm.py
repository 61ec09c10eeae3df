"""GroupNorm whose backward pass is fast on a CPU for narrow groups in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)
_NARROW = 16  # channels in a group; below, torch's backward pass falls behind


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`; only how its gradient is computed differs, and that on a CPU in half precision alone.

    There torch goes through a channels-last tensor one group at a time, as many channels at a position as a group has:
    4 of the VAE's 128, a fraction of a vector register. Whole rows of channels take a sixth of the time, and a joint
    step with an f8d4 VAE 5 % less. Sums and factors are in fp32, and dx is rounded once, as in torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        narrow = input.shape[1] < _NARROW * self.num_groups
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        mixed = input.dtype in _HALF and self.affine and self.weight.dtype == torch.float32
        if input.device.type == "cpu" and mixed and narrow and channels_last and input.numel():
            output: Tensor = _RowWise.apply(input, self.weight, self.bias, self.num_groups, self.eps)
            return output
        return super().forward(input)


class _RowWise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        b, c, h, w = x.shape
        y, mean, inverse_std = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, epsilon)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """dx = weight/std dy + slope x + offset, where slope and offset are the same for all of a group."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        mean, inverse_std = mean[..., None], inverse_std[..., None]  # [B,G,1]
        weight = weight.unflatten(0, (mean.shape[1], -1))  # [G,C/G]
        dy_x, dy_sum = (sums.unflatten(1, weight.shape) for sums in _sums(dy, x))  # [B,G,C/G]
        of_group = [(weight * sums).sum(2, keepdim=True) for sums in (dy_x, dy_sum)]  # [B,G,1]
        count = weight.shape[1] * x.shape[2] * x.shape[3]
        slope = (of_group[1] * mean - of_group[0]) * inverse_std**3 / count
        offset = -slope * mean - of_group[1] * inverse_std / count
        scale, slope, offset = (
            factor.expand(dy_x.shape).flatten(1)[..., None, None] for factor in (weight * inverse_std, slope, offset)
        )
        dx = torch.empty_like(x)
        for n in range(len(x)):  # an image at a time: what is in full precision on the way stays in the cache
            dx[n] = torch.addcmul(offset[n], x[n], slope[n]).addcmul_(dy[n], scale[n])
        dweight = ((dy_x - dy_sum * mean) * inverse_std).sum(0).flatten()
        return dx, dweight, dy_sum.sum(0).flatten(), None, None


def _sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dy x and of dy over an image's positions, in full precision: [B,C] each.

    They are the gradients of weight and bias of a batch norm with mean 0 and deviation 1, which takes one pass.
    """
    zero, one = (torch.full(x.shape[1:2], value, dtype=torch.float32) for value in (0, 1))
    of_images = [
        torch.ops.aten.native_batch_norm_backward(
            dy[n : n + 1], x[n : n + 1], one, zero, one, None, None, False, 0.0, [False, True, True]
        )
        for n in range(len(x))
    ]
    return torch.stack([weight for _, weight, _ in of_images]), torch.stack([bias for _, _, bias in of_images])
