"""The whole pipeline's config, and which parts of it a stage's fingerprint depends on."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from repae_core.config.fields import Config, execution, field_extra, output
from repae_core.config.stages import (
    CacheLatentsConfig,
    EvaluateConfig,
    ExtractVAEConfig,
    GenerateConfig,
    PreprocessConfig,
)
from repae_core.config.training import TrainingConfig, TrainLDMConfig, TrainRepaeConfig

SMALLEST_DISCRIMINATED = 24  # PatchGAN: a side is halved three times, and two 4x4 kernels take one each
STAGES = (
    "preprocess",
    "train-repae",
    "extract-vae",
    "cache-latents",
    "train-ldm",
    "generate",
    "evaluate",
)


def section_name(stage: str) -> str:
    """`train-repae` -> `train_repae`: folders and flows are dashed, config sections underscored."""
    return stage.replace("-", "_")


def stage_name(section: str) -> str:
    """`train_repae` or `train-repae` -> `train-repae`; ValueError with the known names otherwise."""
    name = section.replace("_", "-")
    if name not in STAGES:
        raise ValueError(f"unknown stage {section!r}; stages: {', '.join(STAGES)}")
    return name


def _switch(description: str, stage: str) -> Any:
    field = output(False, description)
    field.json_schema_extra["stage"] = stage
    return field


class CompatConfig(Config):
    """Published behaviour that is off by default (system.md section 9); `published` turns all on."""

    lpips_double_scale: bool = _switch("LPIPS inputs mapped by 2x-1 once more", "train-repae")
    trainable_pos_embed: bool = _switch("SiT's position table is trained in the joint loop", "train-repae")
    ema_latent_stats: bool = _switch(
        "Latent statistics of extract-vae, and so of latent training, = EMA of running statistics", "extract-vae"
    )
    bn_inverse_without_eps: bool = _switch("Denormalise latents without the norm's eps", "generate")
    random_labels: bool = _switch("Generate with random labels, whatever generate.labels says", "generate")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        if value == "published":
            return dict.fromkeys(cls.model_fields, True)
        if isinstance(value, str):
            raise ValueError(f"must be `published` or a section of switches, not {value!r}")
        return value

    def of_stage(self, stage: str) -> dict[str, bool]:
        """The switches that are on among those the stage obeys."""
        return {
            name: True
            for name, field in type(self).model_fields.items()
            if field_extra(field)["stage"] == stage and getattr(self, name)
        }


class PipelineConfig(Config):
    """Everything a pipeline run is made from; a preset file holds exactly this."""

    seed: int = output(0, "Seed of every random draw", ge=0, lt=2**63)
    store: str = execution("artifacts", "Where artifacts live: path or URI (REPAE_STORE and --store win)")
    store_retry_seconds: float = execution(
        180.0,
        "Time during which a failing store access is retried, s; training's workers wait 300 s for each other",
        ge=0,
        le=240,
    )
    experiment: str = execution("repae", "MLflow experiment")
    compat: CompatConfig = output(CompatConfig(), "Published behaviours to reproduce")
    preprocess: PreprocessConfig = output(PreprocessConfig(), "Stage 1")
    train_repae: TrainRepaeConfig = output(TrainRepaeConfig(), "Stage 2")
    extract_vae: ExtractVAEConfig = output(ExtractVAEConfig(), "Stage 3")
    cache_latents: CacheLatentsConfig = output(CacheLatentsConfig(), "Stage 4")
    train_ldm: TrainLDMConfig = output(TrainLDMConfig(), "Stage 5")
    generate: GenerateConfig = output(GenerateConfig(), "Stage 6")
    evaluate: EvaluateConfig = output(EvaluateConfig(), "Stage 7")

    @model_validator(mode="after")
    def _shapes_fit(self) -> PipelineConfig:
        factor = self.train_repae.vae.downsample_factor
        if self.preprocess.resolution % factor:
            raise ValueError(
                f"preprocess.resolution={self.preprocess.resolution} is not divisible by {factor}, "
                "the downsampling of train_repae.vae"
            )
        if self.preprocess.resolution < SMALLEST_DISCRIMINATED:
            raise ValueError(
                f"preprocess.resolution={self.preprocess.resolution}: the discriminator of train_repae needs at least "
                f"{SMALLEST_DISCRIMINATED} pixels a side"
            )
        if self.extract_vae.weights == "ema" and not self.train_repae.vae_ema_decay:
            raise ValueError("extract_vae.weights=ema needs a moving average: set train_repae.vae_ema_decay")
        if self.train_ldm.flip and not self.cache_latents.flip:
            raise ValueError("train_ldm.flip needs mirrored latents: set cache_latents.flip=true")
        cached, used = self.cache_latents, self.train_ldm
        if cached.encoder and cached.encoder == used.encoder and cached.encoder_weights != used.encoder_weights:
            raise ValueError(
                "train_ldm.encoder_weights differ from cache_latents.encoder_weights, whose features it would read"
            )
        self.token_grid("train_repae")
        if self.cache_latents.vae == "auto":
            self.token_grid("train_ldm")
        return self

    def section(self, stage: str) -> Any:
        """The config of one stage, by its dashed or underscored name."""
        section: Config = getattr(self, section_name(stage))
        return section

    @property
    def latent_size(self) -> int:
        """Side of the latent grid that train_repae.vae makes."""
        return self.preprocess.resolution // self.train_repae.vae.downsample_factor

    def token_grid(self, section: str) -> int:
        """SiT's tokens a side in a training section; ValueError if the patch does not divide the latent."""
        training: TrainingConfig = getattr(self, section)
        if self.latent_size % training.patch_size:
            raise ValueError(
                f"{section}.model: patch {training.patch_size} does not divide the latent side "
                f"{self.latent_size} (preprocess.resolution={self.preprocess.resolution})"
            )
        return self.latent_size // training.patch_size
