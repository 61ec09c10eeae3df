"""Stage 2: joint training of VAE and SiT."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("train-repae")
def train_repae(run: PipelineRun) -> dict[str, Any]:
    """Train VAE, discriminator and SiT together (REPA-E)."""
    return run_stage(run, "train-repae", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.artifacts.checkpoints import checkpoint_entries, committed_checkpoints
    from tasks.training import run_training

    summary = run_training(context)
    return StageOutcome(
        summary=summary,
        known=checkpoint_entries(context.artifact),
        checkpoints=committed_checkpoints(context.artifact),
        workers=context.config.train_repae.workers,
    )
