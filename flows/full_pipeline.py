"""The whole pipeline: the chain as in the README's picture."""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime

from flows.parameters import Overrides, Preset, flow_config, run_name
from repae_core.config import STAGES
from tasks.cache_latents import cache_latents
from tasks.evaluate import evaluate
from tasks.extract_vae import extract_vae
from tasks.generate import generate
from tasks.pipeline_run import open_run
from tasks.preprocess import preprocess
from tasks.report import write_report
from tasks.train_ldm import train_ldm
from tasks.train_repae import train_repae


@flow(name="full-pipeline", flow_run_name=run_name)
def full_pipeline(
    preset: Preset = "quickstart",
    overrides: Overrides = Overrides(),  # noqa: B008
    force: str = "",
) -> dict[str, Any]:
    """Preprocess, joint training, VAE extraction, latent cache, latent training, generation, evaluation.

    Args:
        preset: One of the presets in the list; the overrides change it.
        overrides: Fields to change; empty = as in the preset.
        force: Stages to run even if their artifact exists, separated by commas; what follows runs too.
    """
    config = flow_config(preset, overrides)
    with open_run(
        config,
        kind="full-pipeline",
        force=[name.strip() for name in force.split(",") if name.strip()],
        prefect_flow_run_id=str(runtime.flow_run.id or "") or None,
    ) as run:
        preprocess(run)
        if run.needs("train-repae"):
            train_repae(run)
            extract_vae(run)
        if run.needs("train-ldm"):
            cache_latents(run)
            train_ldm(run)
        generate(run)
        evaluate(run)
        report = write_report(run.store, run.record)
    return {"run_id": run.run_id, "report": report, "stages": [s for s in STAGES if run.needs(s)]}
