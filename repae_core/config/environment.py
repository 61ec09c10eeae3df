"""The environment variables the pipeline reads; docs/environment.md is the same table."""

from __future__ import annotations

import os
from pathlib import Path

from repae_core.config.pipeline import PipelineConfig

VARIABLES = {
    "REPAE_STORE": "Where artifacts live; wins over the config's `store`, `--store` wins over it",
    "REPAE_HOME": "MLflow's database and files, Prefect's home, scratch (default ./.repae)",
    "MLFLOW_TRACKING_URI": "MLflow server; default: SQLite in REPAE_HOME",
    "REPAE_MLFLOW_UI": "where a browser finds MLflow, for links; default: MLFLOW_TRACKING_URI",
    "PREFECT_API_URL": "Prefect server; default: a temporary one for the run",
    "RAY_ADDRESS": "Ray cluster; default: a private local one that ends with the run",
    "AWS_ENDPOINT_URL": ("S3 endpoint for s3:// stores; credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "REPAE_PREFECT_HOSTS": "further names by which Prefect's server may be called; default: none",
    "REPAE_TRAINING_LIMIT": "Prefect's global concurrency limit that a training waits for; default: none",
    "REPAE_STAGE_TIMEOUT_SECONDS": "a stage that takes longer ends, and continues at the next try; default: none",
    "OMP_WAIT_POLICY": "How idle OpenMP threads wait; see docs/environment.md",
    "GOMP_SPINCOUNT": "How long they spin first; see docs/environment.md",
    "GLIBC_TUNABLES": "Large memory pages for training on a CPU; see docs/environment.md",
}


def repae_home() -> Path:
    """REPAE_HOME as an absolute path; created if absent."""
    home = Path(os.environ.get("REPAE_HOME", ".repae")).absolute()
    home.mkdir(parents=True, exist_ok=True)
    return home


def store_url(config: PipelineConfig, option: str | None = None) -> str:
    """The store in force: `--store`, else REPAE_STORE, else the config's."""
    return option or os.environ.get("REPAE_STORE") or config.store
