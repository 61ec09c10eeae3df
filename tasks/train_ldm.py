"""Stage 5: a fresh SiT on the cached latents."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("train-ldm")
def train_ldm(run: PipelineRun) -> dict[str, Any]:
    """Train SiT on latents of the tuned, frozen VAE."""
    return run_stage(run, "train-ldm", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work; the moving average becomes a registered model version."""
    import json

    from repae_core.artifacts.checkpoints import (
        FOLDER,
        checkpoint_entries,
        committed_checkpoints,
        read_record,
    )
    from tasks.training import run_training

    summary = run_training(context)
    artifact, last = context.artifact, committed_checkpoints(context.artifact)[-1]
    record = read_record(artifact, last)
    files = {
        "ema.safetensors": artifact.read_bytes(f"{FOLDER}/{last}/ema.safetensors"),
        "config.json": json.dumps({"sit": record["sit"], "path": record["path"]}, indent=1).encode(),
    }
    model = context.run.tracker.register_model(
        context.tracking.run_id, "repae-sit", files, {"artifact": artifact.uri, "images_seen": str(last)}
    )
    return StageOutcome(
        summary=summary | {"registered_model": model},
        known=checkpoint_entries(artifact),
        checkpoints=committed_checkpoints(artifact),
        workers=context.config.train_ldm.workers,
    )
