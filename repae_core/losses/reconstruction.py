"""Pixel loss of the autoencoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_KINDS = {"l1": F.l1_loss, "l2": F.mse_loss}


def reconstruction_loss(recon: Tensor, x: Tensor, kind: str = "l1") -> Tensor:
    """Mean over all values of |recon - x| (`l1`) or (recon - x)^2 (`l2`); images [B,C,H,W] in [-1,1].

    Raises:
        ValueError: unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown reconstruction loss {kind!r}; known: {', '.join(_KINDS)}")
    return _KINDS[kind](recon, x)
