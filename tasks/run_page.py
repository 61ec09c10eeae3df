"""What a flow run's page in Prefect shows: the stages' states, scores, links and the sample grid."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from repae_core.artifacts import Artifact, RunRecord, Store

logger = logging.getLogger("repae")

_GRID_SIDE = 768  # pixels: an artifact's text should stay below a megabyte


def publish_run_page(store: Store, record: RunRecord) -> None:
    """Prefect artifacts `run` and `samples` of the flow run that is under way; failing to is only a warning."""
    from prefect.artifacts import create_markdown_artifact

    with _failure_is_a_warning():
        create_markdown_artifact(run_table(record), key="run", description=f"Run {record.run_id}: {record.status}")
        if grid := sample_grid(store, record):
            create_markdown_artifact(grid, key="samples", description="Samples, a row a class")


def publish_scores(rows: list[dict[str, Any]], protocol: Mapping[str, str]) -> None:
    """Prefect artifact `scores` of the flow run that is under way, if one is; failing to is only a warning."""
    from prefect.artifacts import create_table_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        words = "; ".join(f"{name}: {value}" for name, value in protocol.items())
        with _failure_is_a_warning():
            create_table_artifact(table=rows, key="scores", description=words)


@contextlib.contextmanager
def _failure_is_a_warning() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("the run's page in Prefect is not complete: %s", " ".join(str(error).split())[:200])


def run_table(record: RunRecord) -> str:
    """State, time, MLflow run and artifact of every stage, as Markdown."""
    lines = [
        f"**{record.kind}** `{record.run_id}`: {record.status}",
        "",
        "| stage | state | seconds | MLflow run | artifact | note |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in record.stages.items():
        run = _mlflow_link(record, stage.mlflow_run_id)
        note = stage.message.replace("|", "\\|")
        lines.append(f"| {name} | {stage.status} | {stage.seconds or 0:.0f} | {run} | `{stage.uri}` | {note} |")
    lines += ["", f"MLflow: `{_mlflow_pages(record)}`, parent {_mlflow_link(record, record.mlflow_run_id)}"]
    return "\n".join(lines)


def sample_grid(store: Store, record: RunRecord) -> str:
    """The generated grid as a picture in the text, so that it shows wherever the store is; empty without one."""
    stage = record.stages.get("generate")
    if stage is None or stage.status not in ("made", "skipped"):
        return ""
    artifact = Artifact(store, "generate", stage.fingerprint)
    if not artifact.exists("grid.png"):
        return ""
    image = Image.open(io.BytesIO(artifact.read_bytes("grid.png"))).convert("RGB")
    image.thumbnail((_GRID_SIDE, _GRID_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"`{artifact.uri}/grid.png`\n\n![samples](data:image/jpeg;base64,{encoded})"


def _mlflow_link(record: RunRecord, run_id: str | None) -> str:
    if not run_id:
        return "-"
    pages = _mlflow_pages(record)
    return f"[{run_id[:8]}]({pages}/#/runs/{run_id})" if pages.startswith("http") else f"`{run_id}`"


def _mlflow_pages(record: RunRecord) -> str:
    """Where a browser finds MLflow; the name that the workers use may be known to them only."""
    return (os.environ.get("REPAE_MLFLOW_UI") or record.mlflow_tracking_uri).rstrip("/")
