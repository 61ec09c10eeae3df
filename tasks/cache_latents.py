"""Stage 4: posterior mean and std of every image."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage


@task(name="cache-latents", cache_policy=NO_CACHE)
def cache_latents(run: PipelineRun) -> dict[str, Any]:
    """Encode all images once, with the encoders' features if asked."""
    return run_stage(run, "cache-latents", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.artifact_models import load_vae
    from repae_core.data import ImageShards
    from repae_core.stages.cache_latents import cache_latents

    config, section = context.config, context.config.cache_latents
    summary = cache_latents(
        load_vae(context.inputs["vae"]),
        ImageShards(context.inputs["images"]),
        context.artifact,
        dtype=section.dtype,
        flip=section.flip,
        encoders=section.encoder,
        encoder_weights=section.encoder_weights,
        encoder_grid=section.encoder_grid,
        patch_size=config.train_ldm.patch_size,
        spatial_norm=config.train_ldm.spatial_norm,
        batch_size=section.batch_size,
        progress=context.progress,
    )
    return StageOutcome(summary=summary)
