import pytest

from repae_core.artifacts import RunRecord, StageRecord, Store, list_runs, load_run, new_run_id, save_run


def record(run_id):
    stage = StageRecord(fingerprint="f", status="made", uri="/s/preprocess/f", seconds=1.5)
    return RunRecord(
        run_id=run_id,
        kind="full-pipeline",
        created_at="2026-01-01",
        status="finished",
        config={"seed": 0},
        stages={"preprocess": stage},
    )


def test_save_load_list(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match=r"no runs in .*repae run"):
        load_run(store, "latest")
    for run_id in ("20260101-000000-aaaa", "20260102-000000-bbbb"):
        save_run(store, record(run_id))
    assert load_run(store, "latest").run_id == "20260102-000000-bbbb"
    assert load_run(store, "20260101") == record("20260101-000000-aaaa")
    assert [r.run_id for r in list_runs(store)] == ["20260102-000000-bbbb", "20260101-000000-aaaa"]
    with pytest.raises(ValueError, match="fits several runs"):
        load_run(store, "2026")
    with pytest.raises(ValueError, match="is no run"):
        load_run(store, "x")


def test_ids_are_path_safe_and_differ():
    ids = {new_run_id() for _ in range(20)}
    assert len(ids) > 1
    Store("memory://ids").write_bytes(f"runs/{ids.pop()}/run.json", b"")


def test_damaged_record_is_named(tmp_path):
    store = Store(str(tmp_path))
    store.write_json("runs/r/run.json", {"run_id": "r"})
    with pytest.raises(ValueError, match=r"runs/r/run\.json"):
        load_run(store, "latest")
