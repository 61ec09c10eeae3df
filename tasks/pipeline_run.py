"""One run of the pipeline or of a stage: its plan, record, MLflow parent, Ray session and display."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from repae_core.artifacts import RunRecord, StageRecord, Store, StoreError, new_run_id, save_run
from repae_core.artifacts.parting import at_the_end
from repae_core.config import STAGES, PipelineConfig, section_name, stage_name
from tasks.continuation import require_init_of_pipeline
from tasks.display import Display
from tasks.gpus import require_gpus_of_pipeline
from tasks.plan import Plan, make_plan, require_scorable
from tasks.progress_page import ProgressPage
from tasks.ray_session import RaySession
from tasks.run_page import publish_run_page
from tasks.tracking import Tracker

logger = logging.getLogger("repae")


@dataclass
class PipelineRun:
    """What the stages of one run share; open it with `open_run`."""

    config: PipelineConfig
    store: Store
    plan: Plan
    record: RunRecord
    tracker: Tracker
    display: Display
    session: RaySession
    forced: set[str] = field(default_factory=set)
    page: ProgressPage = field(default_factory=ProgressPage)

    @property
    def run_id(self) -> str:
        """Name of the folder below `runs/`."""
        return self.record.run_id

    @property
    def asked_by(self) -> str:
        """Prefect's flow run, the same in all its attempts and after its process is lost; without one this run."""
        return self.record.prefect_flow_run_id or self.run_id

    def needs(self, stage: str) -> bool:
        """Whether the pipeline's result depends on a stage."""
        return stage not in self.plan.not_needed

    def record_stage(self, name: str, stage: StageRecord) -> None:
        """Note a stage's state; run.json is written at every change."""
        stages = {**self.record.stages, name: stage}
        self.record = self.record.model_copy(update={"stages": stages})
        save_run(self.store, self.record)

    @contextlib.contextmanager
    def showing(self, stage: str, reason: str) -> Iterator[None]:
        """The stage's progress, in the terminal and on Prefect's page, while it runs."""
        with self.display.stage(stage, reason), self.page.stage(stage):
            yield

    def progress(self, stage: str, done: int, total: int, *, note: str = "") -> None:
        """Position of a running stage; never waits for Prefect, and a terminal that is gone is no error."""
        with contextlib.suppress(OSError):
            self.display.update(stage, done, total, note=note)
        self.page.update(stage, done, total, note=note)


def forced_stages(names: Iterable[str]) -> set[str]:
    """`--force STAGE` re-runs that stage and what follows; ValueError for an unknown stage."""
    forced: set[str] = set()
    for name in names:
        forced.update(STAGES[STAGES.index(stage_name(name)) :])
    return forced


@contextlib.contextmanager
def open_run(
    config: PipelineConfig,
    *,
    kind: str,
    force: Iterable[str] = (),
    references: Mapping[str, Mapping[str, str]] | None = None,
    prefect_flow_run_id: str | None = None,
    display: Display | None = None,
) -> Iterator[PipelineRun]:
    """Check the store and the inputs, open MLflow's parent run and `run.json`; close all in the end.

    Raises:
        ValueError, StoreError, ConnectionError: bad input or an unreachable service, before any work.
    """
    forced = forced_stages(force)
    store = Store(config.store, retry_seconds=config.store_retry_seconds)
    store.check()
    distributed = [name for name in map(section_name, STAGES) if getattr(getattr(config, name), "workers", 0)]
    if store.url.startswith("memory:") and distributed:
        raise ValueError(f"store: memory:// works only with {distributed[0]}.workers=0")
    if kind in ("full-pipeline", "evaluate"):
        require_scorable(config)
    plan = make_plan(config, store, references=references)
    if kind == "full-pipeline":  # a single stage asks itself, if it is not skipped
        require_gpus_of_pipeline(config, plan, forced)
        require_init_of_pipeline(config, plan)
    run_id = new_run_id()
    session, display = RaySession(), display or Display()
    try:
        tracker = Tracker(config.experiment)
        with tracker.pipeline_run(f"{kind}-{run_id}", config.model_dump(mode="json")) as parent_id:
            record = RunRecord(
                run_id=run_id,
                kind=kind,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                status="running",
                config=config.model_dump(mode="json"),
                mlflow_run_id=parent_id,
                mlflow_tracking_uri=tracker.display_uri,
                prefect_flow_run_id=prefect_flow_run_id,
            )
            save_run(store, record)
            run = PipelineRun(config, store, plan, record, tracker, display, session, forced)
            with _status_recorded(run):
                yield run
    finally:
        session.close()
        display.close()


@contextlib.contextmanager
def _status_recorded(run: PipelineRun) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(StoreError):  # what ended the run is the news
            _record_status(run, how_it_ended(error), error)
        raise
    _record_status(run, "finished")


def how_it_ended(error: BaseException) -> Literal["failed", "cancelled"]:
    """Prefect's cancel and Ctrl-C are no `Exception`."""
    return "failed" if isinstance(error, Exception) else "cancelled"


def _record_status(
    run: PipelineRun, status: Literal["failed", "cancelled", "finished"], error: BaseException | None = None
) -> None:
    run.record = run.record.model_copy(update={"status": status})
    try:
        at_the_end(error, lambda: save_run(run.store, run.record))
    finally:
        run.tracker.describe(_description(run.record), hurried=status == "cancelled")
        if run.record.prefect_flow_run_id:
            publish_run_page(run.store, run.record)


def _description(record: RunRecord) -> str:
    """The run as MLflow shows it: which run made each stage's artifact, also where it was skipped."""
    rows = [
        f"| {name} | {stage.status} | {stage.seconds or 0:.0f} | `{stage.mlflow_run_id or '-'}` | `{stage.uri}` |"
        for name, stage in record.stages.items()
    ]
    head = ["| stage | state | seconds | made by MLflow run | artifact |", "|---|---|---|---|---|"]
    return "\n".join([f"Run `{record.run_id}`: {record.status}", "", *head, *rows])
