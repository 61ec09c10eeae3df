"""`prefect flow-run cancel` of a deployed training: no process is left, and the next run continues."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from served import Served, overrides, serve
from supervised import processes_of

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints

STEPS, BATCH, SECONDS = 400, 8, 15
SETTINGS = ("train_repae.workers=2", "train_repae.cpus_per_worker=1", f"train_repae.max_steps={STEPS - 2}",
            "train_repae.checkpoint_every=10")  # fmt: skip


@pytest.fixture
def served(tmp_path: Path):
    with serve(tmp_path) as served:
        yield served


def start(served: Served, images: Path) -> str:
    """A run of the deployment; its id."""
    (found,) = served.ask("deployments/filter", {"deployments": {"name": {"any_": ["dev"]}},
                                                 "flows": {"name": {"any_": ["train-repae"]}}})  # fmt: skip
    parameters = {"preset": "quickstart", "inputs": "auto", "overrides": overrides(images, *SETTINGS)}
    body = {"parameters": parameters, "state": {"type": "SCHEDULED", "name": "Scheduled"}}
    return str(served.ask(f"deployments/{found['id']}/create_flow_run", body)["id"])


def state(served: Served, flow_run: str) -> str:
    (found,) = served.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
    return str(found["state"]["type"])


def wait_for(condition, seconds: float):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_cancelled_training_leaves_nothing_and_goes_on(served, tmp_path):
    store, images = Store(str(tmp_path / "store")), tiny.write_images(tmp_path / "images")
    command = [sys.executable, "-m", "flows.cli", "stage", "preprocess", *tiny.arguments(tiny.overrides(images))]
    subprocess.run(command, env=served.environment, check=True, timeout=300)
    idle = {process.pid for process in processes_of(tmp_path / "home")}

    def of_the_run() -> list[psutil.Process]:
        return [process for process in processes_of(tmp_path / "home") if process.pid not in idle]

    def artifact() -> Artifact:
        return Artifact(store, "train-repae", store.folders("train-repae")[0])

    def started(process: str) -> bool:
        return any(process in str(each.cmdline()) for each in of_the_run())

    def cancel(flow_run: str) -> None:
        """And see that nothing is left of it."""
        command = [sys.executable, "-m", "prefect", "flow-run", "cancel", flow_run]
        subprocess.run(command, env=served.environment, check=True, timeout=100)
        asked = time.monotonic()
        while (left := of_the_run()) and time.monotonic() < asked + SECONDS:
            time.sleep(0.1)
        print(f"nothing left {time.monotonic() - asked:.1f} s after the command")
        assert [process.cmdline() for process in left] == []
        wait_for(lambda: state(served, flow_run) == "CANCELLED", 30)

    for early in ("gcs_server", "ray::TrainController"):
        run = start(served, images)
        wait_for(lambda early=early: started(early), 200)
        cancel(run)
    first = start(served, images)
    wait_for(lambda: store.folders("train-repae") and committed_checkpoints(artifact()), 400)
    assert started("ray::RayTrainWorker")
    cancel(first)
    reached = committed_checkpoints(artifact())[-1]
    assert reached < STEPS * BATCH

    second = start(served, images)
    wait_for(lambda: state(served, second) in ("COMPLETED", "FAILED", "CRASHED"), 500)
    assert state(served, second) == "COMPLETED"
    assert artifact().verify() == []
    log = artifact().read_bytes("logs/rank0.log").decode()
    (continued,) = re.findall(r"continued from checkpoint (\d+)", log)
    assert int(continued) >= reached  # later, where a checkpoint waited in scratch
