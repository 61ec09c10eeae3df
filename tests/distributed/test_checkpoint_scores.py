"""Scores of checkpoints while a training goes on: in MLflow and the logs, and without any effect on the training."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import tiny
from mlflow import MlflowClient

from repae_core.artifacts import Artifact, Store, StoreError
from repae_core.artifacts.checkpoints import commit_checkpoint
from repae_core.config import load_config
from tasks import checkpoint_scores
from tasks.checkpoint_scores import CheckpointScores
from tasks.ray_session import RaySession
from tasks.ray_side_task import start_beside

ONE = ("train_repae.workers=1", "train_repae.cpus_per_worker=1", "train_ldm.workers=1", "train_ldm.cpus_per_worker=1",
       "train_repae.max_steps=6", "train_ldm.max_steps=8")  # fmt: skip
SCORED = (*ONE, "train_repae.score_every=4", "train_repae.score_images=12", "train_ldm.score_every=8",
          "train_ldm.score_images=12")  # fmt: skip


def trained(record, stage) -> Artifact:
    return Artifact(Store(record.config["store"]), stage, record.stages[stage].fingerprint)


def points(record, stage) -> list[tuple[int, float]]:
    client = MlflowClient(record.mlflow_tracking_uri)
    history = client.get_metric_history(record.stages[stage].mlflow_run_id, "score/fd_digits")
    return [(point.step, point.value) for point in history]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "digits")


def test_scores_of_both_trainings(images, tmp_path, home):
    """The last checkpoint always has its score; the weights are those of a run without."""
    plain = tiny.run_pipeline(tiny.config(images, tmp_path / "plain", *ONE))
    scored = tiny.run_pipeline(tiny.config(images, tmp_path / "scored", *SCORED))
    for stage, last in (("train-repae", 64), ("train-ldm", 64)):
        artifact = trained(scored, stage)
        assert tiny.contents(artifact) == tiny.contents(trained(plain, stage))
        scores = json.loads(artifact.read_bytes(f"logs/scores-{last:09d}.json"))
        assert scores["fd_digits"] > 0
        assert scores.keys() >= {"fd_digits", "kid", "precision", "recall"}
        found = points(scored, stage)
        assert (last, scores["fd_digits"]) in found
        assert {step for step, _ in found} <= {32, 64}


def joint_training(config) -> bool:
    """Preprocessing and joint training alone; whether it finished."""
    from tasks.pipeline_run import open_run
    from tasks.preprocess import preprocess
    from tasks.train_repae import train_repae

    with open_run(config, kind="train-repae") as run:
        preprocess.fn(run)
        train_repae.fn(run)
        return run.plan.stages["train-repae"].artifact.is_whole()


def test_what_goes_wrong_is_a_warning(images, tmp_path, home, monkeypatch):
    """A feature network that cannot be loaded, and no room: the training ends as ever."""
    told: list[str] = []
    monkeypatch.setattr(checkpoint_scores.logger, "warning", lambda text, *values: told.append(text % values))
    broken = ("evaluate.extractor=inception", f"evaluate.extractor_weights={images}/zero/000.png")
    assert joint_training(tiny.config(images, tmp_path / "a", *SCORED, *broken))
    assert any(line.startswith("no score of checkpoint 64: ") and "000.png" in line for line in told)
    crowded = ("train_repae.cpus_per_worker=64", "generate.guide=train-ldm")
    assert joint_training(tiny.config(images, tmp_path / "b", *SCORED, *crowded))
    assert "scores of checkpoints are without guidance: generate.guide=train-ldm is another model" in told
    # The last checkpoint finds room: the training has given its CPUs back by then.
    assert "no score of checkpoint 32: Ray has no CPUs or GPUs that the training leaves free" in told


def test_ray_errors_end_no_training(images, tmp_path, home, monkeypatch):
    """As while the cluster's head starts again."""
    import ray

    def away():
        raise ray.exceptions.RaySystemError("the head is away")

    told: list[str] = []
    monkeypatch.setattr(checkpoint_scores.logger, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(ray, "available_resources", away)
    assert joint_training(tiny.config(images, tmp_path / "store", *SCORED))
    assert any(line.startswith("no score of checkpoint 64: ") and "the head is away" in line for line in told)


@pytest.fixture
def context(tmp_path) -> SimpleNamespace:
    """Of a training with a checkpoint whose score is due."""
    artifact = Artifact(Store(str(tmp_path / "store")), "train-repae", "f" * 16)
    commit_checkpoint(artifact, "checkpoints/64")
    config = tiny.config(tmp_path, tmp_path / "store", *SCORED)
    return SimpleNamespace(config=config, section=config.train_repae, artifact=artifact, inputs={})


@pytest.mark.parametrize("scored", [True, False])
def test_a_score_that_ran_when_its_driver_died_is_made_again(context, monkeypatch, scored):
    """And one that was not in MLflow yet is sent."""
    artifact, started, logged = context.artifact, [], []
    context.tracking = SimpleNamespace(log_metrics=lambda values, images_seen: logged.append((images_seen, values)))
    if scored:
        artifact.write_json("logs/scores-000000064.json", {"fd_digits": 3.5})
    monkeypatch.setattr(checkpoint_scores, "start_beside", lambda work, payload, **_: started.append(payload))
    CheckpointScores(context, artifact).look(64)
    assert [payload["images_seen"] for payload in started] == ([] if scored else [64])
    assert logged == ([(64, {"score/fd_digits": 3.5})] if scored else [])


def test_a_score_is_kept_until_the_store_takes_it(context, monkeypatch):
    done = SimpleNamespace(done=lambda: True, result=lambda: {"fd_digits": 3.5})
    monkeypatch.setattr(checkpoint_scores, "start_beside", lambda *_, **__: done)
    logged = []
    context.tracking = SimpleNamespace(log_metrics=lambda values, images_seen: logged.append((images_seen, values)))
    scores = CheckpointScores(context, context.artifact)
    scores.look(64)
    write = Artifact.write_json

    def away(*_):
        raise StoreError("the store is away")

    monkeypatch.setattr(Artifact, "write_json", away)
    scores.look(72)
    monkeypatch.setattr(Artifact, "write_json", write)
    scores.look(80)
    assert context.artifact.read_json("logs/scores-000000064.json") == {"fd_digits": 3.5}
    assert logged == [(64, {"score/fd_digits": 3.5})]


def test_a_damaged_score_is_made_again(context, monkeypatch, caplog):
    context.artifact.write_bytes("logs/scores-000000064.json", b"{")
    started = []
    monkeypatch.setattr(checkpoint_scores, "start_beside", lambda work, payload, **_: started.append(payload))
    CheckpointScores(context, context.artifact).look(64)
    assert [payload["images_seen"] for payload in started] == [64]
    assert "a score is left out" in caplog.text


def test_a_score_that_went_with_its_cluster_is_made_once_more(context, monkeypatch, home):
    def endless_score(payload):  # nested: pickled by value, Ray's workers cannot import the tests
        import time

        time.sleep(600)
        return {}

    session, started = RaySession(), []

    def start(work, payload, **_):
        started.append(start_beside(endless_score, payload, cpus=1))
        return started[-1]

    monkeypatch.setattr(checkpoint_scores, "start_beside", start)
    scores = CheckpointScores(context, context.artifact)
    try:
        for times in (1, 2, 2):
            session.connect(1)
            scores.look(64)
            scores.look(64)  # the first one has taken what was lost
            assert len(started) == times
            assert None not in started
            session.recover()  # as after a failure of the workers
    finally:
        session.close()


def test_a_cancel_while_a_score_is_waited_for(home):
    """Goes on at once, and ending the score afterwards starts no cluster anew."""
    import ray

    class Cancelled(BaseException):
        pass

    def cancel(*_):
        raise Cancelled

    def endless_score(payload):  # nested: pickled by value, Ray's workers cannot import the tests
        import time

        time.sleep(600)
        return {}

    session, handler = RaySession(), signal.signal(signal.SIGUSR1, cancel)
    session.connect(1)
    try:
        task = start_beside(endless_score, {}, cpus=1)
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Cancelled):
            task.done(100)
    finally:
        session.close()
        signal.signal(signal.SIGUSR1, handler)
    task.cancel()
    assert task.done()
    assert not ray.is_initialized()


@pytest.mark.parametrize(("sets", "message"), [
    (["train_repae.workers=0", "train_repae.score_every=4"], "score_every needs Ray"),
    (["train_ldm.score_every=5", "train_ldm.checkpoint_every=2", "train_ldm.workers=1"], "score_every=5 is no mult"),
])  # fmt: skip
def test_settings_that_do_not_fit(sets, message):
    with pytest.raises(ValueError, match=message):
        load_config("quickstart", sets)
