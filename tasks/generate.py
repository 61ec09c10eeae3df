"""Stage 6: images from a checkpoint."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.sharding import write_shards
from tasks.sharding_worker import generate_worker, sample_work
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("generate")
def generate(run: PipelineRun) -> dict[str, Any]:
    """Sample images and the grid from the trained model."""
    return run_stage(run, "generate", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.stages.generate import finish_samples

    section = context.config.generate
    work = sample_work(context.config, context.inputs, context.artifact)
    description = write_shards(
        context,
        generate_worker,
        workers=section.workers,
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker,
    )
    summary, known = finish_samples(work, description, grid_classes=section.grid_classes)
    context.tracking.log_picture(lambda: context.artifact.read_bytes("grid.png"), "grid")
    return StageOutcome(summary=summary, known=known, workers=section.workers)
