"""`evaluate`: scores of the generated images and of the VAE, in one table with its protocol."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, batch_indices
from repae_core.evaluation import (
    FeatureExtractor,
    Reference,
    build_extractor,
    load_reference,
    psnr,
    real_floor,
    reference_from_features,
    score_samples,
    ssim,
)
from repae_core.evaluation.grids import comparison_strip, png_bytes
from repae_core.generation import Generator, SamplerSettings, to_uint8
from repae_core.generation.load import load_vae
from repae_core.models import KLVAE, SiT
from repae_core.stages.generate import read_samples

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """Features [N,D], and class logits [N,K] where the network classifies."""

    features: Tensor
    logits: Tensor | None
