"""Samples of several trained models side by side: the same classes from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repae_core.artifacts import Artifact
from repae_core.evaluation.grids import image_grid, png_bytes
from repae_core.generation.load import load_model

PER_CLASS = 2


def compare_samples(artifacts: Sequence[tuple[str, Artifact]], *, seed: int, classes: int = 10) -> tuple[bytes, bool]:
    """A PNG with one row of samples for each named `generate` artifact, each with its own sampler settings.

    Column i has the same class and, where the latents have one shape, the same noise in every row; the second result
    says whether they have.

    Raises:
        ValueError: images of different sizes, or an input of an artifact is not in its store.
    """
    generators = {name: load_model(artifact.uri) for name, artifact in artifacts}
    num_classes = min(classes, *(g.sit.num_classes for g in generators.values()))
    labels = torch.arange(num_classes).repeat_interleave(PER_CLASS)
    rows = [generator.sample(labels, seed=seed) for generator in generators.values()]
    if len({images.shape for images in rows}) > 1:
        sizes = ", ".join(f"{name}: {images.shape[-1]} pixels" for name, images in zip(generators, rows, strict=True))
        raise ValueError(f"images of different sizes cannot be shown side by side ({sizes})")
    shapes = {(g.sit.in_channels, g.sit.input_size) for g in generators.values()}
    scale = max(1, 64 // rows[0].shape[-1])
    grid = image_grid(torch.cat(rows), columns=len(labels), scale=scale, labels=list(generators))
    return png_bytes(grid), len(shapes) == 1
