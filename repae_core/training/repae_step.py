"""The REPA-E step: VAE, discriminator and SiT in one update (Leng et al. 2025, section 3; system.md section 3)."""

from __future__ import annotations

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
from repae_core.training.draws import Draws
from repae_core.training.ema import update_ema
from repae_core.training.optim import frozen
from repae_core.training.precision import autocast, require_finite
from repae_core.training.state import Batch, FlowObjective, JointObjective, JointState, LDMState, Metrics


def repae_step(
    state: JointState, batch: Batch, draws: Draws, objective: JointObjective, *, rate_factor: float = 1.0
) -> Metrics:
    """One joint step; returns this worker's loss terms and the gradient norms before clipping, as scalars.

    Each phase reads only values from before the step (z and recon are kept from the first), so all three
    losses are known, and known to be finite, before the first optimizer steps.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    assert batch.images is not None
    x = batch.images.float() / 127.5 - 1  # [B,3,H,W] in [-1,1]
    posterior, z, recon = state.vae.forward(x, draws.posterior_noise)

    loss, metrics = vae_loss(state, x, posterior, z, recon, batch, draws, objective)
    state.vae.backward(loss)
    metrics |= discriminator_phase(state, x, recon.detach(), objective)
    loss, sit_metrics = sit_loss(state, z.detach(), batch, draws, objective, train_norm=True)
    state.sit.backward(loss)

    metrics |= sit_metrics
    apply_updates(state, metrics, objective, rate_factor)
    return metrics


def apply_updates(state: JointState, metrics: Metrics, objective: JointObjective, rate_factor: float) -> None:
    """Clip and step every network, then the moving average; the gradient norms join `metrics`.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    require_finite(metrics, state.group)
    for name, network in state.networks().items():
        metrics[f"grad_norm_{name}"] = network.step(objective.max_grad_norm, rate_factor)
    update_ema(state.ema, state.sit.module, objective.ema_decay)
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
        metrics["gan_loss"] = generator_loss(discriminator(recon))
        sit.eval()  # the latent norm's running statistics, as the previous step left them
        x_t, _ = objective.interpolant.interpolate(sit.bn(z), draws.noise, draws.t)
        with autocast(state.device, objective.mixed_precision):
            projections = sit.project(x_t, draws.t, batch.labels)
        metrics["vae_align_loss"] = alignment_loss(batch.features, projections)
        loss = loss + adversarial * metrics["gan_loss"]
        loss = loss + objective.vae_align_proj_coeff * metrics["vae_align_loss"]
    return loss, {name: value.detach() for name, value in metrics.items()} | {"vae_loss": loss.detach()}


def discriminator_phase(state: JointState, x: Tensor, recon: Tensor, objective: JointObjective) -> Metrics:
    """Gradient of the discriminator: hinge loss on real images and this step's reconstructions."""
    on = float(state.step >= objective.discriminator_start)
    real, fake = state.discriminator.forward(x), state.discriminator.forward(recon)
    loss = on * hinge_discriminator_loss(real, fake)
    metrics = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
    if state.lecam is not None:
        metrics["lecam_loss"] = lecam_loss(real, fake, state.lecam)
        loss = loss + on * objective.lecam_weight * metrics["lecam_loss"]
        state.lecam.update(real, fake)
    state.discriminator.backward(loss)
    return {name: value.detach() for name, value in metrics.items()}


def sit_loss(
    state: LDMState, z: Tensor, batch: Batch, draws: Draws, objective: FlowObjective, *, train_norm: bool
) -> tuple[Tensor, Metrics]:
    """L_sit: flow matching and alignment, with labels dropped.

    `train_norm`: the latent norm takes the global batch's statistics and updates its running ones (joint
    step); off: fixed statistics (latent-only step).
    """
    sit = state.sit.module
    sit.train()
    sit.bn.train(train_norm)
    x_t, v_target = objective.interpolant.interpolate(sit.bn(z), draws.noise, draws.t)
    labels = drop_labels(batch.labels, 0.0, null_class=sit.null_class, mask=draws.label_drop)
    with autocast(state.device, objective.mixed_precision):
        v_pred, projections = state.sit.forward(x_t, draws.t, labels, with_projections=True)
    flow = flow_matching_loss(v_pred, v_target)
    align = alignment_loss(batch.features, projections)
    loss = flow + objective.proj_coeff * align
    return loss, {"flow_loss": flow.detach(), "align_loss": align.detach(), "sit_loss": loss.detach()}


def vae_warmup_step(
    state: JointState, batch: Batch, draws: Draws, objective: JointObjective, *, rate_factor: float = 1.0
) -> Metrics:
    """One step of the VAE alone: reconstruction, perceptual loss and KL (for a VAE from scratch)."""
    assert batch.images is not None
    x = batch.images.float() / 127.5 - 1
    posterior, _, recon = state.vae.forward(x, draws.posterior_noise)
    loss, metrics = autoencoder_loss(x, recon, posterior, objective)
    state.vae.backward(loss)
    metrics = {name: value.detach() for name, value in metrics.items()} | {"vae_loss": loss.detach()}
    require_finite(metrics, state.group)
    metrics["grad_norm_vae"] = state.vae.step(objective.max_grad_norm, rate_factor)
    return metrics


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
