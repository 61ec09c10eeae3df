"""Typed configuration: one frozen model a stage, presets and overrides; imports no torch."""

from repae_core.config.fields import Config, content_paths, dotted_names, field_extra, output_fields
from repae_core.config.pipeline import STAGES, CompatConfig, PipelineConfig, section_name, stage_name
from repae_core.config.presets import load_config, preset_names, resolve_config
from repae_core.config.stages import (
    CacheLatentsConfig,
    EvaluateConfig,
    ExtractVAEConfig,
    GenerateConfig,
    PreprocessConfig,
)
from repae_core.config.training import TrainingConfig, TrainLDMConfig, TrainRepaeConfig, VAEConfig

__all__ = [
    "STAGES",
    "CacheLatentsConfig",
    "CompatConfig",
    "Config",
    "EvaluateConfig",
    "ExtractVAEConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PreprocessConfig",
    "TrainLDMConfig",
    "TrainRepaeConfig",
    "TrainingConfig",
    "VAEConfig",
    "content_paths",
    "dotted_names",
    "field_extra",
    "load_config",
    "output_fields",
    "preset_names",
    "resolve_config",
    "section_name",
    "stage_name",
]
