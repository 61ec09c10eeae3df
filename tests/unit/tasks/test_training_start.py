import logging

import pytest
import tiny

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.lease import LeaseLost
from repae_core.artifacts.store import StoreError
from tasks.ray_launch import FinalError, FinalInputError, FinalStoreError
from tasks.training import kept_threads
from tasks.training_worker import final_errors


def test_a_run_keeps_the_threads_it_started_with_and_says_so(tmp_path, caplog):
    section = tiny.config("digits", str(tmp_path), "train_repae.threads=1").train_repae
    artifact = Artifact(Store(str(tmp_path)), "train-repae", "x")
    with caplog.at_level(logging.WARNING):
        assert kept_threads(artifact, section) == 1
        assert kept_threads(artifact, section) == 1
        assert not caplog.messages
        assert kept_threads(artifact, section.model_copy(update={"threads": 2})) == 1
    assert caplog.messages == ["this run goes on with the 1 thread(s) a worker that it started with, not 2"]


@pytest.mark.parametrize(("raised", "final"), [
    (ValueError("x"), FinalInputError), (StoreError("x"), FinalStoreError), (LeaseLost("x"), FinalError),
    (ArithmeticError("x"), FinalError),
])  # fmt: skip
def test_what_no_restart_mends_is_told_by_its_kind(raised, final):
    with pytest.raises(FinalError, match=r"^x$") as told, final_errors(True):
        raise raised
    assert type(told.value) is final
    with pytest.raises(type(raised)) as plain, final_errors(False):
        raise raised
    assert plain.value is raised
