"""Scores of a set of images against a reference, from features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from repae_core.evaluation.extractors import Features
from repae_core.evaluation.frechet import frechet_distance
from repae_core.evaluation.inception_score import inception_score
from repae_core.evaluation.kid import kernel_distance
from repae_core.evaluation.moments import Moments
from repae_core.evaluation.precision_recall import precision_recall
from repae_core.evaluation.reference import Reference


def score_samples(
    samples: Features,
    reference: Reference,
    distance_name: str,
    *,
    neighbours: int,
    pool: Moments | None = None,
    spatial: Moments | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Fréchet distance, sFID, KID, Inception score, precision and recall, as far as features allow.

    pool, spatial: moments where they were gathered already; else those of `samples`. device: of the many distances
    of precision and recall.

    Raises:
        ValueError: the reference's statistics are of another network.
    """
    pool = pool or Moments.of(samples.features)
    if spatial is None and samples.spatial is not None:
        spatial = Moments.of(samples.spatial)
    if len(reference.mu) != len(pool.mean):
        raise ValueError(
            f"evaluate.reference: {reference.description} has {len(reference.mu)} features, the extractor "
            f"{len(pool.mean)}: the file belongs to another extractor"
        )
    scores = {distance_name: frechet_distance(pool.mean, pool.covariance, reference.mu, reference.sigma)}
    if spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet_distance(spatial.mean, spatial.covariance, *reference.spatial)
    if samples.logits is not None:
        scores["inception_score"] = inception_score(samples.logits)
    if reference.features is not None:
        scores["kid"] = kernel_distance(samples.features, reference.features)
        if min(len(samples.features), len(reference.features)) > neighbours:
            precision, recall = precision_recall(
                reference.features, samples.features, neighbours=neighbours, device=device
            )
            scores |= {"precision": precision, "recall": recall}
    return scores


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the class they were asked for."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def batches_of(pixels: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """uint8 [N,H,W,3] in batches of [B,3,H,W]."""
    for start in range(0, len(pixels), batch_size):
        yield torch.from_numpy(pixels[start : start + batch_size]).permute(0, 3, 1, 2).contiguous()
