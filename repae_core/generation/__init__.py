"""Sampling images from trained models."""

from repae_core.generation.generator import Generator, SamplerSettings, to_uint8
from repae_core.generation.labels import sample_labels

__all__ = ["Generator", "SamplerSettings", "sample_labels", "to_uint8"]
