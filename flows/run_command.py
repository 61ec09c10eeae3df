"""`repae run` and `repae stage`: resolve the config, start the flow, show what was made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from flows.environment import end_orphaned_servers
from repae_core.artifacts import Artifact, RunRecord, Store, load_run
from repae_core.config import PipelineConfig, load_config, stage_name
from repae_core.config.environment import repae_home, store_url


def run_pipeline(preset: str, sets: Sequence[str], store: str, force: Sequence[str]) -> None:
    """The whole pipeline as the Prefect flow `full-pipeline`."""
    config = resolved(preset, sets, store)
    check_before_start(config, force)
    end_orphaned_servers()
    from flows.full_pipeline import full_pipeline

    result = full_pipeline(preset=saved_config(config), force=",".join(force))
    show_result(config, result["run_id"])


def run_one_stage(name: str, preset: str, sets: Sequence[str], store: str, inputs: str, force: bool) -> None:
    """One stage as its Prefect flow."""
    stage = stage_name(name)
    config = resolved(preset, sets, store)
    check_before_start(config, [stage] if force else [], only=stage, inputs=inputs)
    end_orphaned_servers()
    from flows import stages

    getattr(stages, stage.replace("-", "_"))(preset=saved_config(config), inputs=inputs, force=force)
    show_result(config, "latest")


def resolved(preset: str, sets: Sequence[str], store: str) -> PipelineConfig:
    """The frozen config with the store in force, made absolute."""
    config = load_config(preset, sets)
    url = Store(store_url(config, store)).url
    os.environ["REPAE_STORE"] = url  # what the flow, which resolves anew, finds in force: --store wins
    return config.model_copy(update={"store": url})


def check_before_start(
    config: PipelineConfig, force: Sequence[str], only: str | None = None, inputs: str = "auto"
) -> None:
    """Everything that can be wrong in the input, before any service starts."""
    from tasks.decisions import decide
    from tasks.pipeline_run import forced_stages
    from tasks.plan import make_plan, require_scorable
    from tasks.stage import require_inputs
    from tasks.stage_inputs import input_references

    forced = forced_stages(force)
    store = Store(config.store, retry_seconds=10)
    store.check()
    references = {only: input_references(config, only, inputs)} if only else {}
    if only in (None, "evaluate"):
        require_scorable(config)
    plan = make_plan(config, store, references=references)
    if only is not None:
        if only not in plan.stages:
            raise ValueError(
                f"{only} is not part of this config: cache_latents.vae={config.cache_latents.vae!r} replaces it"
            )
        planned = plan.stages[only]
        if decide(planned, forced=only in forced).action != "skip":
            require_inputs(planned)


def saved_config(config: PipelineConfig) -> str:
    """Path of the resolved config as a file: what the flow gets as its preset."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    folder = repae_home() / "configs"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    path.write_text(text)
    return str(path)


def show_result(config: PipelineConfig, run: str) -> None:
    """The last screen: what was made, where it is, and the commands that show it."""
    store = Store(config.store)
    record = load_run(store, run)
    console = Console()
    console.print(stage_table(record))
    console.print(f"Store    {store.url}/<stage>/<fingerprint>", soft_wrap=True)
    images = record.stages.get("preprocess")
    if images is not None and images.status in ("made", "skipped"):
        console.print(f"Images   {made_images(store, images.fingerprint)}", soft_wrap=True, highlight=False)
    grid = record.stages.get("generate")
    if grid is not None and grid.status in ("made", "skipped"):
        console.print(f"Samples  {grid.uri}/grid.png", soft_wrap=True)
    report = Path(store.uri(f"runs/{record.run_id}/report.html"))
    if store.exists(f"runs/{record.run_id}/report.html"):
        console.print(f"Report   {report}   (again: repae report {record.run_id})", soft_wrap=True)
    console.print(f"MLflow   mlflow ui --backend-store-uri {record.mlflow_tracking_uri}", soft_wrap=True)


def made_images(store: Store, fingerprint: str) -> str:
    """What a finished `preprocess` made and left out, and where the reasons are."""
    made = Artifact(store, "preprocess", fingerprint)
    index = made.read_json("index.json")
    return (
        f"{index['num_images']} in {index['num_classes']} classes; {index['num_skipped']} names failed, "
        f"{index['num_other_files']} others are left out: {made.uri}/skipped.jsonl"
    )


def stage_table(record: RunRecord) -> Table:
    """Stages of a run with their state, time and artifact."""
    table = Table(title=f"run {record.run_id}: {record.status}")
    for column in ("stage", "state", "seconds", "fingerprint"):
        table.add_column(column, overflow="fold")
    for name, stage in record.stages.items():
        table.add_row(name, stage.status, f"{stage.seconds or 0:.0f}", stage.fingerprint)
    return table
