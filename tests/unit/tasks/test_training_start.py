import logging

import tiny

from repae_core.artifacts import Artifact, Store
from tasks.training import kept_threads


def test_a_run_keeps_the_threads_it_started_with_and_says_so(tmp_path, caplog):
    section = tiny.config("digits", str(tmp_path), "train_repae.threads=1").train_repae
    artifact = Artifact(Store(str(tmp_path)), "train-repae", "x")
    with caplog.at_level(logging.WARNING):
        assert kept_threads(artifact, section) == 1
        assert kept_threads(artifact, section) == 1
        assert not caplog.messages
        assert kept_threads(artifact, section.model_copy(update={"threads": 2})) == 1
    assert caplog.messages == ["this run goes on with the 1 thread(s) a worker that it started with, not 2"]
