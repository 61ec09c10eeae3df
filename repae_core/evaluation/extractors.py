"""The networks in whose features images are compared: Inception-v3 of FID, and the quick start's small one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repae_core.digits.networks import load_digit_features
from repae_core.weights import load_weights, read_state_dict

EXTRACTORS = ("inception", "digits")


@dataclass(frozen=True)
class Features:
    """Features [N,D] and class logits [N,K] of images, fp32."""

    features: Tensor
    logits: Tensor


class FeatureExtractor:
    """uint8 images [N,3,H,W] -> Features.

    distance_name: what its Fréchet distance is called; only Inception's is "fid".
    """

    def __init__(self, name: str, network: nn.Module, extract: Callable[[Tensor], Features]) -> None:
        self.name = name
        self.distance_name = "fid" if name == "inception" else f"fd_{name}"
        self.network = network
        self._extract = extract

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor]) -> Features:
        """Features of all batches, in order."""
        parts = [self._extract(batch) for batch in batches]
        return Features(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts]))


def build_extractor(name: str, weights: str | None = None) -> FeatureExtractor:
    """`inception` (pool3, 2048 features; the weights of the TF graph as torch-fidelity publishes them) or `digits`.

    weights: a local or remote file; `digits` uses the committed one where None.

    Raises:
        ValueError: unknown name, missing or unfitting weights; one line that names the file.
    """
    if name == "inception":
        return _inception(weights)
    if name != "digits":
        raise ValueError(f"unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")
    network = load_digit_features()
    if weights:
        load_weights(network, read_state_dict(weights), weights)

    def extract(images: Tensor) -> Features:
        features = network.features(images)
        return Features(features, network.head(features))

    return FeatureExtractor(name, network, extract)


def _inception(weights: str | None) -> FeatureExtractor:
    if not weights:
        raise ValueError(
            "evaluate.extractor_weights: inception needs the file weights-inception-2015-12-05-6726825d.pth "
            "of torch-fidelity's release v0.2.0"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = read_state_dict(weights)

    # torch-fidelity would unpickle whatever the file holds, so it only gets what the safe reader returned.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "inception.pth"
        torch.save(state, path)
        try:
            network: Any = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except RuntimeError as error:
            raise ValueError(f"{weights}: not an Inception file: {' '.join(str(error).split())[:200]}") from None
    return FeatureExtractor("inception", network, lambda images: Features(*network(images)))
