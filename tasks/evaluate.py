"""Stage 7: scores of the generated images and of the VAE."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from prefect.artifacts import create_table_artifact
from prefect.context import FlowRunContext

from tasks.pipeline_run import PipelineRun
from tasks.sharding import write_shards
from tasks.sharding_worker import evaluation, evaluation_worker
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task

logger = logging.getLogger("repae")


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
    _show_in_prefect(rows, metrics["protocol"])
    return StageOutcome(summary=metrics, scores=scores, workers=section.workers)


def _show_in_prefect(rows: list[dict[str, Any]], protocol: dict[str, str]) -> None:
    if FlowRunContext.get() is not None:
        words = "; ".join(f"{name}: {value}" for name, value in protocol.items())
        try:
            create_table_artifact(table=rows, key="scores", description=words)
        except Exception as error:  # the table is in the artifact and in MLflow
            logger.warning("the scores are not on the run's page in Prefect: %s", " ".join(str(error).split())[:200])
