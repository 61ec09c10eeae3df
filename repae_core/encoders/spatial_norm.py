"""iREPA's normalisation of encoder features over positions (arXiv 2512.10794)."""

from __future__ import annotations

from torch import Tensor


def spatial_normalize(features: Tensor, coefficient: float = 0.6) -> Tensor:
    """`(f - g*mean_T f) / (std_T f + 1e-6)` per image and channel, over tokens; unbiased std; [B,T,C] -> same.

    coefficient: g, 0.6 by default; 1.0 and 0.8 are also in use (system.md section 3).

    Raises:
        ValueError: fewer than two tokens have no standard deviation.
    """
    if features.shape[1] < 2:
        raise ValueError(f"spatial_norm needs at least 2 tokens, features have {features.shape[1]}")
    mean = features.mean(dim=1, keepdim=True)
    return (features - coefficient * mean) / (features.std(dim=1, keepdim=True) + 1e-6)
