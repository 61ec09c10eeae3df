"""Stage 7: scores of the generated images and of the VAE."""

from __future__ import annotations

from functools import partial
from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.run_page import publish_scores
from tasks.sharding import write_shards
from tasks.sharding_worker import evaluation, evaluation_worker
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("evaluate")
def evaluate(run: PipelineRun) -> dict[str, Any]:
    """Frechet distance and the other scores, with their protocol."""
    return run_stage(run, "evaluate", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work; the table also goes to MLflow and Prefect."""
    section = context.config.evaluate
    evaluated = evaluation(context.config, context.inputs, context.artifact)
    write_shards(
        context,
        evaluation_worker,
        workers=section.workers,
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker,
    )
    metrics = evaluated.finish()
    scores = {
        f"{row}.{name}": value
        for row, values in metrics["rows"].items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    for name in ("reconstructions", "latents", "neighbours"):
        if context.artifact.exists(f"{name}.png"):
            context.tracking.log_picture(partial(context.artifact.read_bytes, f"{name}.png"), name)
    rows = [{"row": name} | {c: values.get(c) for c in metrics["columns"]} for name, values in metrics["rows"].items()]
    context.tracking.log_table(rows, "scores")
    publish_scores(rows, metrics["protocol"])
    return StageOutcome(summary=metrics, scores=scores, workers=section.workers)
