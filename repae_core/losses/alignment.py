"""Representation alignment: projected SiT tokens against a frozen encoder's patch features (REPA, REPA-E)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(features: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Mean over encoders, images and tokens of -cos(f, h), in [-1, 1] (system.md section 3).

    features: frozen features, one [B,T,C_k] an encoder; projections: the projectors' outputs, same shapes.
    Computed in fp32 at least. Without encoders the loss is 0, on the CPU.

    Raises:
        ValueError: the two lists, or two shapes, do not match.
    """
    shapes = [[tuple(tensor.shape) for tensor in group] for group in (features, projections)]
    if shapes[0] != shapes[1]:  # cosine_similarity would broadcast
        raise ValueError(f"features {shapes[0]} and projections {shapes[1]} differ in shape")
    if not features:
        return torch.zeros(())
    pairs = zip(features, projections, strict=True)
    return -torch.stack([_mean_cosine(f, h) for f, h in pairs]).mean()


def _mean_cosine(f: Tensor, h: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(f.dtype, h.dtype), torch.float32)
    return F.cosine_similarity(f.to(dtype), h.to(dtype), dim=-1).mean()
