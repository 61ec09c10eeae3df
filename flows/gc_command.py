"""`repae gc`: free the space of old artifacts, after showing them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from flows.inspect_command import open_store
from repae_core.artifacts import Garbage, find_garbage, list_runs, remove
from repae_core.config import STAGES, load_config


def collect_garbage(days: float, keep_runs: int, delete: bool, store: str, *, other_mlflow: bool = False) -> None:
    """List, and with `delete` remove, what nothing kept needs.

    MLflow must answer: its registered models are kept, and without it nobody knows them. It must be the one that the
    store's runs were tracked in, under the same address, unless `other_mlflow` says that another one is right.

    Raises:
        ValueError: negative limits, another MLflow, or a damaged record or manifest.
        ConnectionError: MLflow cannot be reached.
    """
    from tasks.tracking import Tracker, tracking_uri

    if days < 0 or keep_runs < 0:
        raise ValueError("--days and --keep-runs must not be negative")
    opened, console = open_store(store), Console()
    tracked = {r.mlflow_tracking_uri for r in list_runs(opened) if r.mlflow_tracking_uri}
    here = tracking_uri()
    if tracked - {here} and not other_mlflow:
        raise ValueError(
            f"runs of {opened.url} were tracked in MLflow at {', '.join(sorted(tracked))}, but this is {here}, which "
            "may not know its registered models; set MLFLOW_TRACKING_URI, or say --other-mlflow if it does know them"
        )
    registered = Tracker(load_config().experiment).registered_artifacts()
    garbage = find_garbage(opened, STAGES, keep_days=days, keep_runs=keep_runs, registered=registered)
    table = Table(title=f"not needed any more in {opened.url}")
    for column in ("artifact", "MB", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "MB" else "left")
    for entry in garbage:
        table.add_row("/".join(entry.name), f"{entry.bytes / 1e6:,.1f}", entry.reason)
    console.print(table)
    if not delete:
        console.print(f"{_size(garbage)} would be freed; `repae gc --delete` with the same options removes them")
        return
    freed = []
    for entry in garbage:
        if remove(opened, entry):
            freed.append(entry)
        else:
            console.print(f"{'/'.join(entry.name)}: kept, somebody has begun to write it")
    console.print(f"{_size(freed)} freed")


def _size(garbage: Sequence[Garbage]) -> str:
    return f"{len(garbage)} artifacts, {sum(entry.bytes for entry in garbage) / 1e6:,.1f} MB"
