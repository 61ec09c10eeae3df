"""Rows of values by step in an artifact's folder."""

import pytest

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.history import METRICS, PERFORMANCE, as_lines, read_rows

ROWS = [{"step": 1, "images_seen": 8, "vae_loss": 0.1 + 0.2}, {"step": 2, "images_seen": 16, "grad_norm_vae": 1e-30}]


@pytest.fixture
def artifact(tmp_path):
    return Artifact(Store(str(tmp_path)), "train-ldm", "f" * 16)


def test_rows_come_back_to_the_last_bit(artifact):
    artifact.write_bytes(METRICS, as_lines(ROWS))
    assert read_rows(artifact, METRICS) == ROWS
    assert read_rows(artifact, PERFORMANCE) == []


@pytest.mark.parametrize("damage", [b'{"step": 3, "ima', b"\0\0\0", b"\xff\xfe{", b'{"step": 3}', b"7", b"[]"])
def test_what_is_damaged_is_left_out_and_named(artifact, caplog, damage):
    artifact.write_bytes(PERFORMANCE, as_lines(ROWS) + damage)
    assert read_rows(artifact, PERFORMANCE) == ROWS
    assert "logs/performance.jsonl is damaged: 1 lines left out" in caplog.text
