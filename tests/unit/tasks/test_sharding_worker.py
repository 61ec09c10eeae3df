import pytest
import tiny

from tasks.sharding_worker import preprocess_worker


def test_a_worker_that_sees_other_files_stops(tmp_path):
    config = tiny.config(tiny.write_images(tmp_path / "photos"), str(tmp_path / "store"))
    out = {"store": str(tmp_path / "store"), "stage": "preprocess", "fingerprint": "x"}
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
