"""The REPA-E step: VAE, discriminator and SiT in one update (Leng et al. 2025, section 3; system.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repae_core.losses import (
    alignment_loss,
    flow_matching_loss,
    generator_loss,
    hinge_discriminator_loss,
    kl_loss,
    lecam_loss,
    reconstruction_loss,
)
from repae_core.models import DiagonalGaussian, drop_labels
from repae_core.training.draws import Draws, draw
from repae_core.training.ema import update_ema
from repae_core.training.micro_batches import MicroBatch, accumulate, micro_batches
from repae_core.training.optim import frozen
from repae_core.training.precision import autocast, require_finite
from repae_core.training.state import Batch, FlowObjective, JointObjective, JointState, LDMState, Metrics


def repae_step(
    state: JointState,
    batch: Batch,
    objective: JointObjective,
    draws: Draws | None = None,
    *,
    rate_factor: float = 1.0,
) -> Metrics:
    """One joint step; returns this worker's loss terms and the gradient norms before clipping, as scalars.

    draws: of `new_draws`, with given t, noise, posterior noise or label-drop mask for a step that is replayed exactly;
    None: new ones.

    Each phase reads only values from before the step (z and recon are kept from the first), so all three
    losses are known, and known to be finite, before the first optimizer steps.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    draws = new_draws(state, batch, objective) if draws is None else draws
    parts = micro_batches(batch, draws, objective.accumulation_steps)
    z, recon, metrics = vae_phase(state, parts, objective)
    metrics |= discriminator_phase(state, parts, recon, objective)
    metrics |= sit_phase(state, parts, z, objective, train_norm=True)
    apply_updates(state, metrics, objective, rate_factor)
    return metrics


def new_draws(
    state: LDMState,
    batch: Batch,
    objective: FlowObjective,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    posterior_noise: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> Draws:
    """What a step on this batch draws, apart from what is given: noises [B,C,h,w], t [B], label-drop mask [B].

    generator: one, or one an image, on the CPU; None: torch's own.
    """
    count, sit = len(batch.labels), state.sit.module
    shared = generator or torch.default_generator
    return draw(
        shared if isinstance(shared, Sequence) else [shared] * count,
        latent_shape=(sit.in_channels, sit.input_size, sit.input_size),
        interpolant=objective.interpolant,
        weighting=objective.weighting,
        drop_prob=sit.spec["class_dropout_prob"],
        device=state.device,
        posterior_noise=posterior_noise,
        t=t,
        noise=noise,
        label_drop=label_drop,
    )


def vae_phase(
    state: JointState, parts: Sequence[MicroBatch], objective: JointObjective
) -> tuple[Tensor, Tensor, Metrics]:
    """Gradient of the VAE; z and reconstructions of the whole batch, detached, for the other phases."""
    kept: list[tuple[Tensor, Tensor]] = []

    def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Metrics]:
        x = signed_images(batch, state)
        with autocast(state.device, objective.vae_mixed_precision):
            posterior, z, recon = state.vae.forward(x, draws.posterior_noise)
        kept.append((z.detach(), recon.detach()))
        return vae_loss(state, x, posterior, z, recon, batch, draws, objective)

    with state.timer("vae"):
        metrics = accumulate(state.vae, parts, loss)
    z, recon = (torch.cat(of_parts) for of_parts in zip(*kept, strict=True))
    return z, recon, metrics


def discriminator_phase(
    state: JointState, parts: Sequence[MicroBatch], recon: Tensor, objective: JointObjective
) -> Metrics:
    """Gradient of the discriminator: hinge loss on real images and this step's reconstructions."""
    reconstructions = iter(recon.chunk(len(parts)))

    def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Metrics]:
        return discriminator_loss(state, signed_images(batch, state), next(reconstructions), objective)

    with state.timer("discriminator"):
        return accumulate(state.discriminator, parts, loss)


def sit_phase(
    state: LDMState, parts: Sequence[MicroBatch], z: Tensor, objective: FlowObjective, *, train_norm: bool
) -> Metrics:
    """Gradient of SiT on z of the whole batch.

    train_norm: the latent norm takes the global batch's statistics, over ranks and micro-batches, and updates its
    running ones (joint step); off: fixed statistics (latent-only step).
    """
    with state.timer("sit"):
        latents = iter(state.sit.module.train(train_norm).bn(z).chunk(len(parts)))
        return accumulate(state.sit, parts, lambda b, d: sit_loss(state, next(latents), b, d, objective))


def apply_updates(state: LDMState, metrics: Metrics, objective: FlowObjective, rate_factor: float) -> None:
    """Clip and step every network, then the moving average; the gradient norms join `metrics`.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    require_finite(metrics, state.group)
    for name, network in state.networks().items():
        with state.timer(name):
            metrics[f"grad_norm_{name}"] = network.step(objective.max_grad_norm, rate_factor)
    with state.timer("ema"):
        for average, module, decay in state.moving_averages(objective):
            update_ema(average, module, decay)
    state.step += 1


def vae_loss(
    state: JointState,
    x: Tensor,
    posterior: DiagonalGaussian,
    z: Tensor,
    recon: Tensor,
    batch: Batch,
    draws: Draws,
    objective: JointObjective,
) -> tuple[Tensor, Metrics]:
    """L_vae: reconstruction, KL, adversarial, and the alignment that reaches the VAE through frozen SiT."""
    sit, discriminator = state.sit.module, state.discriminator.module
    adversarial = objective.discriminator_weight * (state.step >= objective.discriminator_start)
    with frozen(sit, discriminator):
        loss, metrics = autoencoder_loss(x, recon, posterior, objective)
        with autocast(state.device, objective.vae_mixed_precision):
            logits = discriminator(recon)
        metrics["gan_loss"] = generator_loss(logits)
        sit.eval()  # the latent norm's running statistics, as the previous step left them
        x_t, _ = objective.interpolant.interpolate(sit.bn(z), draws.noise, draws.t)
        with autocast(state.device, objective.mixed_precision):
            projections = sit.project(x_t, draws.t, batch.labels)
        metrics["vae_align_loss"] = alignment_loss(batch.features, projections).to(z.device)
        loss = loss + adversarial * metrics["gan_loss"]
        loss = loss + objective.vae_align_proj_coeff * metrics["vae_align_loss"]
    return loss, {name: value.detach() for name, value in metrics.items()} | {"vae_loss": loss.detach()}


def discriminator_loss(
    state: JointState, x: Tensor, recon: Tensor, objective: JointObjective
) -> tuple[Tensor, Metrics]:
    """Hinge loss (and LeCam's regulariser); the discriminator sees real images and reconstructions apart."""
    on = float(state.step >= objective.discriminator_start)
    with autocast(state.device, objective.vae_mixed_precision):
        real, fake = state.discriminator.forward(x), state.discriminator.forward(recon)
    loss = on * hinge_discriminator_loss(real, fake)
    metrics = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
    if state.lecam is not None:
        metrics["lecam_loss"] = lecam_loss(real, fake, *state.lecam.values.to(real.device))
        loss = loss + on * objective.lecam_weight * metrics["lecam_loss"]
        state.lecam.update(real, fake)
    return loss, {name: value.detach() for name, value in metrics.items()}


def sit_loss(
    state: LDMState, zbar: Tensor, batch: Batch, draws: Draws, objective: FlowObjective
) -> tuple[Tensor, Metrics]:
    """L_sit on normalised latents: flow matching and alignment, with labels dropped."""
    x_t, v_target = objective.interpolant.interpolate(zbar, draws.noise, draws.t)
    labels = drop_labels(batch.labels, 0.0, null_class=state.sit.module.null_class, mask=draws.label_drop)
    with autocast(state.device, objective.mixed_precision):
        v_pred, projections = state.sit.forward(x_t, draws.t, labels, with_projections=True)
    flow = flow_matching_loss(v_pred, v_target)
    align = alignment_loss(batch.features, projections).to(flow.device)  # without encoders it is a zero on the CPU
    loss = flow + objective.proj_coeff * align
    return loss, {"flow_loss": flow.detach(), "align_loss": align.detach(), "sit_loss": loss.detach()}


def vae_warmup_step(
    state: JointState, batch: Batch, objective: JointObjective, draws: Draws, *, rate_factor: float = 1.0
) -> Metrics:
    """One step of the VAE alone: reconstruction, perceptual loss and KL (for a VAE from scratch)."""

    def loss(batch: Batch, draws: Draws) -> tuple[Tensor, Metrics]:
        x = signed_images(batch, state)
        with autocast(state.device, objective.vae_mixed_precision):
            posterior, _, recon = state.vae.forward(x, draws.posterior_noise)
        total, terms = autoencoder_loss(x, recon, posterior, objective)
        return total, {name: value.detach() for name, value in terms.items()} | {"vae_loss": total.detach()}

    with state.timer("vae"):
        metrics = accumulate(state.vae, micro_batches(batch, draws, objective.accumulation_steps), loss)
        require_finite(metrics, state.group)
        metrics["grad_norm_vae"] = state.vae.step(objective.max_grad_norm, rate_factor)
    return metrics


def signed_images(batch: Batch, state: LDMState) -> Tensor:
    """The batch's images as the VAE sees them: [B,3,H,W] in [-1,1]."""
    assert batch.images is not None
    return batch.images.to(state.dtype, memory_format=torch.channels_last) / 127.5 - 1


def autoencoder_loss(
    x: Tensor, recon: Tensor, posterior: DiagonalGaussian, objective: JointObjective
) -> tuple[Tensor, Metrics]:
    """Weighted sum and terms of reconstruction, perceptual loss and KL, images in [-1,1]."""
    metrics = {"recon_loss": reconstruction_loss(recon, x, objective.reconstruction_loss)}
    loss = metrics["recon_loss"]
    if objective.perceptual is not None:
        metrics["perceptual_loss"] = objective.perceptual(recon, x).mean()
        loss = loss + objective.perceptual_weight * metrics["perceptual_loss"]
    metrics["kl_loss"] = kl_loss(posterior)
    return loss + objective.kl_weight * metrics["kl_loss"], metrics
