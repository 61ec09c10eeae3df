"""Scores of a set of images against a reference, from features."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import numpy as np
import torch
from torch import Tensor

from repae_core.evaluation.extractors import FeatureExtractor, Features
from repae_core.evaluation.frechet import frechet_distance
from repae_core.evaluation.inception_score import inception_score
from repae_core.evaluation.moments import moments
from repae_core.evaluation.precision_recall import precision_recall


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; without `features` there is no precision and recall."""

    description: str
    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None = None


def reference_from_features(features: Tensor, description: str) -> Reference:
    """A reference made of images' features [N,D]."""
    return Reference(description, *moments(features), features)


def load_reference(path: str, extractor: FeatureExtractor, *, batch_size: int) -> Reference:
    """A reference file: `.npz` with `mu` and `sigma` (of this extractor), and/or images `arr_0` uint8 [N,H,W,3].

    Raises:
        ValueError: unreadable, or neither is in it; one line naming the file.
    """
    try:
        with fsspec.open(path, "rb") as file:
            loaded = np.load(io.BytesIO(file.read()), allow_pickle=False)
        arrays = {name: loaded[name] for name in ("arr_0", "mu", "sigma") if name in loaded}
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate.reference: {path}: {' '.join(str(error).split())}") from None
    features = None
    if "arr_0" in arrays:
        features = extractor(batches_of(arrays["arr_0"], batch_size)).features
    name = path.rsplit("/", 1)[-1]
    if "mu" in arrays and "sigma" in arrays:
        return Reference(f"statistics of {name}", arrays["mu"], arrays["sigma"], features)
    if features is None:
        raise ValueError(f"evaluate.reference: {path} holds neither mu and sigma nor arr_0")
    return reference_from_features(features, f"{len(features):,} images of {name}")


def score_samples(samples: Features, reference: Reference, distance_name: str, *, neighbours: int) -> dict[str, float]:
    """Fréchet distance, Inception score, and precision and recall where the reference has images."""
    mu, sigma = moments(samples.features)
    scores = {
        distance_name: frechet_distance(mu, sigma, reference.mu, reference.sigma),
        "inception_score": inception_score(samples.logits),
    }
    if reference.features is not None and min(len(samples.features), len(reference.features)) > neighbours:
        scores["precision"], scores["recall"] = precision_recall(
            reference.features, samples.features, neighbours=neighbours
        )
    return scores


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the class they were asked for."""
    return float((logits.argmax(dim=1) == labels).float().mean())


def batches_of(pixels: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """uint8 [N,H,W,3] in batches of [B,3,H,W]."""
    for start in range(0, len(pixels), batch_size):
        yield torch.from_numpy(pixels[start : start + batch_size]).permute(0, 3, 1, 2).contiguous()
