"""Stage 4: posterior mean and std of every image."""

from __future__ import annotations

from typing import Any

from repae_core.artifacts import FileEntry
from tasks.pipeline_run import PipelineRun
from tasks.sharding import write_shards
from tasks.sharding_worker import latent_work, latent_worker
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("cache-latents")
def cache_latents(run: PipelineRun) -> dict[str, Any]:
    """Encode all images once, with the encoders' features if asked."""
    return run_stage(run, "cache-latents", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.artifact_models import unmeasured_stats
    from repae_core.stages.cache_latents import require_space

    section = context.config.cache_latents
    work = latent_work(context.config, context.inputs, context.artifact)
    require_space(work)
    write_shards(
        context,
        latent_worker,
        workers=section.workers,
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker,
    )
    summary = work.writer.finish(unmeasured_stats(context.inputs["vae"]))
    known = [FileEntry(**shard["file"]) for shard in context.artifact.read_json("index.json")["shards"]]
    return StageOutcome(summary=summary, known=known, workers=section.workers)
