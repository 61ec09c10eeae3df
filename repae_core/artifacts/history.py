"""What a training logs at its steps, as JSON lines in its folder: rows of `step`, `images_seen` and named values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from repae_core.artifacts.artifact import LOGS, Artifact

METRICS = "metrics.jsonl"  # losses and gradient norms, written at the end: the same in every run of the same settings
PERFORMANCE = f"{LOGS}performance.jsonl"  # what was measured on the way, written before each checkpoint


def as_lines(rows: Iterable[Mapping[str, float]]) -> bytes:
    """The file's content."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def read_rows(artifact: Artifact, name: str) -> list[dict[str, float]]:
    """The rows of METRICS or PERFORMANCE; none where the file is not there.

    Raises:
        ValueError: the file is damaged; names it.
    """
    if not artifact.exists(name):
        return []
    try:
        return [json.loads(line) for line in artifact.read_bytes(name).decode().splitlines()]
    except ValueError as error:
        raise ValueError(f"{artifact.uri}/{name} is damaged and may be removed: {error}") from None
