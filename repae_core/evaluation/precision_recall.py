"""Improved precision and recall (Kynkäänniemi et al. 2019), with ADM's conventions."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # rows of a distance matrix at once


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = 3, device: torch.device | None = None
) -> tuple[float, float]:
    """Share of generated images inside the real manifold, and of real ones inside the generated; both in [0,1].

    real, generated: features [N,D] and [M,D]. A manifold is the union of balls around its images up to their
    `neighbours`-th nearest other image; inside means distance <= radius. Distances are fp32, on `device`.

    Raises:
        ValueError: not more images than neighbours.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} images on both sides")
    real, generated = (features.to(device, torch.float32) for features in (real, generated))
    radii_real, radii_generated = _radii(real, neighbours), _radii(generated, neighbours)
    precision = _share_inside(generated, real, radii_real)
    recall = _share_inside(real, generated, radii_generated)
    return precision, recall


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The image itself is one of the nearest, at distance 0.
    return torch.cat(
        [exact_distances(chunk, features).kthvalue(neighbours + 1, dim=1).values for chunk in features.split(CHUNK)]
    )


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(exact_distances(chunk, centres) <= radii).any(dim=1) for chunk in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [Q,N] of features [Q,D] and [N,D].

    Without the matrix-product shortcut, whose rounding puts an image at a distance from itself and its copies.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
