"""`repae compare`: scores of several runs in one table, samples from the same noise side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.inspect_command import open_store
from tasks.compare import Comparison, compare_scores, comparison_page, scored_run, scored_samples


def compare_runs(runs: Sequence[str], store: str, output: str, seed: int) -> None:
    """Print the table, write `compare.html` beside the first run's record, and a copy where asked.

    Raises:
        ValueError: fewer than two different runs, or one that was not evaluated.
    """
    opened = open_store(store)
    records = [scored_run(opened, run) for run in runs]
    if len({record.run_id for record in records}) < max(2, len(runs)):
        raise ValueError(f"compare needs two or more different runs; given: {', '.join(r.run_id for r in records)}")
    comparison = compare_scores(opened, records)
    samples = [(record.run_id, scored_samples(opened, record)) for record in records]
    from repae_core.stages.compare import compare_samples

    picture, same_noise = compare_samples(samples, seed=seed)
    noise = "the same noise" if same_noise else "different noise, as their latents differ in shape"
    note = f"One row a run: a column has the same class in every row, and {noise} (seed {seed})."
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    page = comparison_page(comparison, records, source, note).encode()
    key = f"runs/{records[0].run_id}/compare.html"
    opened.write_bytes(key, page)
    console = Console()
    ids = [record.run_id for record in records]
    for number, run in enumerate(ids, start=1):
        console.print(f"Run {number}    {run}", soft_wrap=True)
    for table in _tables(comparison, ids):
        console.print(table)
    console.print(note, soft_wrap=True)
    console.print(f"Page     {opened.uri(key)}", soft_wrap=True)
    if output:
        Path(output).write_bytes(page)
        console.print(f"Copy     {output}", soft_wrap=True)


def _tables(comparison: Comparison, ids: Sequence[str]) -> list[Table]:
    """A line a score and a numbered column a run: that fits where ids and scores side by side would not."""
    columns = [f"run {number}" for number in range(1, len(ids) + 1)]
    cells = {(run, of): dict(zip(comparison.header[2:], rest, strict=True)) for run, of, *rest in comparison.rows}
    scores = Table(title="scores")
    for column in ("of", "score", *columns):
        scores.add_column(column, overflow="fold", justify="right" if column in columns else "left")
    for of in dict.fromkeys(of for _, of in cells):
        for score in comparison.header[2:]:
            values = [cells.get((run, of), {}).get(score, "") for run in ids]
            if any(values):
                scores.add_row(of, score, *values)
        scores.add_section()
    if not comparison.differences:
        return [scores]
    different = Table(title="what differs in protocol and provenance")
    for column in ("", *columns):
        different.add_column(column, overflow="fold")
    for entry, values in comparison.differences.items():
        different.add_row(entry, *values)
    return [scores, different]
