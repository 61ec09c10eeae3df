"""The record of a pipeline run: `runs/{run_id}/run.json`, written at the start and after every stage."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, ValidationError

from repae_core.artifacts.manifest import Record
from repae_core.artifacts.store import Store

FOLDER = "runs"


class StageRecord(Record):
    """A stage in a run. seconds: of the work, also where an earlier run did it (then status is `skipped`)."""

    fingerprint: str
    status: Literal["pending", "running", "made", "skipped", "failed", "cancelled"]
    uri: str = ""
    started_at: str = ""
    seconds: float | None = None
    mlflow_run_id: str | None = None
    message: str = ""
    made_by_run: str | None = None


class RunRecord(Record):
    """One run of the pipeline or of a single stage (`kind`), with its resolved config."""

    run_id: str
    kind: str
    created_at: str
    status: Literal["running", "finished", "failed", "cancelled"]
    config: dict[str, Any]
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    mlflow_run_id: str | None = None
    mlflow_tracking_uri: str = ""
    prefect_flow_run_id: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def new_run_id() -> str:
    """UTC time and four random hex digits: sorts by time, unique enough for one store."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def save_run(store: Store, record: RunRecord) -> None:
    """Write the record."""
    store.write_json(f"{FOLDER}/{record.run_id}/run.json", record.model_dump(mode="json"))


def load_run(store: Store, reference: str) -> RunRecord:
    """The run with this id or unique prefix, or the `latest`.

    Raises:
        ValueError: no such run, several, or a damaged record; one line.
    """
    known = [name for name in store.folders(FOLDER) if store.exists(f"{FOLDER}/{name}/run.json")]
    if not known:
        raise ValueError(f"no runs in {store.url}; start one with `repae run`")
    found = known[-1:] if reference == "latest" else [name for name in known if name.startswith(reference)]
    if len(found) != 1:
        problem = "fits several runs" if found else "is no run"
        raise ValueError(f"{reference!r} {problem} of {store.url}; the newest: {', '.join(known[:-4:-1])}")
    key = f"{FOLDER}/{found[0]}/run.json"
    try:
        return RunRecord.model_validate(store.read_json(key))
    except ValidationError as error:
        raise ValueError(f"{store.uri(key)}: {error.errors()[0]['msg']}") from None


def list_runs(store: Store) -> list[RunRecord]:
    """Every readable run, newest first."""
    names = [name for name in store.folders(FOLDER) if store.exists(f"{FOLDER}/{name}/run.json")]
    return [load_run(store, name) for name in reversed(names)]
