"""Stage 6: images from a checkpoint."""

from __future__ import annotations

from typing import Any

from tasks.pipeline_run import PipelineRun
from tasks.stage import StageContext, StageOutcome, run_stage, stage_task


@stage_task("generate")
def generate(run: PipelineRun) -> dict[str, Any]:
    """Sample images and the grid from the trained model."""
    return run_stage(run, "generate", execute)


def execute(context: StageContext) -> StageOutcome:
    """The stage's work."""
    from repae_core.generation.load import build_generator
    from repae_core.stages.generate import generate_images

    config, section = context.config, context.config.generate
    generator = build_generator(
        context.inputs["model"],
        context.inputs["vae"],
        checkpoint=section.checkpoint,
        weights=section.weights,
        sampler=section.sampler,
        steps=section.sampler_steps,
        guidance=section.guidance,
        interval=section.guidance_interval,
        rounding=section.rounding,
        bn_inverse_without_eps=config.compat.bn_inverse_without_eps,
    )
    summary = generate_images(
        generator,
        context.artifact,
        num_images=section.num_images,
        labels="random" if config.compat.random_labels else section.labels,
        seed=config.seed,
        weights=section.weights,
        images_per_shard=section.images_per_shard,
        batch_size=section.batch_size,
        progress=context.progress,
    )
    context.tracking.log_picture(context.artifact.read_bytes("grid.png"), "grid")
    return StageOutcome(summary=summary)
