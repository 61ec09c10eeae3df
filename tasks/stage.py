"""The only place that decides skip, resume or run, opens the MLflow run and commits the manifest."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE

from repae_core.artifacts import Artifact, FileEntry, InputEntry, Lease, LeaseHeld, LeaseLost, StageRecord, StoreError
from repae_core.artifacts.parting import at_the_end
from repae_core.config import Config, PipelineConfig
from tasks.decisions import Decision, decide, stale_input
from tasks.gpus import require_gpus
from tasks.outbox import PROGRAMMING_ERRORS
from tasks.pipeline_run import PipelineRun, how_it_ended
from tasks.plan import VERSIONS, PlannedStage
from tasks.ray_launch import FinalError, FinalStoreError, WorkersFailedError
from tasks.stage_log import stage_log
from tasks.tracking import StageRun

logger = logging.getLogger("repae")


@dataclass(frozen=True)
class StageContext:
    """What a stage's `execute` works with."""

    run: PipelineRun
    planned: PlannedStage
    lease: Lease
    tracking: StageRun

    @property
    def config(self) -> PipelineConfig:
        """The whole resolved config."""
        return self.run.config

    @property
    def section(self) -> Config:
        """This stage's config."""
        return self.run.config.section(self.planned.name)

    @property
    def artifact(self) -> Artifact:
        """The folder that the stage fills."""
        return self.planned.artifact

    @property
    def inputs(self) -> dict[str, Artifact]:
        """What the stage reads, by role."""
        return self.planned.inputs

    def progress(self, done: int, total: int, *, note: str = "") -> None:
        """Images (or steps) done of all, for the terminal and Prefect's page; trouble with either is a warning."""
        self.run.progress(self.planned.name, done, total, note=note)


@dataclass(frozen=True)
class StageOutcome:
    """What a stage hands back: a small summary, and hashes already known."""

    summary: dict[str, Any]
    known: Sequence[FileEntry] = ()
    checkpoints: Sequence[int] = ()
    workers: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)


Execute = Callable[[StageContext], StageOutcome]
_FINAL = (ValueError, LeaseHeld, LeaseLost, FinalError, WorkersFailedError, *PROGRAMMING_ERRORS)


def stage_task(name: str) -> Callable[[Callable[[PipelineRun], dict[str, Any]]], Task[[PipelineRun], dict[str, Any]]]:
    """A stage as a Prefect task. Its own artifact decides what is skipped, so Prefect caches nothing.

    It is retried as often as PREFECT_TASKS_DEFAULT_RETRIES says (deployments set it), and continues then where it was.
    REPAE_STAGE_TIMEOUT_SECONDS ends an attempt that takes longer; without it only a training step's time is watched.
    """
    return task(name=name, cache_policy=NO_CACHE, retry_condition_fn=may_pass, timeout_seconds=_time_limit())


def _time_limit() -> float | None:
    given = os.environ.get("REPAE_STAGE_TIMEOUT_SECONDS") or "0"
    try:
        return max(float(given), 0) or None
    except ValueError:
        raise ValueError(f"REPAE_STAGE_TIMEOUT_SECONDS={given}: not a number of seconds") from None


@contextlib.contextmanager
def _time_limit_told(name: str) -> Iterator[None]:
    """Prefect ends a task whose time is over with a bare CancelledError; a TimeoutError that people can read."""
    try:
        yield
    except CancelledError:
        limit = _time_limit()
        if limit is None:
            raise
        told = f"{name} took longer than REPAE_STAGE_TIMEOUT_SECONDS={limit:.0f}; run again to continue"
        raise TimeoutError(told) from None


def may_pass(_task: Any, _task_run: Any, state: State[Any]) -> bool:
    """Whether a failed stage is worth another try: not if the input is at fault, or workers were restarted in vain."""
    return isinstance(state.data, FinalStoreError) or not isinstance(state.data, _FINAL)


def run_stage(run: PipelineRun, name: str, execute: Execute) -> dict[str, Any]:
    """Skip, resume or run one stage; returns a reference to its artifact (small JSON).

    Raises:
        ValueError: an input artifact is missing or broken: names the command that makes it; or GPUs are missing.
        LeaseHeld: another process is making this artifact.
    """
    planned = run.plan.stages[name]
    decision = _decision(run, planned)
    if decision.action == "skip":
        return _skip(run, planned)
    require_inputs(planned)
    require_gpus(run.config, name)
    logger.info("%s: %s (%s) -> %s", name, decision.action, decision.reason, planned.artifact.uri)
    started = time.monotonic()
    record = StageRecord(fingerprint=planned.artifact.fingerprint, status="running", uri=planned.artifact.uri,
                         started_at=_now())  # fmt: skip
    run.record_stage(name, record)
    try:
        with Lease(planned.artifact.store, planned.artifact.key("lease.json")) as lease:
            decision = _decision(run, planned)
            if decision.action == "skip":  # another run has finished it meanwhile
                return _skip(run, planned)
            prepared, showing = _prepared(run, planned, decision, lease), run.showing(name, decision.reason)
            with _time_limit_told(name), prepared as context, showing:
                outcome = execute(context)
                _commit(context, outcome, started)
    except BaseException as error:
        message = " ".join(str(error).split())[:500] or type(error).__name__
        seconds = time.monotonic() - started
        ended = record.model_copy(update={"status": how_it_ended(error), "message": message, "seconds": seconds})
        with contextlib.suppress(StoreError):  # the failure itself is the news
            at_the_end(error, lambda: run.record_stage(name, ended))
        raise
    seconds = time.monotonic() - started
    finished = {"status": "made", "seconds": seconds, "mlflow_run_id": context.tracking.run_id,
                "made_by_run": run.run_id, "message": decision.reason}  # fmt: skip
    run.record_stage(name, record.model_copy(update=finished))
    return reference(planned)


def reference(planned: PlannedStage) -> dict[str, Any]:
    """What Prefect passes on."""
    return {"stage": planned.name, "fingerprint": planned.artifact.fingerprint, "uri": planned.artifact.uri}


def require_inputs(planned: PlannedStage) -> None:
    """Every input must be whole; ValueError naming the command that makes a missing one."""
    for role, artifact in planned.inputs.items():
        if not artifact.is_whole():
            raise ValueError(
                f"{planned.name} needs {role} {artifact.stage}/{artifact.fingerprint}, which is not in the store "
                f"{artifact.store.url}; make it with `repae stage {artifact.stage}` and the same settings"
            )


def _decision(run: PipelineRun, planned: PlannedStage) -> Decision:
    """A forced stage is made anew once: what this Prefect flow run has begun it continues, in whatever attempt."""
    forced = planned.name in run.forced and _begun_by(planned.artifact) != run.asked_by
    return decide(planned, forced=forced)


def _begun_by(artifact: Artifact) -> str | None:
    if manifest := artifact.manifest():
        return manifest.asked_by
    with contextlib.suppress(FileNotFoundError):  # never begun, or its writer has just ended
        asked_by: str | None = artifact.read_json("work.json").get("asked_by")
        return asked_by
    return None


def _skip(run: PipelineRun, planned: PlannedStage) -> dict[str, Any]:
    manifest = planned.artifact.manifest()
    assert manifest is not None
    run.tracker.link_skipped(planned.name, manifest.mlflow_run_id, planned.artifact.uri)
    run.record_stage(
        planned.name,
        StageRecord(
            fingerprint=planned.artifact.fingerprint,
            status="skipped",
            uri=planned.artifact.uri,
            started_at=manifest.started_at,
            seconds=manifest.seconds,
            mlflow_run_id=manifest.mlflow_run_id,
            message="finished before",
        ),
    )
    run.display.skipped(planned.name)
    return reference(planned)


@contextlib.contextmanager
def _prepared(run: PipelineRun, planned: PlannedStage, decision: Decision, lease: Lease) -> Iterator[StageContext]:
    """A folder that holds nothing of other inputs, an MLflow run, a log file."""
    artifact = planned.artifact
    inputs = _input_entries(planned)
    work = artifact.read_json("work.json") if artifact.exists("work.json") else None
    if work is not None:
        recorded = {role: InputEntry(**entry) for role, entry in work["inputs"].items()}
        keep = decision.action == "resume" and not stale_input(planned, recorded)
    artifact.store.clear_leftovers(artifact.prefix)
    if work is None or not keep:
        artifact.discard(keep=("lease.json",))
        work = None
    resume_id = work["mlflow_run_id"] if work else None
    with run.tracker.stage_run(planned.name, artifact, resume_id) as tracking:
        artifact.write_json(
            "work.json",
            {
                "inputs": {role: entry.model_dump() for role, entry in inputs.items()},
                "mlflow_run_id": tracking.run_id,
                "started_at": work["started_at"] if work else _now(),
                "asked_by": run.asked_by,
            },
        )
        tracking.log_config({"seed": run.config.seed} | run.config.section(planned.name).model_dump(mode="json"))
        tracking.log_inputs({role: a.uri for role, a in planned.inputs.items()}, artifact.uri)
        with stage_log(artifact, f"driver-{run.run_id}", run_id=run.run_id):
            logger.info("%s: work begins on %s", planned.name, artifact.uri)
            yield StageContext(run, planned, lease, tracking)
            logger.info("%s: work is done", planned.name)


def _commit(context: StageContext, outcome: StageOutcome, started: float) -> None:
    planned = context.planned
    context.tracking.log_scores(outcome.scores)
    context.tracking.deliver()  # now: when the artifact is whole nobody will send it again
    context.lease.check()
    context.artifact.commit(
        version=VERSIONS[planned.name],
        config=planned.payload,
        inputs=_input_entries(planned),
        known=outcome.known,
        exclude=("lease.json", "work.json"),
        mlflow_run_id=context.tracking.run_id,
        asked_by=context.run.asked_by,
        versions=versions(),
        workers=outcome.workers,
        started_at=context.artifact.read_json("work.json")["started_at"],
        seconds=time.monotonic() - started,
        summary=outcome.summary,
        checkpoints=outcome.checkpoints,
    )
    context.artifact.delete("work.json")


def _input_entries(planned: PlannedStage) -> dict[str, InputEntry]:
    entries = {}
    for role, artifact in planned.inputs.items():
        digest = artifact.manifest_sha256()
        assert digest is not None
        entries[role] = InputEntry(stage=artifact.stage, fingerprint=artifact.fingerprint, manifest_sha256=digest)
    return entries


def versions() -> dict[str, str]:
    """Versions that a manifest records (never hashed)."""
    names = ("repae", "torch", "timm", "accelerate", "ray", "prefect", "mlflow", "numpy")
    return {"python": platform.python_version()} | {name: package_version(name) for name in names}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
