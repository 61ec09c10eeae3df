"""Several runs in one table, and what in their protocols differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from repae_core.artifacts import Artifact, RunRecord, Store

ROWS = ("generated", "reconstructions", "reconstructions_before")


@dataclass(frozen=True)
class Comparison:
    """header and rows of text; differences: protocol entry -> its value in each run, where they are not all equal."""

    header: list[str]
    rows: list[list[str]]
    differences: dict[str, list[str]]


def artifact_of(store: Store, record: RunRecord, stage: str) -> Artifact:
    """A finished stage of a run.

    Raises:
        ValueError: the run has none; names the run and the stage.
    """
    found = record.stages.get(stage)
    artifact = Artifact(store, stage, found.fingerprint) if found else None
    if artifact is None or not artifact.is_whole():
        raise ValueError(f"run {record.run_id} has no finished {stage} in {store.url}; it cannot be compared")
    return artifact


def compare_scores(store: Store, records: Sequence[RunRecord]) -> Comparison:
    """The scores of each run, one line a run and row of its table.

    Raises:
        ValueError: a run was not evaluated.
    """
    metrics = [artifact_of(store, record, "evaluate").read_json("metrics.json") for record in records]
    columns = list(dict.fromkeys(column for m in metrics for column in m["columns"]))
    rows = [
        [record.run_id, name, *(_text(m["rows"][name].get(column)) for column in columns)]
        for name in ROWS
        for record, m in zip(records, metrics, strict=True)
        if name in m["rows"]
    ]
    entries = dict.fromkeys(entry for m in metrics for entry in m["protocol"])
    values = {entry: [m["protocol"].get(entry, "-") for m in metrics] for entry in entries}
    differences = {entry: found for entry, found in values.items() if len(set(found)) > 1}
    return Comparison(["run", "of", *columns], rows, differences)


def comparison_page(comparison: Comparison, records: Sequence[RunRecord], picture: str, note: str) -> str:
    """A self-contained HTML page; `picture`: data URI."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page: Any = environment.get_template("compare.html.j2")
    text: str = page.render(comparison=comparison, records=records, picture=picture, note=note)
    return text


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
