"""`repae serve`: Prefect server, MLflow server and a worker on the loopback interface, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import UUID

import psutil

from flows.deploy_command import deploy
from flows.deployments import WORK_POOL
from repae_core.artifacts.store import absolute_url
from repae_core.config import load_config
from repae_core.config.environment import repae_home, store_url

HOST = "127.0.0.1"
_START_SECONDS = 180.0
_CANCEL_SECONDS = 40.0  # a cancelled training on a busy machine; a second Ctrl-C does not wait
_STOP_SECONDS = 20.0


def serve(prefect_port: int, mlflow_port: int) -> None:
    """Start all, deploy, and wait; on Ctrl-C or SIGTERM cancel the runs, then end what was started.

    Raises:
        ValueError: a port is taken.
        RuntimeError: a service did not start, or ended; names its log file.
    """
    home = repae_home()
    _require_free("--prefect-port", prefect_port)
    _require_free("--mlflow-port", mlflow_port)
    api = f"http://{HOST}:{prefect_port}/api"
    mlflow = f"http://{HOST}:{mlflow_port}"
    os.environ |= {
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        # Other pages in the same browser may not use the API, which starts commands on this machine.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{prefect_port},http://localhost:{prefect_port}",
        "MLFLOW_TRACKING_URI": mlflow,
        "REPAE_HOME": str(home),
        "REPAE_STORE": absolute_url(store_url(load_config())),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that only its LLM features use
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
        # Set for `repae run`, whose own display replaces them; the pages of deployed runs show them.
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
    }
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, deaf to Ctrl-C
        signal.signal(number, _interrupt)
    with contextlib.ExitStack() as services, contextlib.suppress(KeyboardInterrupt):
        running = {
            "prefect": services.enter_context(_service("prefect", _prefect_server(prefect_port), logs)),
            "mlflow": services.enter_context(_service("mlflow", _mlflow_server(mlflow_port, home), logs)),
        }
        _wait_healthy("prefect", running, f"{api}/health", logs)
        _wait_healthy("mlflow", running, f"{mlflow}/health", logs)
        deploy()
        worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
        running["worker"] = services.enter_context(_service("worker", worker, logs))
        print(
            f"Prefect  http://{HOST}:{prefect_port}\nMLflow   {mlflow}\nStore    {os.environ['REPAE_STORE']}\n"
            f"Logs     {logs}\nIn another terminal:\n  export PREFECT_API_URL={api}\n"
            "  prefect deployment run full-pipeline/dev --watch\nCtrl-C ends all.",
            flush=True,
        )
        _watch(running, logs)


def _watch(running: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    try:
        while True:
            _require_running(running, logs)
            time.sleep(1)
    except KeyboardInterrupt:
        _cancel_runs()


def _cancel_runs() -> None:
    """As `prefect flow-run cancel`: a run that is only killed counts as running, and starts again by itself.

    Of the worker's pool alone: what runs in other terminals does not listen.
    """
    # Here, not above: Prefect reads PREFECT_API_URL once, and `serve` sets it.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Cancelling

    under_way = FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [WORK_POOL]}})
    told: list[UUID] = []
    deadline = time.monotonic() + _CANCEL_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            for run in client.read_flow_runs(flow_run_filter=under_way, work_pool_filter=pool):  # the worker still asks
                print(f"cancelling {run.name}", flush=True)
                client.set_flow_run_state(run.id, Cancelling())
                told.append(run.id)
            ending = FlowRunFilter.model_validate({"id": {"any_": told}, "state": {"type": {"any_": ["CANCELLING"]}}})
            if not told or not client.read_flow_runs(flow_run_filter=ending):
                return
            time.sleep(0.5)


def _require_free(option: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: an ended one's port is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"{option}={port}: {error.strerror}; choose another port") from None


def _prefect_server(port: int) -> list[str]:
    return [
        sys.executable, "-m", "uvicorn", "--factory", "flows.prefect_server:create_app",
        "--host", HOST, "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip


def _mlflow_server(port: int, home: Path) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "mlartifacts"),
    ]  # fmt: skip


@contextlib.contextmanager
def _service(name: str, command: list[str], logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own (a terminal's Ctrl-C must not reach it), ended with all its children."""
    with open(logs / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what is left; children that outlive their parent are known from before."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        _, alive = psutil.wait_procs(family, _STOP_SECONDS)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _wait_healthy(name: str, running: Mapping[str, subprocess.Popen[bytes]], url: str, logs: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        _require_running(running, logs)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=3) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{name} does not answer at {url} after {_START_SECONDS:.0f} s: see {logs / f'{name}.log'}")


def _require_running(running: Mapping[str, subprocess.Popen[bytes]], logs: Path) -> None:
    for name, process in running.items():
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with code {process.returncode}: see {logs / f'{name}.log'}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
