"""The latent-only step: SiT on cached latents of a frozen VAE (system.md section 3, "LDM-only step")."""

from __future__ import annotations

from repae_core.training.draws import Draws
from repae_core.training.micro_batches import micro_batches
from repae_core.training.repae_step import apply_updates, sit_phase
from repae_core.training.state import Batch, FlowObjective, LDMState, Metrics


def ldm_step(
    state: LDMState, batch: Batch, objective: FlowObjective, draws: Draws, *, rate_factor: float = 1.0
) -> Metrics:
    """One step on z sampled from the cached posterior, latent statistics fixed; returns scalar metrics.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    assert batch.latents is not None
    parts = micro_batches(batch, draws, objective.accumulation_steps)
    metrics = sit_phase(state, parts, batch.latents, objective, train_norm=False)
    apply_updates(state, metrics, objective, rate_factor)
    return metrics
