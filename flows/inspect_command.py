"""`repae plan`, `runs`, `report`, `verify`: look at a store without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from repae_core.artifacts import Artifact, Store, list_runs, load_run
from repae_core.config import STAGES, load_config, stage_name
from repae_core.config.environment import store_url


def print_plan(preset: str, sets: Sequence[str], store: str, force: Sequence[str]) -> None:
    """What would happen to each stage, and why."""
    from flows.run_command import resolved
    from tasks.decisions import decide_all
    from tasks.pipeline_run import forced_stages
    from tasks.plan import make_plan

    config = resolved(preset, sets, store)
    opened = Store(config.store, retry_seconds=10)
    opened.check()
    plan = make_plan(config, opened)
    table = Table(title=f"plan for {preset} in {opened.url}")
    for column in ("stage", "would", "why", "fingerprint"):
        table.add_column(column, overflow="fold")
    for name, decision in decide_all(plan, forced_stages(force)).items():
        table.add_row(name, decision.action, decision.reason, plan.stages[name].artifact.fingerprint)
    console = Console()
    console.print(table)
    console.print(f"Images   {plan.source.describe()}", soft_wrap=True, markup=False, highlight=False)


def print_runs(store: str) -> None:
    """One line a run."""
    opened = open_store(store)
    table = Table(title=f"runs in {opened.url}")
    for column in ("run", "kind", "status", "made", "skipped", "created"):
        table.add_column(column, no_wrap=column == "run")
    for record in list_runs(opened):
        states = [stage.status for stage in record.stages.values()]
        made, skipped = states.count("made"), states.count("skipped")
        table.add_row(record.run_id, record.kind, record.status, str(made), str(skipped), record.created_at)
    Console().print(table)


def make_report(run: str, store: str, output: str) -> None:
    """Write `report.html` beside the run's record, and a copy where asked."""
    from tasks.report import render_report, write_report

    opened = open_store(store)
    record = load_run(opened, run)
    console = Console()
    console.print(f"Report   {write_report(opened, record)}", soft_wrap=True)
    if output:
        Path(output).write_text(render_report(opened, record))
        console.print(f"Copy     {output}", soft_wrap=True)


def verify_artifacts(stage: str, store: str) -> None:
    """Check sha256 of every artifact's files.

    Raises:
        RuntimeError: something is broken; each problem was printed.
    """
    opened, console = open_store(store), Console()
    problems, seen = 0, 0
    for name in [stage_name(stage)] if stage else STAGES:
        for fingerprint in opened.folders(name):
            artifact, seen = Artifact(opened, name, fingerprint), seen + 1
            if artifact.manifest() is None:
                console.print(f"{name}/{fingerprint}: unfinished")
                continue
            found = artifact.verify()
            problems += len(found)
            console.print(f"{name}/{fingerprint}: {'; '.join(found) if found else 'sound'}", soft_wrap=True)
    console.print(f"{seen} artifacts in {opened.url}, {problems} problems", soft_wrap=True)
    if problems:
        raise RuntimeError(f"{problems} broken file(s) in {opened.url}")


def open_store(store: str, *, may_be_new: bool = False) -> Store:
    """The store in force, checked.

    Raises:
        ValueError: a folder that does not exist: mistyped, or nothing was made yet.
    """
    opened = Store(store_url(load_config(), store), retry_seconds=10)
    if not may_be_new and opened.is_local and not Path(opened.root).is_dir():
        raise ValueError(f"no store in {opened.url}: nothing was made there yet; say --store, or set REPAE_STORE")
    opened.check()
    return opened
