"""Exponential moving average of SiT (system.md section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """e += (1-d)(p-e), a form in which constants stay constant; over parameters and floating buffers.

    Frozen parameters too; other buffers (counters) are copied.
    """
    averaged: list[tuple[Tensor, Tensor]] = [(e, p) for e, p in zip(ema.parameters(), model.parameters(), strict=True)]
    for e, p in zip(ema.buffers(), model.buffers(), strict=True):
        if e.is_floating_point():
            averaged.append((e, p))
        else:
            e.copy_(p)
    targets = [e.data for e, _ in averaged]
    torch._foreach_lerp_(targets, [p.data.to(e.dtype) for e, p in averaged], 1 - decay)
