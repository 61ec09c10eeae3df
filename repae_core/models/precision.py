"""Where networks run in half precision, what leaves them for a loss does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hold_rounded_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep a frozen network's linear layers and convolutions in the type that autocast rounds them to in every pass.

    Passes under autocast of this type give the same bits, without the rounding and with half of the memory.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(dtype)
