"""What a training logs at its steps, as JSON lines in its folder: rows of `step`, `images_seen` and named values."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping

from repae_core.artifacts.artifact import LOGS, Artifact

logger = logging.getLogger("repae_core")

METRICS = "metrics.jsonl"  # losses and gradient norms, written at the end: the same in every run of the same settings
PERFORMANCE = f"{LOGS}performance.jsonl"  # what was measured on the way, written before each checkpoint


def as_lines(rows: Iterable[Mapping[str, float]]) -> bytes:
    """The file's content."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def read_rows(artifact: Artifact, name: str) -> list[dict[str, float]]:
    """The rows of METRICS or PERFORMANCE; none where the file is not there. What is no row is left out, with a warning:
    curves are no reason to stop a training.
    """
    if not artifact.exists(name):
        return []
    lines = artifact.read_bytes(name).decode(errors="replace").splitlines()
    rows = [row for row in map(_row, lines) if row is not None]
    if len(rows) < len(lines):
        logger.warning("%s/%s is damaged: %d lines left out", artifact.uri, name, len(lines) - len(rows))
    return rows


def _row(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "images_seen"} <= row.keys() else None
