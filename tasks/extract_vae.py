"""Stage 3: the tuned VAE out of a joint checkpoint."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("extract-vae")
def extract_vae(run: PipelineRun) -> dict[str, Any]:
    """Write the VAE, its measured latent statistics and a diffusers folder."""
    return run_stage(run, "extract-vae", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work; the VAE becomes a registered model version."""
    from repae_core.data import ImageShards
    from repae_core.stages.extract_vae import extract_vae

    section = context.config.extract_vae
    summary = extract_vae(
        context.inputs["model"],
        ImageShards(context.inputs["images"]),
        context.artifact,
        checkpoint=section.checkpoint,
        weights=section.weights,
        stats_images=section.stats_images,
        ema_latent_stats=context.config.compat.ema_latent_stats,
        export_diffusers=section.export_diffusers,
        seed=context.config.seed,
        batch_size=section.batch_size,
        progress=context.progress,
    )
    files = {name: context.artifact.read_bytes(name) for name in ("vae.safetensors", "vae.json", "latent_stats.json")}
    model = context.run.tracker.register_model(
        context.tracking.run_id, "repae-vae", files, {"artifact": context.artifact.uri}
    )
    return StageOutcome(summary=summary | {"registered_model": model})
