"""GPUs that are not there are bad input, told before any work: never waited for, never replaced by the CPU."""

import pytest
import tiny

from tasks import gpus
from tasks.pipeline_run import open_run
from tasks.preprocess import preprocess
from tasks.train_repae import train_repae


def asking(tmp_path, stage, workers, each):
    return tiny.config("digits", tmp_path / "store", f"{stage}.workers={workers}", f"{stage}.gpus_per_worker={each}")


@pytest.mark.parametrize(
    ("workers", "each", "found", "refused"),
    [(0, 0, 0, False), (0, 1, 0, True), (0, 1, 1, False), (2, 1, 1, True), (2, 1, 2, False), (2, 2, 3, True)],
)
def test_gpus_of_this_machine(workers, each, found, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "gpus_here", lambda: found)
    config = asking(tmp_path, "train_repae", workers, each)
    if refused:
        with pytest.raises(ValueError, match=rf"^train_repae\.gpus_per_worker={each}: .* this machine has {found}; "):
            gpus.require_gpus(config, "train-repae")
    else:
        gpus.require_gpus(config, "train-repae")
    gpus.require_gpus(config, "preprocess")  # has no such field


def test_a_given_cluster_may_start_its_gpus_later(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "gpus_here", lambda: 0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    gpus.require_gpus(asking(tmp_path, "generate", 2, 1), "generate")
    with pytest.raises(ValueError, match=r"generate\.gpus_per_worker=1"):  # here, not in the cluster
        gpus.require_gpus(asking(tmp_path, "generate", 0, 1), "generate")


def test_refused_before_any_work(tmp_path, home, monkeypatch):
    """By the pipeline before its first stage, by a stage before its artifact; a skipped one needs none."""
    monkeypatch.setattr(gpus, "gpus_here", lambda: 0)
    without, asked = asking(tmp_path, "train_repae", 0, 0), asking(tmp_path, "train_repae", 0, 1)
    with pytest.raises(ValueError, match=r"train_repae\.gpus_per_worker=1"), open_run(asked, kind="full-pipeline"):
        pass
    store = tmp_path / "store"
    assert not list(store.glob("runs/*"))
    with open_run(asked, kind="preprocess") as run:
        preprocess.fn(run)
    with (
        pytest.raises(ValueError, match=r"train_repae\.gpus_per_worker=1"),
        open_run(asked, kind="train-repae") as run,
    ):
        train_repae.fn(run)
    assert not list(store.glob("train-repae/*"))
    with open_run(without, kind="train-repae") as run:
        train_repae.fn(run)
    with open_run(asked, kind="train-repae") as run:
        train_repae.fn(run)
    assert run.record.stages["train-repae"].status == "skipped"
