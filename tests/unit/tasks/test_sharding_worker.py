import json

import pytest
import tiny

from repae_core.artifacts import Artifact, Store
from tasks.sharding_worker import preprocess_worker
from tasks.training_worker import artifact_reference, open_artifact


def test_a_worker_waits_for_the_store_as_long_as_the_driver(tmp_path):
    artifact = Artifact(Store(str(tmp_path), retry_seconds=7), "preprocess", "x")
    opened = open_artifact(json.loads(json.dumps(artifact_reference(artifact))))
    assert (opened.uri, opened.store.retry_seconds) == (artifact.uri, 7)


def test_a_worker_that_sees_other_files_stops(tmp_path):
    config = tiny.config(tiny.write_images(tmp_path / "photos"), str(tmp_path / "store"))
    out = artifact_reference(Artifact(Store(str(tmp_path / "store")), "preprocess", "x"))
    payload = {
        "config": config.model_dump(mode="json"),
        "out": out,
        "inputs": {},
        "listing": "that of the driver",
        "run": "r",
        "workers": 0,
    }
    with pytest.raises(ValueError, match=r"preprocess.source: .*photos has other files on worker 0"):
        preprocess_worker(payload, lambda message: None)
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["rank0.log"]
