"""`repae deploy`: work pool, concurrency limit and every deployment, on the Prefect server in force."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flows.deployments import TRAINING_LIMIT, WORK_POOL, deployments

ROOT = Path(__file__).resolve().parents[1]


def deploy() -> None:
    """Create or update them; may be repeated.

    Raises:
        ValueError: no Prefect server is given.
        RuntimeError: Prefect refused; its last line.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise ValueError(
            "PREFECT_API_URL is not set, so there is no Prefect server to deploy to: start everything with "
            "`make serve`, or set it to your server's .../api"
        )
    from flows.automations import restart_lost_runs

    _prefect("work-pool", "create", WORK_POOL, "--type", "process", "--overwrite")
    _limit_trainings()
    restart_lost_runs()
    _prefect("--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml")
    print(f"{len(deployments())} deployments at {url}; for example: prefect deployment run full-pipeline/dev")


def _limit_trainings() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(TRAINING_LIMIT, limit=1)


def _prefect(*command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prefect", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(f"prefect {' '.join(command[:3])}: {lines[-1].strip() if lines else 'failed'}")
