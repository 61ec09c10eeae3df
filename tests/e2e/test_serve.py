"""`repae serve` and deployments, as its printed lines say."""

import json
import subprocess
import sys
import time

import pytest
import served
import tiny

from repae_core.artifacts import Artifact, Store, list_runs
from repae_core.artifacts.checkpoints import committed_checkpoints

pytestmark = pytest.mark.slow


def test_pipeline_then_one_stage_from_deployments(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    usual, changed = (json.dumps(served.overrides(images, *more)) for more in ((), ("generate.guidance=2.5",)))
    with served.serve(tmp_path) as server:
        result = server.run("full-pipeline/dev", f"overrides={usual}")
        assert result.returncode == 0, result.stdout + result.stderr
        result = server.run("generate/dev", f"overrides={changed}")
        assert result.returncode == 0, result.stdout + result.stderr

        runs = {run["name"].split()[0]: run for run in server.ask("flow_runs/filter", {})}
        states = {name: run["state"]["type"] for name, run in runs.items()}
        assert states == {"full-pipeline": "COMPLETED", "generate": "COMPLETED"}
        artifacts = server.ask("artifacts/filter", {})
        pages = {a["key"]: a["data"] for a in artifacts if a["flow_run_id"] == runs["generate"]["id"]}
        assert "| generate | made |" in pages["run"]
        assert "data:image/jpeg;base64," in pages["samples"]
        assert "http://127.0.0.1:" in pages["run"]

        refused = server.run("generate/dev", 'overrides={"generate":{"guidance":-3}}')
        assert refused.returncode != 0
        assert "less than the minimum of 0" in " ".join((refused.stdout + refused.stderr).split())
        assert server.run("train-ldm/dev", f"overrides={usual}", "inputs=latents=nonsense").returncode != 0
        (failed,) = (run for run in server.ask("flow_runs/filter", {}) if "train-ldm" in run["name"])
        assert "'nonsense' is no artifact of cache-latents" in failed["state"]["message"]

        limits = server.ask("v2/concurrency_limits/filter", {})
        assert [(limit["name"], limit["limit"]) for limit in limits] == [("repae-gpu-training", 1)]
        deployed = server.ask("deployments/filter", {})
        assert len(deployed) == 16
        gpu = {d["job_variables"]["env"].get("REPAE_TRAINING_LIMIT") for d in deployed if d["name"] == "gpu"}
        assert gpu == {"repae-gpu-training"}
        (automation,) = server.ask("automations/filter", {})
        assert automation["enabled"]
        assert automation["trigger"]["within"] == 90
        again = [sys.executable, "-c", "from flows.automations import restart_lost_runs as make; make()"]
        subprocess.run(again, env=server.environment, check=True, timeout=120)
        assert server.ask("automations/filter", {}) == [automation], "an update forgets the runs it waits for"


def test_ctrl_c_cancels_what_runs(tmp_path):
    """Else the next `repae serve` would start it again by itself, and `repae gc` keep what it holds."""
    images, store = tiny.write_images(tmp_path / "images"), Store(str(tmp_path / "store"))
    settings = json.dumps(served.overrides(images, "train_repae.max_steps=100000"))
    with served.serve(tmp_path) as server:
        command = [
            sys.executable,
            "-m",
            "prefect",
            "deployment",
            "run",
            "full-pipeline/dev",
            "-p",
            f"overrides={settings}",
        ]
        subprocess.run(command, env=server.environment, check=True, timeout=100)
        deadline = time.monotonic() + 300
        while not store.folders("train-repae") or not committed_checkpoints(training(store)):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    (run,) = list_runs(store)
    assert (run.status, run.stages["train-repae"].status) == ("cancelled", "cancelled")
    assert not training(store).exists("lease.json")


def training(store: Store) -> Artifact:
    return Artifact(store, "train-repae", store.folders("train-repae")[0])
