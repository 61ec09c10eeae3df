"""One Prefect flow a stage, each deployable and startable alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Flow, flow, runtime

from flows.parameters import Overrides, Preset, flow_config, run_name
from tasks.cache_latents import cache_latents as cache_latents_task
from tasks.evaluate import evaluate as evaluate_task
from tasks.extract_vae import extract_vae as extract_vae_task
from tasks.generate import generate as generate_task
from tasks.pipeline_run import PipelineRun, open_run
from tasks.preprocess import preprocess as preprocess_task
from tasks.stage_inputs import input_references
from tasks.train_ldm import train_ldm as train_ldm_task
from tasks.train_repae import train_repae as train_repae_task

STAGE_TASKS: dict[str, Callable[[PipelineRun], dict[str, Any]]] = {
    "preprocess": preprocess_task,
    "train-repae": train_repae_task,
    "extract-vae": extract_vae_task,
    "cache-latents": cache_latents_task,
    "train-ldm": train_ldm_task,
    "generate": generate_task,
    "evaluate": evaluate_task,
}


def stage_flow(stage: str) -> Flow[..., dict[str, Any]]:
    """The flow that runs one stage on artifacts that exist already."""

    def run(
        preset: Preset = "quickstart",
        overrides: Overrides = Overrides(),  # noqa: B008
        inputs: str = "latest",
        force: bool = False,
    ) -> dict[str, Any]:
        config = flow_config(preset, overrides)
        references = {stage: input_references(config, stage, inputs)}
        flow_run_id = str(runtime.flow_run.id or "") or None
        with open_run(
            config,
            kind=stage,
            force=[stage] if force else [],
            references=references,
            prefect_flow_run_id=flow_run_id,
        ) as opened:
            return STAGE_TASKS[stage](opened)

    run.__name__ = stage.replace("-", "_")
    run.__doc__ = f"""{STAGE_TASKS[stage].__doc__}

    Args:
        preset: One of the presets in the list; the overrides change it.
        overrides: Fields to change; empty = as in the preset.
        inputs: `latest` (newest model, latents or samples, with what they were made from; an artifact that the config
            names stays), `auto` (what this config makes), or role=reference pairs separated by commas.
        force: Run even if the artifact exists.
    """
    return flow(name=stage, flow_run_name=run_name)(run)


preprocess = stage_flow("preprocess")
train_repae = stage_flow("train-repae")
extract_vae = stage_flow("extract-vae")
cache_latents = stage_flow("cache-latents")
train_ldm = stage_flow("train-ldm")
generate = stage_flow("generate")
evaluate = stage_flow("evaluate")
