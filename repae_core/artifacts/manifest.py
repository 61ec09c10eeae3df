"""What a finished stage says of itself: `manifest.json`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen JSON record; unknown keys of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class FileEntry(Record):
    """One file of an artifact: name relative to its folder, bytes, sha256 (hex)."""

    name: str
    bytes: int
    sha256: str


class InputEntry(Record):
    """An artifact that was read, with the sha256 of its manifest as it was then."""

    stage: str
    fingerprint: str
    manifest_sha256: str


class Manifest(Record):
    """Written last: an artifact with a manifest and all its files is whole.

    config: what the fingerprint was made from; inputs by role; checkpoints: images seen of those kept;
    asked_by: the Prefect flow run (else the pipeline run) that made it; started_at, finished_at: ISO 8601 UTC;
    seconds: of the attempt that finished.
    """

    stage: str
    fingerprint: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, InputEntry]
    files: list[FileEntry]
    checkpoints: list[int] = Field(default_factory=list)
    mlflow_run_id: str | None = None
    asked_by: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    workers: int = 0
    started_at: str
    finished_at: str
    seconds: float
    summary: dict[str, Any] = Field(default_factory=dict)
