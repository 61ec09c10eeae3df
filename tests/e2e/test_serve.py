"""`repae serve` and deployments, as its printed lines say."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import tiny
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served(tmp_path):
    """A running `repae serve` and the environment of another terminal; ended by Ctrl-C, which must leave nothing."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "REPAE_", "RAY_"))}
    env = kept | {"REPAE_HOME": str(tmp_path / "home"), "REPAE_STORE": str(tmp_path / "store")}
    prefect_port, mlflow_port = free_port(), free_port()
    command = [sys.executable, "-m", "flows.cli", "serve", "--prefect-port", str(prefect_port), "--mlflow-port",
               str(mlflow_port)]  # fmt: skip
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while "Ctrl-C ends all" not in (tmp_path / "serve.log").read_text():
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        terminal = env | {
            "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api", "PREFECT_HOME": str(tmp_path / "terminal"),
        }  # fmt: skip
        yield process, terminal
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, 5)
        assert not alive
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()


def overrides(images: Path, *more: str) -> str:
    nested: dict = {}
    for pair in (*tiny.overrides(images), *more):
        name, value = pair.split("=", 1)
        section, field = name.split(".")
        nested.setdefault(section, {})[field] = yaml.safe_load(value)
    return json.dumps(nested)


def deployment_run(terminal, name, *parameters):
    command = [sys.executable, "-m", "prefect", "deployment", "run", name, "--watch"]
    command += [part for parameter in parameters for part in ("-p", parameter)]
    return subprocess.run(command, env=terminal, capture_output=True, text=True, timeout=280)


def ask(terminal, what, body):
    request = urllib.request.Request(
        f"{terminal['PREFECT_API_URL']}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_pipeline_then_one_stage_from_deployments(served, tmp_path):
    _, terminal = served
    images = tiny.write_images(tmp_path / "images")
    result = deployment_run(terminal, "full-pipeline/dev", f"overrides={overrides(images)}")
    assert result.returncode == 0, result.stdout + result.stderr

    changed = overrides(images, "generate.guidance=2.5")
    result = deployment_run(terminal, "generate/dev", f"overrides={changed}")
    assert result.returncode == 0, result.stdout + result.stderr
    runs = {run["name"].split()[0]: run for run in ask(terminal, "flow_runs/filter", {})}
    assert {name: run["state"]["type"] for name, run in runs.items()} == {
        "full-pipeline": "COMPLETED", "generate": "COMPLETED",
    }  # fmt: skip
    assert "generate.guidance=2.5" in runs["generate"]["name"] or len(runs["generate"]["name"]) == 120
    artifacts = ask(terminal, "artifacts/filter", {})
    pages = {a["key"]: a["data"] for a in artifacts if a["flow_run_id"] == runs["generate"]["id"]}
    assert "| generate | made |" in pages["run"]
    assert "data:image/jpeg;base64," in pages["samples"]
    assert "http://127.0.0.1:" in pages["run"]

    refused = deployment_run(terminal, "generate/dev", 'overrides={"generate":{"guidance":-3}}')
    assert refused.returncode != 0
    assert "less than the minimum of 0" in " ".join((refused.stdout + refused.stderr).split())
    failed = deployment_run(terminal, "train-ldm/dev", f"overrides={overrides(images)}", "inputs=latents=nonsense")
    assert failed.returncode != 0
    messages = [run["state"]["message"] for run in ask(terminal, "flow_runs/filter", {}) if "train-ldm" in run["name"]]
    assert len(messages) == 1
    assert "'nonsense' is no artifact of cache-latents" in messages[0]


def test_the_gpu_deployments_train_one_at_a_time(served):
    _, terminal = served
    limits = ask(terminal, "v2/concurrency_limits/filter", {})
    assert [(limit["name"], limit["limit"]) for limit in limits] == [("repae-gpu-training", 1)]
    found = ask(terminal, "deployments/filter", {})
    assert len(found) == 16
    gpu = [deployment for deployment in found if deployment["name"] == "gpu"]
    assert {d["job_variables"]["env"]["REPAE_TRAINING_LIMIT"] for d in gpu} == {"repae-gpu-training"}
    assert {d["work_pool_name"] for d in found} == {"repae"}
