"""Configs of the two training stages, and of the VAE they are about."""

from __future__ import annotations

import json
from typing import Any, Literal

import fsspec
from pydantic import field_validator, model_validator

from repae_core.config.architectures import VAE_ARCHITECTURES, diffusers_architecture, parse_sit_name
from repae_core.config.encoders import require_encoder
from repae_core.config.fields import Config, execution, output

SiTName = Literal[
    "SiT-Tiny/1", "SiT-Tiny/2", "SiT-Tiny/4", "SiT-Tiny/8",
    "SiT-S/1", "SiT-S/2", "SiT-S/4", "SiT-S/8",
    "SiT-B/1", "SiT-B/2", "SiT-B/4", "SiT-B/8",
    "SiT-L/1", "SiT-L/2", "SiT-L/4", "SiT-L/8",
    "SiT-XL/1", "SiT-XL/2", "SiT-XL/4", "SiT-XL/8",
]  # fmt: skip


class VAEConfig(Config):
    """The KL autoencoder.

    `f8d4` or `f16d32` in place of the section fills in a published architecture; `{diffusers: folder}` the numbers and
    weights of a diffusers `AutoencoderKL`.
    """

    base_channels: int = output(128, "Width of the first level, channels", ge=1)
    channel_multipliers: tuple[int, ...] = output((1, 2, 4, 4), "Width of each level over base_channels")
    num_res_blocks: int = output(2, "Residual blocks a level in the encoder (the decoder has one more)", ge=1)
    latent_channels: int = output(4, "Channels of the latent grid", ge=1)
    attn_lowest: bool = output(False, "Self-attention also in the lowest level (f16d32)")
    norm_groups: int = output(32, "Groups of every GroupNorm; must divide all widths", ge=1)
    quant_conv: bool = output(True, "1x1 convolutions around the latent (FLUX, SD 3.5: off)")
    weights: str = output(
        "", "Initial weights: path or URI (CompVis or diffusers names, or a published checkpoint); empty = random",
        content=True,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _named_architecture(cls, value: Any) -> Any:
        if isinstance(value, dict) and "diffusers" in value:
            return _diffusers_folder(**value)
        if isinstance(value, str):
            if value not in VAE_ARCHITECTURES:
                raise ValueError(
                    f"unknown VAE {value!r}; known: {', '.join(VAE_ARCHITECTURES)}, or a section of numbers"
                )
            return dict(VAE_ARCHITECTURES[value])
        return value

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> VAEConfig:
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError("channel_multipliers must be positive integers, one a level")
        widths = {self.base_channels * m for m in self.channel_multipliers}
        bad = sorted(w for w in widths if w % self.norm_groups)
        if bad:
            raise ValueError(f"norm_groups={self.norm_groups} does not divide the width {bad[0]}")
        return self

    @property
    def downsample_factor(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of `build_vae`."""
        return self.model_dump(exclude={"weights"})


def _diffusers_folder(diffusers: str, **others: Any) -> dict[str, Any]:
    folder = str(diffusers).rstrip("/")
    try:
        with fsspec.open(f"{folder}/config.json", "rb") as file:
            values = diffusers_architecture(json.load(file))
    except (OSError, ImportError) as error:
        raise ValueError(f"diffusers: cannot read {folder}/config.json ({error})") from None
    except ValueError as error:
        raise ValueError(f"diffusers: {folder}/config.json: {error}") from None
    # The folder decides: `others` may be the numbers and weights of the preset below.
    return others | values | {"weights": f"{folder}/diffusion_pytorch_model.safetensors"}


class TrainingConfig(Config):
    """What joint and latent-only training have in common (system.md sections 3 and 4)."""

    model: SiTName = output("SiT-XL/2", "Size of SiT / latent patch")
    num_classes: int | None = output(None, "Classes of the label embedding; none = as in the data set", ge=1)
    encoder: tuple[str, ...] = output(("dinov2-vit-b",), "Frozen vision encoder(s) to align with; [] = no alignment")
    encoder_weights: tuple[str, ...] = output(
        (), "One weights file an encoder (timm format); empty = the registry's own", content=True
    )
    encoder_depth: int = output(8, "SiT blocks before the projector", ge=1)
    projector: Literal["mlp", "conv"] = output("mlp", "Projector: MLP (REPA) or 3x3 convolution (iREPA)")
    projector_dim: int = output(2048, "Hidden width of the MLP projector", ge=1)
    spatial_norm: float | None = output(None, "iREPA's spatial normalisation coefficient of features; none = off", ge=0)
    proj_coeff: float = output(0.5, "Weight of the alignment loss of SiT", ge=0)
    path: Literal["linear", "cosine"] = output("linear", "Interpolant between latent and noise")
    weighting: Literal["uniform", "lognormal"] = output("uniform", "Distribution of the training time t")
    qk_norm: bool = output(False, "LayerNorm on queries and keys")
    class_dropout_prob: float = output(0.1, "Probability that a label is replaced by the null class", ge=0, lt=1)
    max_steps: int = output(400_000, "Optimizer steps", ge=1)
    batch_size: int = output(256, "Global batch over all workers, images", ge=1)
    learning_rate: float = output(1e-4, "AdamW learning rate of SiT", gt=0)
    lr_warmup_steps: int = output(0, "Steps of linear warm-up of the learning rates", ge=0)
    lr_decay_fraction: float = output(
        0.0, "Last share of the steps over which all learning rates go linearly to 0", ge=0, le=1
    )
    adam_beta1: float = output(0.9, "AdamW beta 1", ge=0, lt=1)
    adam_beta2: float = output(0.999, "AdamW beta 2", ge=0, lt=1)
    adam_epsilon: float = output(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = output(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = output(1.0, "Norm to which each network's gradient is clipped", gt=0)
    ema_decay: float = output(0.9999, "Decay a step of SiT's moving average", ge=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = output("no", "Autocast of SiT and encoders (losses stay fp32)")
    allow_tf32: bool = output(False, "TF32 for fp32 matrix products and convolutions (NVIDIA Ampere and later)")
    flip: bool = output(False, "Mirror each image with probability 1/2 (train_ldm: needs cache_latents.flip)")
    shuffle_shards: int = output(
        0, "Shards shuffled together, so that about so many are read at a time; 0 = the whole data set", ge=0
    )
    init_from: str = output(
        "", "Continue a finished run of this stage: fingerprint, `latest` or URI; empty = start anew"
    )

    gradient_accumulation_steps: int = execution(
        1, "Micro-batches into which a worker splits its part of a batch", ge=1
    )
    activation_checkpointing: bool = execution(
        False, "Recompute the activations of SiT and the VAE in the backward pass: less memory, more time, same bits"
    )
    compile: bool = execution(False, "torch.compile of SiT's and the VAE's blocks (may change the last bits)")
    workers: int = execution(1, "Ray Train workers; 0 = in this process, without Ray", ge=0)
    cpus_per_worker: int = execution(2, "CPUs reserved for a worker", ge=1)
    gpus_per_worker: int = execution(0, "GPUs reserved for a worker", ge=0)
    loader_workers: int = execution(0, "Processes that read and decode ahead, a worker; 0 = none", ge=0)
    memory_cache_gib: float = execution(
        2.0, "Memory for decoded images or latents, GiB; used without loader_workers, where all images fit", ge=0
    )
    shard_cache_gib: float = execution(
        0.0, "Disk of a machine for whole shards of a remote store, GiB; 0 = read by byte ranges", ge=0
    )
    threads: int = execution(0, "Torch threads a worker, kept when a run continues; 0 = cpus_per_worker", ge=0)
    checkpoint_every: int = execution(5_000, "Steps between checkpoints", ge=1)
    keep_checkpoints: int = execution(2, "Newest checkpoints kept", ge=1)
    keep_checkpoints_every: int = execution(
        0, "Steps between checkpoints that are never removed; a multiple of checkpoint_every; 0 = none", ge=0
    )
    checkpoint_queue: int = execution(2, "Checkpoints that may wait in local scratch while the store is away", ge=1)
    log_every: int = execution(100, "Steps between logged metrics", ge=1)
    measure_peak: bool = execution(
        True, "Time matrix products for about a second at the start, to report the share of this machine's peak"
    )
    preview_every: int = execution(10_000, "Steps between sample and reconstruction grids; 0 = none", ge=0)
    score_every: int = execution(
        0, "Steps between scores of a few samples while training goes on, on CPUs or a GPU that it leaves free in Ray; "
        "a multiple of checkpoint_every; 0 = none", ge=0
    )  # fmt: skip
    score_images: int = execution(256, "Samples of such a score", ge=2)
    max_failures: int = execution(
        3, "Failures of the workers without a new checkpoint in between that end the stage", ge=1
    )
    step_timeout: float = execution(
        0.0,
        "Seconds after which a step counts as hanging, reading from the store included, waiting until it takes "
        "checkpoints not; 0 = max(120 s, store_retry_seconds + 60 s, 10 x median); not watched with workers=0",
        ge=0,
    )

    @field_validator("mixed_precision", "vae_mixed_precision", mode="before", check_fields=False)
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads an unquoted `no` as false

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

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.batch_size % max(self.workers, 1):
            raise ValueError(f"batch_size={self.batch_size} is not divisible by workers={self.workers}")
        local, parts = self.batch_size // max(self.workers, 1), self.gradient_accumulation_steps
        if local % parts:
            raise ValueError(f"a worker's {local} images are not divisible by gradient_accumulation_steps={parts}")
        if self.mixed_precision == "fp16" and not self.gpus_per_worker:
            raise ValueError(
                "mixed_precision=fp16 needs a GPU: set gpus_per_worker to 1, or mixed_precision to bf16 or no"
            )
        if self.score_every and not self.workers:
            raise ValueError("score_every needs Ray, which has room beside the training: set workers to 1 or more")
        for name in ("score_every", "keep_checkpoints_every"):
            if (steps := getattr(self, name)) % self.checkpoint_every:
                raise ValueError(f"{name}={steps} is no multiple of checkpoint_every={self.checkpoint_every}")
        if self.encoder_weights and len(self.encoder_weights) != len(self.encoder):
            raise ValueError("encoder_weights must name one file for each encoder")
        depth = parse_sit_name(self.model)[0].depth
        if self.encoder_depth > depth:
            raise ValueError(f"encoder_depth={self.encoder_depth} is beyond the {depth} blocks of {self.model}")
        return self

    @property
    def patch_size(self) -> int:
        """Side of SiT's latent patch."""
        return parse_sit_name(self.model)[1]

    @property
    def total_steps(self) -> int:
        """All optimizer steps of the stage."""
        return self.max_steps


class TrainRepaeConfig(TrainingConfig):
    """Joint training of the VAE and SiT: the REPA-E step (system.md section 3)."""

    vae: VAEConfig = output(VAEConfig(), "The VAE that is tuned: `f8d4`, `f16d32` or its numbers")
    vae_training: Literal["repa-e", "frozen", "naive"] = output(
        "repa-e",
        "What reaches the VAE in joint steps: alignment only (REPA-E), nothing (REPA), or the diffusion loss too",
    )
    vae_warmup_steps: int = output(0, "Steps that train the VAE alone first (reconstruction, LPIPS, KL)", ge=0)
    vae_warmup_learning_rate: float | None = output(None, "Rate of the warm-up; none = vae_learning_rate", gt=0)
    vae_learning_rate: float = output(1e-4, "AdamW learning rate of the VAE", gt=0)
    disc_learning_rate: float = output(1e-4, "AdamW learning rate of the discriminator", gt=0)
    vae_align_proj_coeff: float = output(1.5, "Weight of the alignment loss that reaches the VAE", ge=0)
    vae_mixed_precision: Literal["no", "bf16"] = output(
        "no", "Autocast of VAE, perceptual network and discriminator, as published: no (losses stay fp32)"
    )
    vae_ema_decay: float = output(0.0, "Decay a step of a moving average of the VAE; 0 = none", ge=0, lt=1)
    bn_momentum: float = output(0.1, "Momentum of SiT's latent norm", gt=0, le=1)
    reconstruction_loss: Literal["l1", "l2"] = output("l1", "Pixel loss of the VAE")
    perceptual_loss: Literal["lpips-vgg", "digits", "none"] = output("lpips-vgg", "Network of the perceptual loss")
    perceptual_weights: str = output("", "VGG16 weights file (torchvision layout); empty = the hub's", content=True)
    perceptual_weight: float = output(1.0, "Weight of the perceptual loss", ge=0)
    kl_weight: float = output(1e-6, "Weight of the KL term", ge=0)
    discriminator_weight: float = output(0.1, "Weight of the adversarial term of the VAE", ge=0)
    discriminator_start: int = output(0, "Joint step at which the discriminator comes in", ge=0)
    discriminator_filters: int = output(64, "Filters of PatchGAN's first layer", ge=1)
    sync_discriminator_norm: bool = output(
        False, "Batch norm of the discriminator over all workers' images; off = each worker's own, as published"
    )
    discriminator_weights: str = output("", "Initial discriminator weights; empty = random", content=True)
    lecam_weight: float = output(0.0, "Weight of the LeCam regulariser", ge=0)
    lecam_decay: float = output(0.999, "EMA decay of LeCam's logits", ge=0, lt=1)
    latent_stats: str = output(
        "", "File of the first latent statistics (latents_scale, latents_bias); empty = measured", content=True
    )
    latent_stats_images: int = output(10_000, "Images on which the first latent statistics are measured", ge=2)

    @field_validator("perceptual_loss", mode="before")
    @classmethod
    def _no_network(cls, value: Any) -> Any:
        return "none" if value is None else value  # `--set` and YAML read none/null as nothing

    @model_validator(mode="after")
    def _supported_together(self) -> TrainRepaeConfig:
        if self.gradient_accumulation_steps > 1 and self.vae_training == "naive":
            raise ValueError("vae_training=naive differentiates the whole batch's statistics; it needs "
                             "gradient_accumulation_steps=1")  # fmt: skip
        if self.gradient_accumulation_steps > 1 and self.lecam_weight:
            raise ValueError("lecam_weight compares means over the whole batch; it needs gradient_accumulation_steps=1")
        if self.vae_training == "naive" and self.mixed_precision == "fp16":
            raise ValueError("vae_training=naive sums two losses' gradients, which fp16 scales apart; use bf16 or no")
        return self

    @property
    def total_steps(self) -> int:
        """Warm-up and joint steps."""
        return self.vae_warmup_steps + self.max_steps


class TrainLDMConfig(TrainingConfig):
    """Training of a fresh SiT on the cached latents of the tuned, now frozen VAE."""

    model: SiTName = output("SiT-XL/1", "Size of SiT / latent patch")
