"""Metrics of generated and reconstructed images (system.md section 6)."""

from repae_core.evaluation.extractors import FeatureExtractor, Features, build_extractor
from repae_core.evaluation.frechet import frechet_distance
from repae_core.evaluation.inception_score import inception_score
from repae_core.evaluation.moments import moments
from repae_core.evaluation.precision_recall import precision_recall
from repae_core.evaluation.reconstruction import psnr, ssim
from repae_core.evaluation.scores import (
    Reference,
    batches_of,
    class_accuracy,
    load_reference,
    reference_from_features,
    score_samples,
)

__all__ = [
    "FeatureExtractor",
    "Features",
    "Reference",
    "batches_of",
    "build_extractor",
    "class_accuracy",
    "frechet_distance",
    "inception_score",
    "load_reference",
    "moments",
    "precision_recall",
    "psnr",
    "reference_from_features",
    "score_samples",
    "ssim",
]
