"""Configs of the stages that do not train (system.md section 2)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from repae_core.config.encoders import ENCODERS, require_encoder
from repae_core.config.fields import Config, execution, output


class PreprocessConfig(Config):
    """Raw images to WebDataset shards of square RGB images."""

    source: str = output(
        "digits",
        "Images: `digits`, or class folders, images with dataset.json, a tar, zip, WebDataset, or Parquet tables",
    )
    resolution: int = output(256, "Side of the square images, pixels", ge=8, le=4096)
    images_per_shard: int | None = output(
        None, "Images planned for one shard; none = about 256 MB, or a sixteenth of the data set", ge=1
    )
    encoding: Literal["png", "webp", "jpeg"] = output("png", "Image format in the shards; png and webp are lossless")
    jpeg_quality: int = output(95, "Quality where encoding is jpeg; else not used", ge=1, le=100)
    max_skipped_fraction: float = output(0.01, "Share of unreadable images above which the stage stops", ge=0, le=1)
    processes: int = execution(1, "Processes that crop and encode, a worker", ge=1)
    workers: int = execution(0, "Ray workers, each with its share of the shards; 0 = in this process", ge=0)


class ExtractVAEConfig(Config):
    """The tuned VAE out of a joint checkpoint, with its measured latent statistics."""

    checkpoint: str = output("last", "Joint checkpoint: `last` or images seen")
    weights: Literal["raw", "ema"] = output(
        "raw", "The tuned VAE itself, or its moving average (needs train_repae.vae_ema_decay)"
    )
    stats_images: int | None = output(None, "Images on which latent statistics are measured; none = all", ge=2)
    export_diffusers: bool = output(True, "Also write a diffusers AutoencoderKL folder")
    batch_size: int = execution(64, "Images a forward pass", ge=1)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _images_seen(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class CacheLatentsConfig(Config):
    """Posterior mean and std of every image, as shards."""

    vae: str = output("auto", "`auto` = of extract-vae; or the URI of an extract-vae artifact: stages 2-3 are not run")
    dtype: Literal["float32", "float16", "bfloat16"] = output("float32", "Type in which mean and std are stored")
    flip: bool = output(False, "Also cache the mirrored images")
    encoder: tuple[str, ...] = output((), "Encoders whose features are cached too; [] = none")
    encoder_weights: tuple[str, ...] = output((), "One weights file an encoder; empty = the registry's", content=True)
    encoder_grid: int | None = output(None, "Tokens a side of the features; none = the grid of train_ldm.model", ge=1)
    batch_size: int = output(64, "Images a forward pass (another number may change the last bits)", ge=1)
    threads: int = output(1, "Torch threads a worker (another number may change the last bits)", ge=1)
    workers: int = execution(0, "Ray workers, each with its share of the shards; 0 = in this process", ge=0)
    cpus_per_worker: int = execution(1, "CPUs reserved for a worker", ge=1)
    gpus_per_worker: int = execution(0, "GPUs reserved for a worker", ge=0)
    loader_workers: int = execution(0, "Processes that read and decode ahead, a worker; 0 = none", ge=0)
    shard_cache_gib: float = execution(
        4.0, "Disk of a machine for whole image shards of a remote store, GiB; 0 = read by byte ranges", ge=0
    )

    @field_validator("encoder", "encoder_weights", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("encoder")
    @classmethod
    def _known_encoders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            require_encoder(name)
        return value


class GenerateConfig(Config):
    """Images from a trained SiT and its VAE (system.md section 5)."""

    model: Literal["train-ldm", "train-repae"] = output("train-ldm", "Stage whose SiT generates")
    checkpoint: str = output("last", "Checkpoint: `last` or images seen")
    weights: Literal["ema", "raw"] = output("ema", "Moving average or raw weights of SiT")
    num_images: int = output(50_000, "Images to generate", ge=1)
    sampler: Literal["ode", "heun", "sde"] = output("sde", "Euler ODE, Heun ODE or Euler-Maruyama SDE")
    steps: int | None = output(None, "Sampler steps; none = 50 (ode, heun) or 250 (sde)", ge=1)
    guidance: float = output(1.0, "Classifier-free guidance scale; 1 = off", ge=0)
    guidance_interval: tuple[float, float] = output((0.0, 1.0), "Times t between which guidance is on")
    guide: str = output(
        "", "Weaker model in place of the unconditional half: the `model` stage's name (an earlier checkpoint of the "
        "same training), a fingerprint, `latest` or a URI; empty = classifier-free guidance"
    )  # fmt: skip
    guide_checkpoint: str = output("last", "Checkpoint of the guide: `last` or images seen; else not used")
    guide_weights: Literal["ema", "raw"] = output("ema", "Moving average or raw weights of the guide; else not used")
    labels: str = output("equal", "`equal`, `random`, or a list of classes that is repeated, e.g. 0,1,2")
    rounding: Literal["truncate", "round"] = output("truncate", "How [-1,1] becomes uint8 (ADM truncates)")
    mixed_precision: Literal["no", "bf16"] = output("no", "Precision of SiT's products; state and decoder are not cut")
    grid_classes: int = output(10, "Classes, the first ones, with a picture of their own; 0 = none", ge=0, le=100)
    images_per_shard: int = output(512, "Images in one shard of the result; best a multiple of batch_size", ge=1)
    batch_size: int = execution(64, "Images a sampler batch (another number may change the last bits)", ge=1)
    threads: int = execution(1, "Torch threads a worker (another number may change the last bits)", ge=1)
    workers: int = execution(0, "Ray workers, each with its share of the shards; 0 = in this process", ge=0)
    cpus_per_worker: int = execution(1, "CPUs reserved for a worker", ge=1)
    gpus_per_worker: int = execution(0, "GPUs reserved for a worker: 0 or 1", ge=0, le=1)

    @field_validator("checkpoint", "guide_checkpoint", mode="before")
    @classmethod
    def _images_seen(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] <= value[1] <= 1.0:
            raise ValueError("must be two times with 0 <= low <= high <= 1")
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _label_list(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            value = ",".join(str(v) for v in value)
        if isinstance(value, int):
            value = str(value)
        if isinstance(value, str) and value not in ("equal", "random"):
            parts = [p.strip() for p in value.split(",")]
            if not all(p.isdigit() for p in parts):
                raise ValueError("must be `equal`, `random`, or a list of class numbers such as [0, 1, 2]")
            value = ",".join(str(int(p)) for p in parts)
        return value

    @model_validator(mode="after")
    def _guide_has_a_use(self) -> GenerateConfig:
        if self.guide and self.guidance == 1.0:
            raise ValueError("guide is given, but guidance=1 never calls it; set another scale")
        if self.guide in ("train-ldm", "train-repae") and self.guide != self.model:
            raise ValueError(f"guide={self.guide!r} is another stage than model={self.model!r}")
        return self

    @property
    def sampler_steps(self) -> int:
        """Steps in force: the sampler's default unless set."""
        return self.steps or (250 if self.sampler == "sde" else 50)


TOO_FEW_SAMPLES = "generate.num_images={}: evaluate needs at least 2 images"
OWN_EXTRACTORS = ("inception", "dinov2", "digits")  # besides these, every encoder


def require_extractor(name: str) -> None:
    """Refuse a feature network that evaluation does not know; ValueError listing those it does."""
    if name in OWN_EXTRACTORS:
        return
    try:
        require_encoder(name)
    except ValueError:
        known = ", ".join((*OWN_EXTRACTORS, *ENCODERS))
        raise ValueError(f"unknown extractor {name!r}; known: {known}, timm/<model>") from None


class EvaluateConfig(Config):
    """Scores of the generated images and of the VAE (system.md section 6)."""

    extractor: str = output("inception", "Feature network: inception (FID), dinov2 (FD-DINOv2), digits, or an encoder")
    extractor_weights: str = output("", "Weights file of the feature network (inception needs one)", content=True)
    reference: str = output("auto", "`auto` = all preprocessed images, or ADM's .npz (arr_0, or mu and sigma)")
    neighbours: int = output(3, "k of precision and recall", ge=1)
    vae_images: int = output(2_000, "Images on which the VAE's reconstruction is scored; 0 = none", ge=0)
    vae_posterior: Literal["sample", "mode"] = output("sample", "Reconstructions of a posterior sample or its mode")
    perceptual: tuple[Literal["lpips-vgg", "lpips-alex", "digits"], ...] = output(
        ("lpips-vgg", "lpips-alex"), "Perceptual distances of reconstructions; [] = none"
    )
    perceptual_weights: tuple[str, ...] = output(
        (), "One backbone file a perceptual distance (torchvision layout); empty = the hub's", content=True
    )
    untrained_baseline: bool = output(
        False, "Also score an untrained SiT: decoded noise, same VAE and labels (Euler, truncate)"
    )
    latent_images: int = output(64, "Images whose latents are analysed before and after tuning; 0 = none", ge=0)
    neighbour_samples: int = output(
        10, "Samples whose nearest real images are shown, where features of these are kept; 0 = none", ge=0
    )
    batch_size: int = execution(100, "Images a forward pass", ge=1)
    workers: int = execution(0, "Ray workers, each with its share of the images; 0 = in this process", ge=0)
    cpus_per_worker: int = execution(1, "CPUs reserved for a worker", ge=1)
    gpus_per_worker: int = execution(0, "GPUs reserved for a worker", ge=0)

    @field_validator("extractor")
    @classmethod
    def _known(cls, value: str) -> str:
        require_extractor(value)
        return value

    @field_validator("perceptual", "perceptual_weights", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_be_scored(self) -> EvaluateConfig:
        if self.vae_images == 1:
            raise ValueError("vae_images must be 0 or at least 2: one image has no covariance")
        if self.perceptual_weights and len(self.perceptual_weights) != len(self.perceptual):
            raise ValueError("perceptual_weights must name one file for each perceptual distance")
        return self
