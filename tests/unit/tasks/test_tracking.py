import os
import threading

import pytest

from repae_core.artifacts import Artifact, Store
from tasks.tracking import Tracker


@pytest.fixture
def artifact(tmp_path):
    return Artifact(Store(str(tmp_path / "store")), "train-ldm", "abc")


def log(run, positions):
    for images in positions:
        run.log_metrics({"sit_loss": 1.0 / images, "images_per_second": 5.0}, images)
        run.flush(30)


def test_a_resumed_run_continues_its_metrics(home, artifact):
    tracker = Tracker("test")
    with tracker.pipeline_run("first", {}) as parent:
        with pytest.raises(ZeroDivisionError), tracker.stage_run("train-ldm", artifact, None) as run:
            log(run, (10, 20, 0))
        assert tracker.client.get_run(run.run_id).info.status == "FAILED"
        with tracker.stage_run("train-ldm", artifact, run.run_id) as again:
            log(again, (10, 20, 30))
    assert again.run_id == run.run_id
    history = tracker.client.get_metric_history(run.run_id, "sit_loss")
    assert [m.step for m in history] == [10, 20, 30]
    assert tracker.client.get_run(run.run_id).info.status == "FINISHED"
    assert tracker.client.get_run(parent).info.status == "FINISHED"


def test_a_stop_is_not_a_failure(home, artifact):
    tracker = Tracker("test")
    with pytest.raises(KeyboardInterrupt), tracker.stage_run("train-ldm", artifact, None) as run:
        raise KeyboardInterrupt
    assert tracker.client.get_run(run.run_id).info.status == "KILLED"


def test_a_run_of_another_database_is_not_resumed(home, artifact):
    with Tracker("test").stage_run("train-ldm", artifact, "0123456789abcdef0123456789abcdef") as run:
        pass
    assert run.run_id != "0123456789abcdef0123456789abcdef"


def test_each_home_has_its_own_database(tmp_path, monkeypatch, artifact):
    """In one process too, as in a notebook: MLflow would keep the first address in the environment."""
    for name in ("a", "b"):
        monkeypatch.setenv("REPAE_HOME", str(tmp_path / name))
        tracker = Tracker("test")
        with tracker.stage_run("train-ldm", artifact, None) as run:
            run.log_metrics({"sit_loss": 1.0}, 10)
        assert tracker.register_model(run.run_id, "repae-sit", {"sit.json": b"{}"}, {}) == "models:/repae-sit/1"
        assert (tmp_path / name / "mlflow.db").is_file()
        assert len(tracker.client.search_runs([tracker.experiment_id])) == 1
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_credentials_are_not_shown(monkeypatch, home):
    tracker = Tracker("test")
    tracker.uri = "https://user:secret@mlflow.example:5000/path"
    assert tracker.display_uri == "https://mlflow.example:5000/path"
    tracker.uri = "sqlite:////a/b.db"
    assert tracker.display_uri == "sqlite:////a/b.db"


def test_credentials_reach_no_message(monkeypatch, home):
    """MLflow repeats the address it was given in its errors, which go into logs, records and Prefect."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s%40cret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "of the environment")
    with pytest.raises(ConnectionError, match="127") as caught:
        Tracker("test")
    assert "cret" not in str(caught.value)
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("user", "s@cret")


def test_a_cancel_does_not_wait_for_mlflow(home, artifact, monkeypatch):
    tracker, never = Tracker("test"), threading.Event()
    for name in ("set_terminated", "set_tag"):
        monkeypatch.setattr(tracker.client, name, lambda *_: never.wait())
    with (
        pytest.raises(KeyboardInterrupt),
        tracker.pipeline_run("first", {}),
        tracker.stage_run("train-ldm", artifact, None),
    ):
        raise KeyboardInterrupt
    tracker.describe("cancelled", hurried=True)
    never.set()


def test_an_unreachable_server_is_one_line(monkeypatch, home):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"MLflow at http://127\.0\.0\.1:1: .*"):
        Tracker("test")


def test_registered_artifacts_are_known_under_any_models_name(home, artifact):
    tracker = Tracker("test")
    with tracker.pipeline_run("first", {}) as run:
        tracker.register_model(run, "repae-sit", {"x.json": b"{}"}, {"artifact": "/store/train-ldm/1"})
        tracker.register_model(run, "repae-vae", {"x.json": b"{}"}, {"artifact": "/store/extract-vae/2"})
        tracker.register_model(run, "of-somebody-else", {"x.json": b"{}"}, {})
    tracker.client.rename_registered_model("repae-sit", "our best")
    known = {uri for uri in tracker.registered_artifacts() if uri.startswith("/store/")}  # other tests register, too
    assert known == {"/store/train-ldm/1", "/store/extract-vae/2"}


def test_a_stage_that_died_after_registering_registers_once(home):
    tracker = Tracker("test")
    with tracker.pipeline_run("first", {}) as run:
        one, again, other = (
            tracker.register_model(run, "repae-sit", {"x.json": b"{}"}, {"images_seen": seen}) for seen in "112"
        )
        assert one == again != other
        tracker.client.set_registered_model_alias("repae-sit", "latest-run", one.rpartition("/")[2])
        tracker.register_model(run, "repae-sit", {"x.json": b"{}"}, {"images_seen": "2"})  # had died before the alias
    latest = tracker.client.get_model_version_by_alias("repae-sit", "latest-run")
    assert other == f"models:/repae-sit/{latest.version}"
