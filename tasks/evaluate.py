"""Stage 7: scores of the generated images and of the VAE."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("evaluate")
def evaluate(run: PipelineRun) -> dict[str, Any]:
    """Frechet distance and the other scores, with their protocol."""
    return run_stage(run, "evaluate", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.data import ImageShards
    from repae_core.stages.evaluate import evaluate_samples

    config, section = context.config, context.config.evaluate
    metrics = evaluate_samples(
        context.inputs["samples"],
        ImageShards(context.inputs["images"]),
        context.inputs["vae"],
        context.artifact,
        extractor_name=section.extractor,
        extractor_weights=section.extractor_weights or None,
        reference=section.reference,
        neighbours=section.neighbours,
        vae_images=section.vae_images,
        untrained_baseline=section.untrained_baseline,
        seed=config.seed,
        batch_size=section.batch_size,
        progress=context.progress,
    )
    scores = {
        f"{row}.{name}": value
        for row, values in metrics["rows"].items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    if section.vae_images:
        context.tracking.log_picture(context.artifact.read_bytes("reconstructions.png"), "reconstructions")
    return StageOutcome(summary=metrics, scores=scores)
