"""Activation checkpointing: a block keeps its inputs only and runs again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputableBlock(nn.Module):
    """A block that draws nothing and has no running statistics, so that running it again gives the same bits."""

    recompute = False

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass; with `recompute`, its activations are not kept where it is trained.

        A frozen block keeps them: the backward pass, and so the second run, may come when it is frozen no more.
        """
        if self.recompute and torch.is_grad_enabled() and next(self.parameters()).requires_grad:
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(*inputs)


def recompute_activations(module: nn.Module) -> None:
    """Switch it on for all blocks inside."""
    for block in module.modules():
        if isinstance(block, RecomputableBlock):
            block.recompute = True
