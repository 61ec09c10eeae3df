"""Metrics of generated and reconstructed images (system.md section 6)."""

from repae_core.evaluation.extractors import (
    FeatureExtractor,
    Features,
    build_extractor,
    join_features,
)
from repae_core.evaluation.frechet import frechet_distance
from repae_core.evaluation.inception_score import inception_score
from repae_core.evaluation.kid import kernel_distance
from repae_core.evaluation.moments import Moments, merge_moments, moments
from repae_core.evaluation.precision_recall import precision_recall
from repae_core.evaluation.reconstruction import psnr, ssim
from repae_core.evaluation.reference import (
    Reference,
    reference_from_features,
    reference_from_statistics,
    save_reference,
    saved_reference,
)
from repae_core.evaluation.reference_file import ReferenceFile, check_reference_file, read_reference_file
from repae_core.evaluation.scores import batches_of, class_accuracy, score_samples

__all__ = [
    "FeatureExtractor",
    "Features",
    "Moments",
    "Reference",
    "ReferenceFile",
    "batches_of",
    "build_extractor",
    "check_reference_file",
    "class_accuracy",
    "frechet_distance",
    "inception_score",
    "join_features",
    "kernel_distance",
    "merge_moments",
    "moments",
    "precision_recall",
    "psnr",
    "read_reference_file",
    "reference_from_features",
    "reference_from_statistics",
    "save_reference",
    "saved_reference",
    "score_samples",
    "ssim",
]
