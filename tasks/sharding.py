"""Launching work on shards: what `preprocess`, `cache-latents` and `generate` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.ray_launch import launch
from tasks.sharding_worker import Report
from tasks.stage import StageContext
from tasks.training_worker import artifact_reference

MAX_FAILURES = 3  # of the workers, without a new shard in between


def write_shards(
    context: StageContext,
    worker: Callable[[dict[str, Any], Report], dict[str, Any]],
    *,
    workers: int,
    cpus_per_worker: int,
    gpus_per_worker: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """Run `worker` on that many Ray workers (0: here), and add up their progress; returns rank 0's result.

    extra: enters the payload.
    """
    done: dict[int, int] = {}

    def relay(message: dict[str, Any]) -> None:
        done[message["rank"]] = message["done"]
        context.progress(min(sum(done.values()), message["total"]), message["total"])

    payload = {
        "run": context.run.run_id,
        "workers": workers,
        "config": context.config.model_dump(mode="json"),
        "out": artifact_reference(context.artifact),
        "inputs": {role: artifact_reference(artifact) for role, artifact in context.inputs.items()},
    } | extra
    return launch(
        worker,
        payload,
        session=context.run.session,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        max_failures=MAX_FAILURES,
        position=lambda: sum(not name.startswith("logs/") for name in context.artifact.files()),
        on_report=relay,
    )
