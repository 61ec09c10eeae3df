"""The Fréchet distance between two Gaussians (Heusel et al. 2017, equation 6)."""

from __future__ import annotations

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1-mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); means [D], covariances [D,D].

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric
    sigma1^(1/2) sigma2 sigma1^(1/2): exact also for singular covariances, where a general matrix root fails.

    Raises:
        ValueError: the shapes do not match.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"moments differ in shape: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
