"""`repae compare`: scores of several runs in one table, samples from the same noise side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.inspect_command import open_store
from repae_core.artifacts import load_run
from tasks.compare import Comparison, artifact_of, compare_scores, comparison_page


def compare_runs(runs: Sequence[str], store: str, output: str, seed: int) -> None:
    """Print the table, write `compare.html` beside the first run's record, and a copy where asked.

    Raises:
        ValueError: fewer than two different runs, or one that was not evaluated.
    """
    opened = open_store(store)
    records = [load_run(opened, run) for run in runs]
    if len({record.run_id for record in records}) < max(2, len(runs)):
        raise ValueError(f"compare needs two or more different runs; given: {', '.join(r.run_id for r in records)}")
    comparison = compare_scores(opened, records)
    samples = [(record.run_id, artifact_of(opened, record, "generate")) for record in records]
    from repae_core.stages.compare import compare_samples

    picture, same_noise = compare_samples(samples, seed=seed)
    noise = "the same noise" if same_noise else "different noise, as their latents differ in shape"
    note = f"One row a run: a column has the same class in every row, and {noise} (seed {seed})."
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    page = comparison_page(comparison, records, source, note).encode()
    key = f"runs/{records[0].run_id}/compare.html"
    opened.write_bytes(key, page)
    console = Console()
    for table in _tables(comparison, [record.run_id for record in records]):
        console.print(table)
    console.print(note, soft_wrap=True)
    console.print(f"Page     {opened.uri(key)}", soft_wrap=True)
    if output:
        Path(output).write_bytes(page)
        console.print(f"Copy     {output}", soft_wrap=True)


def _tables(comparison: Comparison, runs: Sequence[str]) -> list[Table]:
    scores = Table(title="scores")
    for column in comparison.header:
        scores.add_column(column, overflow="fold")
    for row in comparison.rows:
        scores.add_row(*row)
    if not comparison.differences:
        return [scores]
    protocol = Table(title="what differs in the protocol")
    for column in ("", *runs):
        protocol.add_column(column, overflow="fold")
    for entry, values in comparison.differences.items():
        protocol.add_row(entry, *values)
    return [scores, protocol]
