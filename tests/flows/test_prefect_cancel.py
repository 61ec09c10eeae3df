"""A training flow served by a real Prefect server is cancelled: nothing is left, and the next run continues."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from supervised import processes_of

from flows.parameters import Overrides
from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config import load_config

SERVE = """
from flows.environment import prepare_environment
prepare_environment()
from flows.stages import train_repae
train_repae.serve(name="here")
"""
STEPS = 400
SETTINGS = ("train_repae.workers=2", "train_repae.cpus_per_worker=1", f"train_repae.max_steps={STEPS - 2}",
            "train_repae.checkpoint_every=10")  # fmt: skip


class Prefect:
    """A server and a process that serves the flow `train-repae`, in a home of their own."""

    def __init__(self, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.home, self.place = place / "home", place
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        self.variables = inherited | {
            "REPAE_HOME": str(self.home),
            "REPAE_STORE": str(place / "store"),
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> None:
        """A process in the background."""
        with (self.place / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=self.variables, cwd=self.place, stdout=log, stderr=log
            )
        self.started.append(process)

    def command(self, *words: str) -> str:
        """Output of `prefect ...`, tried again until it works: the server may still be starting."""
        deadline = time.monotonic() + 120
        while True:
            done = subprocess.run([sys.executable, "-m", "prefect", *words], env=self.variables, cwd=self.place,
                                  capture_output=True, text=True, timeout=120)  # fmt: skip
            if done.returncode == 0:
                return done.stdout
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(1)

    def run(self, parameters: str) -> str:
        """Start a run of the deployment; its id."""
        output = self.command("deployment", "run", "train-repae/here", "--params", parameters)
        found = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", output)
        assert found, output
        return found.group(0)

    def flow_processes(self) -> list[psutil.Process]:
        """Every process of a flow run: all in this home but the two that were started here and their semaphores'."""
        mine = {process.pid for process in self.started}
        return [p for p in processes_of(self.home) if p.pid not in mine and "resource_tracker" not in str(p.cmdline())]

    def close(self) -> None:
        for process in processes_of(self.home):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.started:
            process.wait()


@pytest.fixture
def prefect(tmp_path: Path):
    prefect = Prefect(tmp_path)
    (tmp_path / "home").mkdir()
    try:
        prefect.start("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect.port))
        prefect.command("deployment", "ls")
        prefect.start("-c", SERVE)
        yield prefect
    finally:
        prefect.close()


def parameters(source: Path) -> str:
    """The tiny config as the flow's form sends it."""
    values = load_config("quickstart", [*tiny.overrides(source), *SETTINGS]).model_dump(mode="json")
    overrides = Overrides(**{name: values[name] for name in ("preprocess", "train_repae")})
    return f'{{"preset": "quickstart", "inputs": "auto", "overrides": {overrides.model_dump_json(exclude_none=True)}}}'


def wait_for(condition, seconds: float, log: Path):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    return value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cancelled_training_leaves_nothing_and_goes_on(prefect, tmp_path):
    log, store = tmp_path / "log", Store(str(tmp_path / "store"))
    source = tiny.write_images(tmp_path / "images")
    command = [sys.executable, "-m", "flows.cli", "stage", "preprocess", *tiny.arguments(tiny.overrides(source))]
    subprocess.run(command, env=prefect.variables, cwd=tmp_path, check=True, timeout=200)

    def checkpoints() -> list[int]:
        return [
            c for f in store.folders("train-repae") for c in committed_checkpoints(Artifact(store, "train-repae", f))
        ]

    first = prefect.run(parameters(source))
    wait_for(checkpoints, 400, log)
    assert any("ray::RayTrainWorker" in " ".join(process.cmdline()) for process in prefect.flow_processes())
    began = time.monotonic()
    prefect.command("flow-run", "cancel", first)
    deadline = began + 15 + 10  # the command itself takes seconds to start
    asked = time.monotonic()
    while (left := prefect.flow_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"gone {time.monotonic() - asked:.1f} s after the command, which took {asked - began:.1f} s")
    assert [process.cmdline() for process in left] == []
    assert "CANCELLED" in prefect.command("flow-run", "inspect", first).upper()
    reached = checkpoints()[-1]
    assert reached < STEPS * 8

    second = prefect.run(parameters(source))
    artifact = Artifact(store, "train-repae", store.folders("train-repae")[0])
    wait_for(artifact.is_whole, 400, log)
    wait_for(lambda: not prefect.flow_processes(), 60, log)
    assert "COMPLETED" in prefect.command("flow-run", "inspect", second).upper()
    assert artifact.verify() == []
    assert f"continued from checkpoint {reached}" in artifact.read_bytes("logs/rank0.log").decode()
