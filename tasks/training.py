"""Launching a training stage: what `train-repae` and `train-ldm` share."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.artifacts.history import METRICS, PERFORMANCE, read_rows
from repae_core.config import TrainingConfig
from tasks.checkpoint_scores import CheckpointScores, checkpoint_scores
from tasks.continuation import require_continuable
from tasks.ray_launch import launch
from tasks.stage import StageContext
from tasks.training_worker import artifact_reference, train_worker

logger = logging.getLogger("repae")

_ROWS, _ROWS_SECONDS = 1000, 30.0
_POSITION = ("step", "images_seen")


def run_training(context: StageContext) -> dict[str, Any]:
    """Launch the workers, relay their reports to the display and MLflow; rank 0's summary."""
    section = context.section
    assert isinstance(section, TrainingConfig)
    artifact = context.artifact
    require_continuable(artifact, context.inputs.get("init"), section)
    payload = {
        "run": context.run.run_id,
        "stage": context.planned.name,
        "config": context.config.model_dump(mode="json"),
        "store": artifact.store.url,
        "fingerprint": artifact.fingerprint,
        "inputs": {role: artifact_reference(a) for role, a in context.inputs.items()},
        "owner": context.lease.owner,
        "training": training_name(artifact),
        "threads": kept_threads(artifact, section),
        "workers": section.workers,
    }
    with training_slot(), scores_beside(context) as scores:

        def on_report(message: dict[str, Any]) -> None:
            relay(context, message)
            if scores is not None:
                scores.look(message["images_seen"])

        summary = launch(
            train_worker,
            payload,
            session=context.run.session,
            workers=section.workers,
            cpus_per_worker=section.cpus_per_worker,
            gpus_per_worker=section.gpus_per_worker,
            max_failures=section.max_failures,
            on_report=on_report,
            position=lambda: committed_checkpoints(artifact)[-1:],
        )
    complete_log(context)
    return summary


@contextlib.contextmanager
def scores_beside(context: StageContext) -> Iterator[CheckpointScores | None]:
    """The scores that `score_every` asks for, while the training runs inside."""
    scores = checkpoint_scores(context)
    try:
        yield scores
        if scores is not None:
            scores.finish()
    finally:
        if scores is not None:
            scores.close()


@contextlib.contextmanager
def training_slot() -> Iterator[None]:
    """A slot of the global concurrency limit that REPAE_TRAINING_LIMIT names, waited for; nothing if it names none.

    Two trainings that share a GPU pool would each wait for workers that the other holds. A Prefect server that is away
    or has forgotten the slot ends no training (`strict` alone would): the second one then waits for its workers.
    """
    limit = os.environ.get("REPAE_TRAINING_LIMIT")
    if not limit:
        yield
        return
    from prefect.concurrency.sync import concurrency

    logger.info("waiting for a slot of %s", limit)
    with concurrency(limit, occupy=1, strict=True, raise_on_lease_renewal_failure=False):
        yield


def training_name(artifact: Artifact) -> str:
    """Names this training until it is begun anew: its workers know by it what one of them has left in scratch."""
    begun = artifact.read_json("work.json")["started_at"]
    return hashlib.sha256(f"{artifact.uri} {begun}".encode()).hexdigest()[:16]


def kept_threads(artifact: Artifact, section: TrainingConfig) -> int:
    """Torch threads a worker: chosen at the first start and kept, because other counts round differently."""
    threads = section.threads or section.cpus_per_worker
    if artifact.exists("threads.json"):
        kept = int(artifact.read_json("threads.json")["threads"])
        if kept != threads:
            logger.warning(
                "this run goes on with the %d thread(s) a worker that it started with, not %d", kept, threads
            )
        return kept
    artifact.write_json("threads.json", {"threads": threads})
    return threads


def relay(context: StageContext, message: dict[str, Any]) -> None:
    """One worker report to the progress display, MLflow's curves and its pictures; waits for none of them."""
    metrics, seen = message["metrics"], message["images_seen"]
    log_history(context, message["history"])
    loss = metrics.get("sit_loss", metrics.get("vae_loss"))
    batch = seen // max(message["step"], 1)
    note = f"loss {loss:.3f}" if loss is not None else ""
    context.progress(seen, message["total_steps"] * batch, note=note)
    for name, file in message["previews"].items():
        context.tracking.log_picture(functools.partial(context.artifact.read_bytes, file), name, seen)
    if metrics:
        context.tracking.log_metrics(metrics | message["performance"], seen)


def log_history(context: StageContext, rows: Iterable[Mapping[str, float]]) -> None:
    """Rows of the metric history; those that MLflow has are dropped."""
    for row in rows:
        context.tracking.log_metrics({k: v for k, v in row.items() if k not in _POSITION}, int(row["images_seen"]))


def complete_log(context: StageContext) -> None:
    """When training is over: whatever of its curves and pictures MLflow may have missed while it was away."""
    rows = read_rows(context.artifact, METRICS) + read_rows(context.artifact, PERFORMANCE)
    for first in range(0, len(rows), _ROWS):  # more than may wait at a time
        log_history(context, rows[first : first + _ROWS])
        if not context.tracking.flush(_ROWS_SECONDS):
            break
    for file in sorted(context.artifact.files("previews")):
        images, _, name = file.removesuffix(".png").partition("-")
        read = functools.partial(context.artifact.read_bytes, f"previews/{file}")
        context.tracking.log_picture(read, name, int(images))
