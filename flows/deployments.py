"""Every deployment in one table, and `prefect.yaml` made from it.

`<flow>/dev` runs where the worker runs, `<flow>/gpu` on the Ray cluster of RAY_ADDRESS with one training at a time.
Prefect's runner starts each flow run in a process of its own, so that a cancel ends that process only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from flows.environment import THREADS_AND_MEMORY
from repae_core.config import STAGES

WORK_POOL = "repae"
HEARTBEAT_SECONDS = 30  # Prefect's shortest
TRAINING_LIMIT = "repae-gpu-training"  # global concurrency limit of one: see tasks.training.training_slot
_HEADER = "# Made by `make deployments` from flows/deployments.py: change it there.\n"
# What a deployed run sets that `repae run` sets itself, or leaves out because somebody watches it.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    **THREADS_AND_MEMORY,
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),  # what flows.automations watches
    # Prefect's server or its database may be away for a minute or two; it answers 500 while the database is.
    "PREFECT_CLIENT_MAX_RETRIES": "7",
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "repae,repae_core",  # the stages' own lines on the run's page
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # lines of background threads
    "PREFECT_TASKS_DEFAULT_RETRIES": "2",  # only of failures that may pass: see tasks.stage.may_pass
    "PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "20",
}


class Target(NamedTuple):
    """Where the deployments of one name run."""

    name: str
    preset: str
    description: str
    environment: dict[str, str]


TARGETS = (
    Target("dev", "quickstart", "on this worker's machine", {"REPAE_STAGE_TIMEOUT_SECONDS": str(6 * 3600)}),
    Target(
        "gpu",
        "imagenet256-sdvae",
        "on the Ray cluster of RAY_ADDRESS, one training at a time",
        {"REPAE_TRAINING_LIMIT": TRAINING_LIMIT},
    ),
)
FLOWS = {"full-pipeline": "flows/full_pipeline.py:full_pipeline"} | {
    stage: f"flows/stages.py:{stage.replace('-', '_')}" for stage in STAGES
}


def deployments() -> list[dict[str, Any]]:
    """One entry of `prefect.yaml` for every flow and target."""
    return [_deployment(flow, entrypoint, target) for flow, entrypoint in FLOWS.items() for target in TARGETS]


def _deployment(flow: str, entrypoint: str, target: Target) -> dict[str, Any]:
    kind = "pipeline" if flow == "full-pipeline" else "stage"
    what = "The whole pipeline" if kind == "pipeline" else f"Stage {flow} alone"
    return {
        "name": target.name,
        "description": f"{what}, {target.description}.",
        "entrypoint": entrypoint,
        "tags": ["repae", kind, target.name],
        "parameters": {"preset": target.preset},
        "enforce_parameter_schema": True,
        "schedules": [],
        "work_pool": {"name": WORK_POOL, "job_variables": {"env": _ENVIRONMENT | target.environment}},
    }


def prefect_yaml() -> str:
    """The content of `prefect.yaml`."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    content = {"name": "repae", "deployments": deployments()}
    return _HEADER + yaml.dump(content, Dumper=Plain, sort_keys=False, width=118)


if __name__ == "__main__":
    print(prefect_yaml(), end="")
