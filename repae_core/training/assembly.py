"""Models, optimizers and objectives built from a training config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from repae_core.config import CompatConfig, TrainingConfig, TrainRepaeConfig
from repae_core.diffusion import Interpolant
from repae_core.encoders import build_encoder, encoder_dim
from repae_core.interop import load_vae_weights
from repae_core.losses import LeCamEMA, build_perceptual
from repae_core.models import SiT, build_discriminator, build_sit, build_vae
from repae_core.models.precision import hold_rounded_weights
from repae_core.models.recompute import recompute_activations
from repae_core.training.compiled import compile_blocks, keep_if_it_compiles
from repae_core.training.distributed import Group
from repae_core.training.optim import M, Network
from repae_core.training.precision import autocast, autocast_dtype
from repae_core.training.state import FlowObjective, JointObjective, JointState, LDMState
from repae_core.training.timing import PhaseTimer
from repae_core.weights import load_weights, read_state_dict


class Encoders:
    """The frozen vision encoders of a run: uint8 images [B,3,H,W] -> one [B,T,C_k] an encoder, fp32."""

    def __init__(self, config: TrainingConfig, *, grid: int, device: torch.device) -> None:
        weights = config.encoder_weights or ("",) * len(config.encoder)
        self.modules = [
            build_encoder(name, path, grid=grid, spatial_norm=config.spatial_norm).to(device)
            for name, path in zip(config.encoder, weights, strict=True)
        ]
        self.device, self.mixed_precision = device, config.mixed_precision
        dtype = autocast_dtype(device, config.mixed_precision)
        if dtype is not None:
            for module in self.modules:
                hold_rounded_weights(module, dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Patch features of a batch."""
        with autocast(self.device, self.mixed_precision):
            return [module(images).float() for module in self.modules]


def new_sit(config: TrainingConfig, *, latent_size: int, latent_channels: int, num_classes: int) -> SiT:
    """A freshly initialised SiT of this config.

    Raises:
        ValueError: fewer classes configured than the data set has.
    """
    if config.num_classes is not None and config.num_classes < num_classes:
        raise ValueError(
            f"num_classes={config.num_classes}, but the data set has {num_classes} classes; "
            "set num_classes to that, or none to take the data set's"
        )
    return build_sit(
        config.model,
        input_size=latent_size,
        in_channels=latent_channels,
        num_classes=config.num_classes or num_classes,
        z_dims=tuple(encoder_dim(name) for name in config.encoder),
        encoder_depth=config.encoder_depth,
        projector_dim=config.projector_dim,
        projector=config.projector,
        class_dropout_prob=config.class_dropout_prob,
        qk_norm=config.qk_norm,
        bn_momentum=config.bn_momentum if isinstance(config, TrainRepaeConfig) else 0.1,
    )


def moving_average(network: M) -> M:
    """A frozen copy, in eval mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def train_network(module: M, config: TrainingConfig, group: Group, learning_rate: float) -> Network[M]:
    """The module on the group's device, wrapped, with its AdamW."""
    module = module.to(group.device)
    if config.activation_checkpointing:
        recompute_activations(module)
    if config.compile:
        compile_blocks(module)
    return Network(
        module,
        group.wrap(module),
        learning_rate=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        grad_scale=config.mixed_precision == "fp16",
    )


def new_joint_state(
    config: TrainRepaeConfig,
    compat: CompatConfig,
    group: Group,
    *,
    seed: int,
    latent_size: int,
    num_classes: int,
) -> JointState:
    """VAE, discriminator and SiT at their initial weights, the same on every rank."""
    torch.manual_seed(seed)
    sit = new_sit(config, latent_size=latent_size, latent_channels=config.vae.latent_channels, num_classes=num_classes)
    sit.pos_embed.requires_grad_(compat.trainable_pos_embed)
    vae = build_vae(config.vae.architecture())
    discriminator = build_discriminator(config.discriminator_filters, sync_norm=config.sync_discriminator_norm)
    if config.vae.weights:
        load_vae_weights(vae, config.vae.weights)
    if config.discriminator_weights:
        weights = read_state_dict(config.discriminator_weights, within=("state_dict", "discriminator"))
        load_weights(discriminator, weights, config.discriminator_weights)
    vae = vae.to(memory_format=torch.channels_last)
    discriminator = discriminator.to(memory_format=torch.channels_last)
    state = JointState(
        group=group,
        sit=train_network(sit, config, group, config.learning_rate),
        ema=moving_average(sit),
        timer=PhaseTimer(group.device),
        vae=train_network(vae, config, group, config.vae_learning_rate),
        vae_ema=moving_average(vae) if config.vae_ema_decay else None,
        discriminator=train_network(discriminator, config, group, config.disc_learning_rate),
        lecam=LeCamEMA(config.lecam_decay) if config.lecam_weight else None,
    )
    settle(state, config)
    return state


def new_ldm_state(config: TrainingConfig, group: Group, sit: SiT) -> LDMState:
    """SiT ready for the latent-only loop."""
    trained = train_network(sit, config, group, config.learning_rate)
    state = LDMState(group=group, sit=trained, ema=moving_average(sit), timer=PhaseTimer(group.device))
    settle(state, config)
    return state


def settle(state: LDMState, config: TrainingConfig) -> None:
    """Throw-away passes through every network where they are needed.

    Compiled: one of each rank alone, to see that they do compile, in the run's precision and with as many images as a
    pass of the run has. Under DDP: one of all, for after its first it lays the gradients out anew, and another layout
    adds in another order: a run that continues from a checkpoint would differ in the last bit from an unstopped one.
    """
    world_size, images = state.group.world_size, 1
    if config.compile:
        modules = [network.module for network in state.networks().values()]
        images = config.batch_size // (world_size * config.gradient_accumulation_steps)
        keep_if_it_compiles(lambda: throw_away_pass(state, config, images, reduce=False), state.group, *modules)
    if world_size > 1:
        throw_away_pass(state, config, images, reduce=True)
    for network in state.networks().values():
        network.optimizer.zero_grad(set_to_none=True)


def throw_away_pass(state: LDMState, config: TrainingConfig, images: int, *, reduce: bool) -> None:
    """Forward and backward through every network, of images of zeros; only gradients are left.

    reduce: over the workers; off: without a word to them.
    """
    sit, device = state.sit.module, state.device
    z = torch.zeros(images, sit.in_channels, sit.input_size, sit.input_size, device=device)
    zero = torch.zeros(images, device=device)
    with state.sit.gradients(reduce=reduce):
        with autocast(device, config.mixed_precision):
            velocity, projections = state.sit.forward(z, zero, zero.long(), with_projections=True)
        sum((p.mean() for p in projections), velocity.mean()).backward()
    if isinstance(state, JointState) and isinstance(config, TrainRepaeConfig):
        side = sit.input_size * state.vae.module.downsample_factor
        x = torch.zeros(images, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        with state.vae.gradients(reduce=reduce):
            with autocast(device, config.vae_mixed_precision):
                _, _, recon = state.vae.forward(x, z)
            recon.mean().backward()
        state.discriminator.module.eval()  # this pass must not reach its running statistics
        with state.discriminator.gradients(reduce=reduce):
            with autocast(device, config.vae_mixed_precision):
                logits = state.discriminator.forward(x)
            logits.mean().backward()
        state.discriminator.module.train()


def flow_settings(config: TrainingConfig) -> dict[str, Any]:
    """Arguments of FlowObjective."""
    return {
        "interpolant": Interpolant(config.path),
        "weighting": config.weighting,
        "proj_coeff": config.proj_coeff,
        "max_grad_norm": config.max_grad_norm,
        "ema_decay": config.ema_decay,
        "mixed_precision": config.mixed_precision,
        "accumulation_steps": config.gradient_accumulation_steps,
    }


def flow_objective(config: TrainingConfig) -> FlowObjective:
    """The latent-only step's settings."""
    return FlowObjective(**flow_settings(config))


def joint_objective(config: TrainRepaeConfig, compat: CompatConfig, device: torch.device) -> JointObjective:
    """The joint step's settings, with the perceptual network on its device."""
    perceptual = None
    if config.perceptual_loss != "none" and config.perceptual_weight > 0:
        perceptual = build_perceptual(
            config.perceptual_loss,
            config.perceptual_weights or None,
            double_scale=compat.lpips_double_scale,
            trunk_dtype=autocast_dtype(device, config.vae_mixed_precision),
        ).to(device)
        perceptual = perceptual.to(memory_format=torch.channels_last)
    return JointObjective(
        **flow_settings(config),
        perceptual=perceptual,
        reconstruction_loss=config.reconstruction_loss,
        perceptual_weight=config.perceptual_weight,
        kl_weight=config.kl_weight,
        discriminator_weight=config.discriminator_weight,
        discriminator_start=config.discriminator_start,
        lecam_weight=config.lecam_weight,
        vae_align_proj_coeff=config.vae_align_proj_coeff,
        vae_mixed_precision=config.vae_mixed_precision,
        vae_ema_decay=config.vae_ema_decay,
    )
