from repae_core.artifacts import RunRecord, StageRecord
from tasks.report import _spectra
from tasks.run_page import run_table


def record(mlflow: str) -> RunRecord:
    stage = StageRecord(fingerprint="f" * 16, status="failed", uri="s3://b/generate/f", message="a | b",
                        mlflow_run_id="0123456789abcdef")  # fmt: skip
    return RunRecord(run_id="r", kind="generate", created_at="", status="failed", config={}, stages={"generate": stage},
                     mlflow_run_id="fedcba9876543210", mlflow_tracking_uri=mlflow)  # fmt: skip


def test_links_lead_to_where_a_browser_finds_mlflow(monkeypatch):
    monkeypatch.delenv("REPAE_MLFLOW_UI", raising=False)
    assert "[01234567](http://mlflow:5000/#/runs/0123456789abcdef)" in run_table(record("http://mlflow:5000/"))
    assert "`0123456789abcdef`" in run_table(record("sqlite:////home/mlflow.db"))
    monkeypatch.setenv("REPAE_MLFLOW_UI", "http://127.0.0.1:5000")
    table = run_table(record("http://mlflow:5000"))
    assert "[01234567](http://127.0.0.1:5000/#/runs/0123456789abcdef)" in table
    assert "[fedcba98](http://127.0.0.1:5000/#/runs/fedcba9876543210)" in table
    assert "| a \\| b |" in table


def test_the_report_draws_every_number_of_the_latents():
    numbers = {"spectrum": [0.0, 2.0, 1.0], "principal_share": [0.8, 0.2], "mean": [0.5, -0.5], "std": [1.0, 2.0]}
    svg = _spectra({"before": numbers, "after": numbers})
    for label in ("spatial frequency", "principal component", "latent channel"):
        assert label in svg
    assert svg.count('id="axes_') == 3
