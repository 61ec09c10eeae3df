"""`repae run` as users start it: a Prefect flow in a process of its own; kills and skips."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from supervised import hear_interrupts, processes_of

from repae_core.artifacts import Artifact, Store, list_runs
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config import STAGES

SKIPPED_RUN = """
import sys
from flows.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("torch" in sys.modules or "ray" in sys.modules)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_images(tmp_path / "images")
    return tmp_path


def arguments(place: Path, *more: str) -> list[str]:
    return [*tiny.arguments([*tiny.overrides(place / "images"), *more]), "--store", str(place / "store")]


def environment(place: Path) -> dict[str, str]:
    names = ("REPAE_HOME", "PREFECT_HOME")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("PREFECT_")}
    return kept | {"REPAE_HOME": str(place / "home")}


def repae(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "flows.cli", *command]
    return subprocess.run(program, env=environment(place), cwd=place, capture_output=True, text=True, timeout=280)


def test_run_then_skip_without_torch(place):
    first = repae(place, "run", *arguments(place))
    assert first.returncode == 0, first.stderr
    record = list_runs(Store(str(place / "store")))[0]
    for text in (*STAGES, "grid.png", "report.html", "mlflow ui --backend-store-uri sqlite:////"):
        assert text in first.stdout
    assert Path(next(line.split()[1] for line in first.stdout.splitlines() if line.startswith("Report"))).exists()
    database = sqlite3.connect(place / "home" / "prefect" / "prefect.db")
    flows = database.execute("select name, state_name from flow_run join flow on flow.id = flow_run.flow_id".replace(
        "select name", "select flow.name")).fetchall()  # fmt: skip
    assert flows == [("full-pipeline", "Completed")]
    assert record.prefect_flow_run_id
    assert "Traceback" not in first.stderr

    script = [sys.executable, "-c", SKIPPED_RUN, "run", *arguments(place)]
    second = subprocess.run(script, env=environment(place), cwd=place, capture_output=True, text=True, timeout=280)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[-1] == "False"
    assert [s.status for s in list_runs(Store(str(place / "store")))[0].stages.values()] == ["skipped"] * 7


def test_a_stage_has_a_time_limit(place, monkeypatch):
    settings = arguments(place, "train_repae.max_steps=100000", "train_repae.checkpoint_every=1000")
    assert repae(place, "stage", "preprocess", *settings).returncode == 0
    monkeypatch.setenv("REPAE_STAGE_TIMEOUT_SECONDS", "10")
    result = repae(place, "stage", "train-repae", *settings)
    assert result.returncode == 1
    told = "train-repae took longer than REPAE_STAGE_TIMEOUT_SECONDS=10; run again to continue"
    assert [line for line in result.stderr.splitlines() if line.startswith("repae: ")] == [f"repae: {told}"]
    record = list_runs(Store(str(place / "store")))[0]
    assert record.stages["train-repae"].message == told
    assert not Artifact(Store(str(place / "store")), "train-repae", record.stages["train-repae"].fingerprint).exists(
        "lease.json"
    )


def test_a_failure_is_one_line_and_exit_code_1(place):
    result = repae(place, "run", *arguments(place, "train_repae.learning_rate=1e30"))
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("repae: ")]
    assert len(lines) == 1
    assert "loss" in lines[0]
    assert "Traceback" not in result.stderr
    record = list_runs(Store(str(place / "store")))[0]
    assert record.status == "failed"
    assert record.stages["train-repae"].status == "failed"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_from_the_last_checkpoint(place, how, request):
    """SIGKILL (as by the machine) and Ctrl-C in the middle of train-ldm; what was finished before is not made again."""
    settings = arguments(place, "train_ldm.max_steps=400", "train_ldm.checkpoint_every=10")
    program = [sys.executable, "-m", "flows.cli", "run", *settings]
    log = place / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            program, env=environment(place), cwd=place, stderr=errors, preexec_fn=hear_interrupts
        )
    request.addfinalizer(process.kill)
    store = Store(str(place / "store"))
    deadline = time.monotonic() + 250
    while not (found := [Artifact(store, "train-ldm", f) for f in store.folders("train-ldm")]) or not (
        committed_checkpoints(found[0])
    ):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(timeout=60) == (-signal.SIGKILL if how == signal.SIGKILL else 130), log.read_text()
    artifact = found[0]
    assert not artifact.is_whole()
    before = committed_checkpoints(artifact)
    assert before[-1] < 400 * 8
    record = list_runs(store)[0]
    states = (record.status, record.stages["train-ldm"].status)
    assert states == (("running", "running") if how == signal.SIGKILL else ("cancelled", "cancelled"))
    plan = repae(place, "plan", *settings)
    assert "resume" in plan.stdout
    again = repae(place, "run", *settings)
    assert again.returncode == 0, again.stderr
    record = list_runs(store)[0]
    assert [s.status for s in record.stages.values()] == ["skipped"] * 4 + ["made"] * 3
    assert artifact.verify() == []
    history = artifact.read_bytes("metrics.jsonl").decode().splitlines()
    assert len(history) == 400
    assert servers(place) == []


@pytest.mark.parametrize("begun", ["prefect.server", "raylet_socket"])
def test_sigterm_leaves_nothing(place, begun, request):
    """Also while Prefect's temporary server or Ray starts, before or after Prefect hears signals itself."""
    settings = arguments(place, "train_repae.workers=1", "train_repae.cpus_per_worker=1")
    program = [sys.executable, "-m", "flows.cli", "run", *settings]
    log = place / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(program, env=environment(place), cwd=place, stderr=errors)
    request.addfinalizer(process.kill)
    deadline = time.monotonic() + 250
    while not any(begun in " ".join(found.cmdline()) for found in processes_of(place / "home")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=40) == 128 + signal.SIGTERM, log.read_text()
    deadline = time.monotonic() + 10
    while (left := processes_of(place / "home")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [found.cmdline() for found in left] == []


def servers(place: Path) -> list[psutil.Process]:
    """Prefect servers that a run of this place left behind."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "prefect.server" in " ".join(process.info["cmdline"] or []):
                found += [process] if process.environ().get("REPAE_HOME") == str(place / "home") else []
    return found
