"""The Fréchet distance between two Gaussians (Heusel et al. 2017, equation 6)."""

from __future__ import annotations

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1-mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); means [D], covariances [D,D]; >= 0.

    The trace of the root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): real, and exact also for
    singular covariances (fewer images than features), where a root of the product fails or needs an offset, and
    where roots of its eigenvalues would turn rounding errors of 1e-16 into 1e-8 each.

    Raises:
        ValueError: the shapes do not match, or a moment is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"moments differ in shape: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("moments hold values that are not finite")
    cross = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F [D,R] with F F^T = sigma, R its numerical rank."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]  # below is rounding, not data
    return vectors[:, kept] * np.sqrt(values[kept])
