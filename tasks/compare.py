"""Several runs in one table, and everything recorded with their scores that differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from repae_core.artifacts import Artifact, RunRecord, Store, list_runs, load_run

ROWS = ("generated", "reconstructions", "reconstructions_before")
ABSENT = "-"
# Provenance that a protocol entry tells in words: shown only where the words are the same.
_IN_WORDS = {
    "num_images": "samples",
    "labels": "labels",
    "seeds.generate": "seed",
    "weights": "weights",
    "reference.description": "reference",
    "extractor.name": "extractor",
    "sampler.sampler": "sampler",
    "sampler.steps": "sampler",
    "sampler.path": "sampler",
    "sampler.guidance": "guidance",
    "sampler.interval": "guidance",
    "sampler.mixed_precision": "sampler",
    "sampler.rounding": "uint8",
    "checkpoint.stage": "checkpoint",
    "checkpoint.checkpoint": "checkpoint",
    "checkpoint.images_seen": "checkpoint",
    "checkpoint.weights": "weights",
    "guide.stage": "guidance",
    "guide.checkpoint": "guidance",
    "guide.images_seen": "guidance",
    "guide.weights": "guidance",
    "neighbours": "precision/recall",
    "reference.images_with_features": "precision/recall",
    "kid.subsets": "KID",
    "kid.subset_size": "KID",
    "vae_images": "reconstructions",
    "vae_posterior": "reconstructions",
}


@dataclass(frozen=True)
class Comparison:
    """header and rows of text; differences: entry of protocol or provenance -> its value in each run, if not equal."""

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


def scored_samples(store: Store, record: RunRecord) -> Artifact:
    """The `generate` artifact that a run's scores are of, also where another run made it.

    Raises:
        ValueError: the run was not evaluated, or its samples are gone.
    """
    manifest = artifact_of(store, record, "evaluate").manifest()
    assert manifest is not None
    samples = Artifact(store, "generate", manifest.inputs["samples"].fingerprint)
    if not samples.is_whole():
        raise ValueError(f"run {record.run_id}: its samples are gone: {samples.uri}")
    return samples


def scored_run(store: Store, reference: str) -> RunRecord:
    """As `load_run`, but `latest` is the newest run that has scores: a failed one cannot be compared.

    Raises:
        ValueError: no such run, or none has scores.
    """
    if reference != "latest":
        return load_run(store, reference)
    for record in list_runs(store):
        found = record.stages.get("evaluate")
        if found and Artifact(store, "evaluate", found.fingerprint).is_whole():
            return record
    raise ValueError(f"no run in {store.url} has scores; `repae run` makes some")


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
    return Comparison(["run", "of", *columns], rows, _differences(metrics))


def _differences(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    words = _unequal([m["protocol"] for m in metrics])
    recorded = _unequal([dict(_flat(m.get("provenance", {}))) for m in metrics])
    # Every change gives the samples another fingerprint; what changed is in the other entries.
    recorded.pop("samples", None)
    return words | {name: values for name, values in recorded.items() if _IN_WORDS.get(name) not in words}


def _unequal(entries: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for found in entries for name in found)
    values = {name: [found.get(name, ABSENT) for found in entries] for name in names}
    return {name: _short(found) for name, found in values.items() if len(set(found)) > 1}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested entries as `sampler.steps` -> text; without those that are None."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, str(value)


def _short(values: list[str]) -> list[str]:
    """Hashes by their first digits, unless these are equal."""
    short = [value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value for value in values]
    return short if len(set(short)) == len(set(values)) else values


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
