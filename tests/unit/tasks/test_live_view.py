"""What a training run shows while it works: exactly once in MLflow, whatever happens to it, and in Prefect."""

import contextlib
import io
import uuid
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image

import tasks.live_log
import tasks.outbox
import tasks.progress_page
import tasks.train_ldm
import tasks.train_repae
from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.history import METRICS, PERFORMANCE, read_rows
from tasks.live_log import LiveLog
from tasks.pipeline_run import open_run
from tasks.preprocess import preprocess
from tasks.progress_page import ProgressPage, duration
from tasks.tracking import Tracker
from tasks.training import relay


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(tasks.outbox, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(tasks.live_log, "_GATHER_SECONDS", 0.0)


class PartlySending:
    """MLflow that stores `stored` metrics of each of the first calls and then breaks off."""

    def __init__(self, *stored: int) -> None:
        self.breaks, self.rows = list(stored), []

    def get_run(self, run_id):
        return SimpleNamespace(data=SimpleNamespace(metrics={name: 0.0 for name, _, _, _ in self.rows}))

    def get_metric_history(self, run_id, name):
        return [SimpleNamespace(step=step) for other, _, _, step in self.rows if other == name]

    def log_batch(self, run_id, metrics):
        if self.breaks:
            self.rows += metrics[: self.breaks.pop(0)]
            raise ConnectionError("broken off")
        self.rows += metrics


def test_a_batch_that_was_partly_sent_is_completed_not_repeated():
    client = PartlySending(3, 0, 5)
    log = LiveLog(client, "run", "MLflow", lambda *row: row)
    for images in range(8, 88, 8):
        log.log_metrics({"sit_loss": 1.0, "grad_norm_sit": 2.0}, images)
        log.log_metrics({"sit_loss": 1.5}, images)
    log.close(30)
    assert Counter((name, step) for name, _, _, step in client.rows) == {
        (name, images): 1 for name in ("sit_loss", "grad_norm_sit") for images in range(8, 88, 8)
    }
    assert {value for name, value, _, _ in client.rows if name == "sit_loss"} == {1.0}


def test_what_found_no_room_is_taken_when_it_comes_again(monkeypatch):
    """While MLflow is away the memory fills up; the history, sent again, fills the gap."""
    monkeypatch.setattr(tasks.live_log, "_ROOM", 4)
    client = PartlySending(0)
    monkeypatch.setattr(tasks.outbox, "_FIRST_PAUSE", 0.5)
    log = LiveLog(client, "run", "MLflow", lambda *row: row)
    rows = range(8, 88, 8)
    for images in rows:
        log.log_metrics({"sit_loss": 1.0}, images)
    assert log.flush(30)
    assert len(client.rows) == 4
    for images in rows:
        log.log_metrics({"sit_loss": 1.0}, images)
        log.flush(30)
    log.close(30)
    assert sorted(step for _, _, _, step in client.rows) == list(rows)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_outage_of_mlflow_during_a_stage_is_a_warning(home, tmp_path, monkeypatch, caplog):
    """Also at its end: the stage's run cannot even be closed, and what did not arrive is counted."""
    monkeypatch.setattr("tasks.tracking._CLOSING_SECONDS", 0.2)
    tracker = Tracker("test")
    artifact = Artifact(Store(str(tmp_path / "store")), "train-ldm", "abc")
    with tracker.stage_run("train-ldm", artifact, None) as run:

        def away(*_, **__):
            raise ConnectionError("connection refused")

        for name in ("log_batch", "log_image", "set_terminated", "get_run"):
            monkeypatch.setattr(tracker.client, name, away)
        run.log_metrics({"sit_loss": 1.0, "flow_loss": 2.0}, 8)
        run.log_picture(png, "samples", 8)
    text = caplog.text
    assert "2 metrics did not arrive at MLflow at sqlite:" in text
    assert "1 pictures did not arrive" in text
    assert text.count("takes no metrics") == 1


def test_an_error_is_not_hidden_by_an_outage(home, tmp_path, monkeypatch):
    tracker = Tracker("test")

    def away(*_, **__):
        raise ConnectionError("connection refused")

    def failing_stage():
        artifact = Artifact(Store(str(tmp_path)), "train-ldm", "abc")
        with tracker.pipeline_run("first", {}), tracker.stage_run("train-ldm", artifact, None):
            monkeypatch.setattr(tracker.client, "set_terminated", away)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_stage()


class Killed(BaseException):
    pass


def run_stages(config, *stages):
    with open_run(config, kind="test") as run:
        for stage in stages:
            stage.fn(run)
    return run


def test_a_stopped_training_is_logged_once_and_without_gap(home, tmp_path, monkeypatch):
    """Killed between checkpoints, before MLflow had all; the next run sends the history again, and more than once."""
    images = tiny.write_images(tmp_path / "images")
    config = tiny.config(images, tmp_path / "store", "train_repae.max_steps=8", "train_repae.checkpoint_every=4",
                         "train_repae.preview_every=2", "train_repae.log_every=1")  # fmt: skip
    reports = []

    def broken(context, message):
        reports.append(message)
        if message["step"] not in (3, 4):  # those are not sent any more
            relay(context, message)
        if message["step"] == 7 and message["metrics"]:
            raise Killed

    monkeypatch.setattr("tasks.training.relay", broken)
    with pytest.raises(Killed):
        run_stages(config, preprocess, tasks.train_repae.train_repae)

    def twice(context, message):
        for _ in range(2):
            relay(context, message)

    monkeypatch.setattr("tasks.training.relay", twice)
    run = run_stages(config, preprocess, tasks.train_repae.train_repae)
    stage = run.record.stages["train-repae"]
    assert stage.status == "made"
    artifact = run.plan.stages["train-repae"].artifact
    rows = read_rows(artifact, METRICS)
    assert [row["step"] for row in rows] == list(range(1, 11))
    client = run.tracker.client
    for name in {name for row in rows for name in row} - {"step", "images_seen"}:
        logged = client.get_metric_history(stage.mlflow_run_id, name)
        assert [(m.step, m.value) for m in sorted(logged, key=lambda m: m.step)] == [
            (row["images_seen"], row[name]) for row in rows if name in row
        ], name
    for name in (
        "images_per_second",
        "model_tflops",
        "memory_gib",
        "seconds/vae",
        "seconds/data",
        "checkpoint_seconds",
    ):
        steps = [m.step for m in client.get_metric_history(stage.mlflow_run_id, name)]
        assert sorted(steps) == list(range(8, 88, 8)), name
    steps = [m.step for m in client.get_metric_history(stage.mlflow_run_id, "seconds/encoder")]  # not in the warm-up
    assert sorted(steps) == sorted(set(steps))
    assert 80 in steps
    assert [row["step"] for row in read_rows(artifact, PERFORMANCE)] == list(range(1, 11))
    pictures = Counter(
        tuple(file.path.split("/")[-1].split("+")[:3:2])
        for file in client.list_artifacts(stage.mlflow_run_id, "images")
    )
    both = {(name, str(images)): 2 for name in ("samples", "reconstructions") for images in (32, 48, 64, 80)}
    assert pictures == both | {("reconstructions", "16"): 2}  # PNG and thumbnail; no samples in the VAE's warm-up


def test_when_an_artifact_is_whole_its_curves_are(home, tmp_path, monkeypatch):
    """Else a kill just then would leave them short for ever: the next run skips the stage, and closes MLflow's run."""
    images = tiny.write_images(tmp_path / "images")
    config = tiny.config(images, tmp_path / "store", "train_repae.max_steps=8", "train_repae.log_every=1")
    monkeypatch.setattr(tasks.live_log, "_GATHER_SECONDS", 600.0)  # nothing is sent before somebody waits for it
    commit, whole = Artifact.commit, {}

    def look_first(artifact, **settings):
        client, run_id = Tracker("test").client, settings["mlflow_run_id"]
        for name in ("vae_loss", "images_per_second", "checkpoint_seconds"):
            whole[artifact.stage, name] = sorted(m.step for m in client.get_metric_history(run_id, name))
        commit(artifact, **settings)

    monkeypatch.setattr(Artifact, "commit", look_first)
    run = run_stages(config, preprocess, tasks.train_repae.train_repae)
    for name in ("vae_loss", "images_per_second", "checkpoint_seconds"):
        assert whole["train-repae", name] == list(range(8, 88, 8)), name
    run_id = run.record.stages["train-repae"].mlflow_run_id
    run.tracker.client.update_run(run_id, status="RUNNING")  # as a killed process leaves it
    again = run_stages(config, preprocess, tasks.train_repae.train_repae)
    assert again.record.stages["train-repae"].status == "skipped"
    assert run.tracker.client.get_run(run_id).info.status == "FINISHED"


def test_samples_of_the_latent_stage_reach_mlflow(home, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    record = tiny.run_pipeline(tiny.config(images, tmp_path / "store", "train_ldm.preview_every=2"))
    client = Tracker(record.config["experiment"]).client
    run_id = record.stages["train-ldm"].mlflow_run_id
    names = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert sorted(name.split("+")[2] for name in names) == ["16", "32"]
    assert {m.step for m in client.get_metric_history(run_id, "model_tflops")} == {8, 16, 24, 32}


@pytest.fixture
def bars(monkeypatch):
    """Prefect's artifacts, as calls; a flow run is under way."""
    calls = []
    monkeypatch.setattr(tasks.progress_page, "_EVERY", 0.0)
    monkeypatch.setattr("prefect.context.FlowRunContext.get", lambda: object())

    def create(progress, key, description, _sync):
        calls.append((key, progress, description))
        return uuid.uuid4()

    def update(artifact_id, progress, description, _sync):
        calls.append((artifact_id, progress, description))

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", create)
    monkeypatch.setattr("prefect.artifacts.update_progress_artifact", update)
    return calls


def test_a_stage_has_one_bar_that_ends_full(bars):
    page = ProgressPage()
    with page.stage("train-ldm"):
        page.update("train-ldm", 100, 1000, note="loss 0.500")
        while not bars:
            page.update("train-ldm", 200, 1000)
    page.update("train-ldm", 1000, 1000)  # over: no stage, no bar
    assert bars[0][0] == "progress-train-ldm"
    assert bars[0][1] in (10.0, 20.0)
    assert "of 1,000 images" in bars[0][2]
    assert bars[0][2].endswith("loss 0.500")
    assert bars[-1][1] == 100.0
    assert "finished after" in bars[-1][2]
    assert {type(key) for key, _, _ in bars[1:]} == {uuid.UUID}


def test_a_stage_that_stops_keeps_its_position(bars):
    page = ProgressPage()
    with contextlib.suppress(ZeroDivisionError), page.stage("generate"):
        while not bars:
            page.update("generate", 5, 10)
        raise ZeroDivisionError
    assert bars[-1][1] == 50.0
    assert "stopped after" in bars[-1][2]


def test_an_api_that_does_not_answer_is_one_warning(bars, monkeypatch, caplog):
    monkeypatch.setattr(tasks.progress_page, "_LAST_SECONDS", 0.1)

    def away(*_, **__):
        raise ConnectionError("All connection attempts failed")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", away)
    page = ProgressPage()
    with page.stage("train-ldm"):
        for done in range(1000):
            page.update("train-ldm", done, 1000)
    assert caplog.text.count("Prefect takes no progress") == 1


def test_without_a_flow_run_nothing_is_sent(bars, monkeypatch):
    monkeypatch.setattr("prefect.context.FlowRunContext.get", lambda: None)
    page = ProgressPage()
    with page.stage("train-ldm"):
        page.update("train-ldm", 1, 2)
    assert bars == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.2, "7 s"), (600, "10 min"), (12_000, "3 h 20 min"), (400_000, "4 d 15 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
