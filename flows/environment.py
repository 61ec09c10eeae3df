"""Process settings that must be in place before Prefect, torch or MLflow are imported."""

from __future__ import annotations

import contextlib
import os

import psutil

from repae_core.config.environment import repae_home

THREADS_AND_MEMORY = {
    # Idle OpenMP threads that spin steal the cores from whoever else works: ten times slower on a busy
    # machine. A short spin keeps two threads fast on a quiet one (docs/environment.md has the figures).
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "3000",
    # Read when a process starts, so for the training workers that this one starts (host_memory.py).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def prepare_environment() -> None:
    """Quiet, local defaults for everything the caller has not set."""
    home = repae_home()
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Kept over a restart of the server: else a training's slot stays taken for ever (tasks.training.training_slot).
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # The command line prints one line for a failure itself; --debug has the traceback.
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in (defaults | unset_threads_and_memory()).items():
        os.environ.setdefault(name, value)


def unset_threads_and_memory() -> dict[str, str]:
    """Of THREADS_AND_MEMORY what the caller leaves open; with a policy of theirs also the spins, which would win."""
    closed = os.environ.keys() | ({"GOMP_SPINCOUNT"} if "OMP_WAIT_POLICY" in os.environ else set())
    return {name: value for name, value in THREADS_AND_MEMORY.items() if name not in closed}


def end_orphaned_servers() -> None:
    """End temporary Prefect servers of this REPAE_HOME whose run was killed: nothing else would, ever."""
    home = str(repae_home() / "prefect")
    for process in psutil.process_iter(["cmdline", "ppid"]):
        with contextlib.suppress(psutil.Error):
            server = "prefect.server.api.server" in " ".join(process.info["cmdline"] or [])
            orphaned = process.info["ppid"] == 1
            if server and orphaned and process.environ().get("PREFECT_HOME") == home:
                process.terminate()
