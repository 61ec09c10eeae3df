"""Stage 1: raw images to WebDataset shards."""

from __future__ import annotations

from typing import Any

from repae_core.artifacts import FileEntry
from tasks.pipeline_run import PipelineRun
from tasks.sharding import write_shards
from tasks.sharding_worker import preprocess_work, preprocess_worker
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("preprocess")
def preprocess(run: PipelineRun) -> dict[str, Any]:
    """Crop, resize and pack the source images."""
    return run_stage(run, "preprocess", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.data.preprocess import finish_preprocessing

    section = context.config.preprocess
    source = context.run.plan.source
    write_shards(
        context,
        preprocess_worker,
        workers=section.workers,
        cpus_per_worker=section.processes,
        listing=source.listing_digest(),
    )
    summary = finish_preprocessing(preprocess_work(context.config, source, context.artifact))
    known = [FileEntry(**shard["tar"]) for shard in context.artifact.read_json("index.json")["shards"]]
    return StageOutcome(summary=summary, known=known, workers=section.workers)
