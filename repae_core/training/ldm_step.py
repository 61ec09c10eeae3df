"""The latent-only step: SiT on cached latents of a frozen VAE (system.md section 3, "LDM-only step")."""

from __future__ import annotations

from repae_core.training.draws import Draws
from repae_core.training.ema import update_ema
from repae_core.training.precision import require_finite
from repae_core.training.repae_step import sit_loss
from repae_core.training.state import Batch, FlowObjective, LDMState, Metrics


def ldm_step(
    state: LDMState, batch: Batch, draws: Draws, objective: FlowObjective, *, rate_factor: float = 1.0
) -> Metrics:
    """One step on z sampled from the cached posterior, latent statistics fixed; returns scalar metrics.

    Raises:
        NonFiniteLossError: a loss term is NaN or infinite on some rank; nothing was updated.
    """
    assert batch.latents is not None
    loss, metrics = sit_loss(state, batch.latents, batch, draws, objective, train_norm=False)
    state.sit.backward(loss)
    require_finite(metrics, state.group)
    metrics["grad_norm_sit"] = state.sit.step(objective.max_grad_norm, rate_factor)
    update_ema(state.ema, state.sit.module, objective.ema_decay)
    state.step += 1
    return metrics
