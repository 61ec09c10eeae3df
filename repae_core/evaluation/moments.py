"""Mean and covariance of features, as metrics compare them."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D,D] (ddof 1) of features [N,D], in float64.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
    values = features.double().cpu().numpy()
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))
