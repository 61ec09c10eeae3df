"""The log files of a stage."""

import json
import logging

from repae_core.artifacts import Artifact, Store
from tasks.stage_log import stage_log


def test_an_attempt_that_failed_keeps_its_lines(tmp_path):
    """Its traceback says why there was another."""
    artifact = Artifact(Store(str(tmp_path)), "train-ldm", "f" * 16)
    log = stage_log(artifact, "rank0", run_id="first", rank=0)
    log.__enter__()
    logging.getLogger("repae").info("begins")
    error = ZeroDivisionError("of the first attempt")
    assert not log.__exit__(type(error), error, None)
    with stage_log(artifact, "rank0", run_id="second", rank=0):
        logging.getLogger("repae").info("goes on")
    lines = [json.loads(line) for line in artifact.read_bytes("logs/rank0.log").splitlines()]
    assert [(line["run"], line["message"]) for line in lines] == [
        ("first", "begins"), ("first", "ended by ZeroDivisionError"), ("second", "goes on"),
    ]  # fmt: skip
    assert "of the first attempt" in lines[1]["exc_info"]
