"""Scores of a checkpoint while its training goes on: a few samples against the preprocessed images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from repae_core.artifact_models import load_checkpoint_vae, load_sit, load_vae
from repae_core.artifacts import Artifact
from repae_core.config import PipelineConfig
from repae_core.data import ImageShards, batch_indices
from repae_core.evaluation import (
    FeatureExtractor,
    Reference,
    build_extractor,
    reference_from_features,
    save_reference,
    saved_reference,
    score_samples,
)
from repae_core.generation import Generator, SamplerSettings, sample_labels
from repae_core.stages.generate import sampler_settings

REFERENCE_IMAGES = 10_000  # at most so many real images, the same in every score of a run


@torch.no_grad()
def score_checkpoint(
    config: PipelineConfig,
    training: Artifact,
    images_seen: int,
    *,
    images: Artifact,
    vae: Artifact | None,
    count: int,
    device: torch.device,
) -> dict[str, float]:
    """Samples of the moving average, with `generate`'s sampler settings, scored in `evaluate`'s features.

    Labels are equal. With an autoguidance guide there is no guidance here: the guide is another model.

    vae: the frozen one of latent-only training; None: the checkpoint's own. A joint SiT takes its running latent
    statistics here (`extract-vae` measures them), so the last score and `evaluate`'s differ a little, by count too.

    Raises:
        ValueError: weights of the extractor are missing or do not fit.
    """
    section, chosen = config.evaluate, config.generate
    extractor = build_extractor(section.extractor, section.extractor_weights or None).to(device)
    reference = _reference(ImageShards(images), extractor, seed=config.seed, batch_size=section.batch_size)
    sit, record = load_sit(training, str(images_seen))
    settings = SamplerSettings(**sampler_settings(config), path=record["path"])
    if chosen.guide:  # may not be there yet, or not fit the model of this stage
        settings = dataclasses.replace(settings, guidance=1.0)
    decoder = load_vae(vae) if vae is not None else load_checkpoint_vae(training, images_seen)
    generator = Generator(sit, decoder, settings).to(device)
    labels = torch.from_numpy(sample_labels("equal", count, sit.num_classes, config.seed))

    def samples() -> Iterator[Tensor]:
        for start in range(0, count, chosen.batch_size):
            yield generator.sample(labels[start : start + chosen.batch_size], seed=config.seed, first=start)

    return score_samples(extractor(samples()), reference, extractor.distance_name, neighbours=section.neighbours)


def _reference(images: ImageShards, extractor: FeatureExtractor, *, seed: int, batch_size: int) -> Reference:
    """Of up to `REFERENCE_IMAGES` preprocessed images; computed once a store."""
    count = min(REFERENCE_IMAGES, len(images))
    chosen = np.sort(batch_indices(len(images), seed=seed, images_seen=0, batch_size=count))
    named = ["checkpoint scores", extractor.name, extractor.weights_sha256, images.content_sha256, seed, count]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
    description = f"{count:,} preprocessed images"
    found = saved_reference(images.artifact.store, key, description=description, sha256=key)
    if found is None:
        parts = (images.images(chosen[start : start + batch_size]) for start in range(0, count, batch_size))
        found = reference_from_features(extractor(parts).features, description)
        save_reference(images.artifact.store, key, found)
    return found
