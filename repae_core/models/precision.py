"""Where networks run in half precision, what leaves them for a loss does not."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
