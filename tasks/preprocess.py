"""Stage 1: raw images to WebDataset shards."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage


@task(name="preprocess", cache_policy=NO_CACHE)
def preprocess(run: PipelineRun) -> dict[str, Any]:
    """Crop, resize and pack the source images."""
    return run_stage(run, "preprocess", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.data import open_source, preprocess_images

    section = context.config.preprocess
    summary = preprocess_images(
        open_source(section.source),
        context.artifact,
        resolution=section.resolution,
        images_per_shard=section.images_per_shard,
        seed=context.config.seed,
        encoding=section.encoding,
        max_skipped_fraction=section.max_skipped_fraction,
        processes=section.processes,
        progress=context.progress,
    )
    return StageOutcome(summary=summary)
