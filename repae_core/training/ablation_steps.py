"""Steps REPA-E is compared with: a frozen VAE (plain REPA), naive end-to-end training (system.md section 3)."""

from __future__ import annotations

import dataclasses

import torch

from repae_core.training.draws import Draws
from repae_core.training.ldm_step import ldm_step
from repae_core.training.micro_batches import micro_batches
from repae_core.training.precision import autocast
from repae_core.training.repae_step import apply_updates, discriminator_phase, signed_images, sit_loss, vae_loss
from repae_core.training.state import Batch, JointObjective, JointState, Metrics


def frozen_vae_step(
    state: JointState, batch: Batch, objective: JointObjective, draws: Draws, *, rate_factor: float = 1.0
) -> Metrics:
    """SiT alone on latents of the VAE as it is; its latent norm keeps the statistics it started with (plain REPA).

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    parts = micro_batches(batch, draws, objective.accumulation_steps)
    with torch.no_grad(), state.timer("vae"), autocast(state.device, objective.vae_mixed_precision):
        encode = state.vae.module.encode
        z = torch.cat([encode(signed_images(b, state)).sample(noise=d.posterior_noise) for b, d in parts])
    return ldm_step(state, dataclasses.replace(batch, latents=z), objective, draws, rate_factor=rate_factor)


def naive_end_to_end_step(
    state: JointState, batch: Batch, objective: JointObjective, draws: Draws, *, rate_factor: float = 1.0
) -> Metrics:
    """The joint step with the diffusion loss also reaching the VAE: z is not detached, nor the batch's statistics.

    The gradients of L_vae and L_sit are summed before the VAE's one clip and step.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    assert objective.accumulation_steps == 1  # the statistics of z hold the whole batch's graph
    with state.timer("vae"):
        x = signed_images(batch, state)
        with autocast(state.device, objective.vae_mixed_precision):
            posterior, z, recon = state.vae.forward(x, draws.posterior_noise)
        of_vae, metrics = vae_loss(state, x, posterior, z, recon, batch, draws, objective)
        of_sit, sit_metrics = sit_loss(state, state.sit.module.train().bn(z), batch, draws, objective)
        # One pass: the two losses share the graph of z, and DDP reduces a network's gradient once.
        state.vae.backward(of_vae + of_sit)
    metrics |= discriminator_phase(state, [(batch, draws)], recon.detach(), objective) | sit_metrics
    apply_updates(state, metrics, objective, rate_factor)
    return metrics
