"""The diffusion loss: regression on the interpolant's velocity (SiT, Ma et al. 2024, equation 7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def flow_matching_loss(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Mean over all values of (v_pred - v_target)^2, in fp32 or better; both [B,C,h,w]."""
    return F.mse_loss(v_pred.to(v_target.dtype), v_target)
