import tempfile
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repae_core.artifacts import (
    Artifact,
    InputEntry,
    Lease,
    RunRecord,
    StageRecord,
    Store,
    find_garbage,
    remove,
    save_run,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)
STAGES = ("preprocess", "train-repae", "extract-vae")


def days_ago(days):
    return (NOW - timedelta(days=days)).isoformat(timespec="milliseconds")


def make(store, number, inputs, *, age, finished=True):
    """Artifact `number`, made from earlier ones."""
    artifact = Artifact(store, STAGES[number % 3], f"{number:016x}")
    artifact.write_bytes("data.bin", b"x" * (number + 1))
    entries = {
        f"role{i}": InputEntry(stage=STAGES[i % 3], fingerprint=f"{i:016x}", manifest_sha256="0") for i in inputs
    }
    if finished:
        manifest = artifact.commit(version=1, config={}, inputs=entries, started_at=days_ago(age), seconds=1.0)
        store.write_json(
            artifact.key("manifest.json"), manifest.model_dump(mode="json") | {"finished_at": days_ago(age)}
        )
    else:
        inputs_json = {role: entry.model_dump() for role, entry in entries.items()}
        artifact.write_json("work.json", {"inputs": inputs_json, "started_at": days_ago(age)})
    return artifact


def record(store, number, used, *, age, status="finished", config=None):
    stages = {STAGES[i % 3]: StageRecord(fingerprint=f"{i:016x}", status="skipped") for i in used}
    run = RunRecord(run_id=f"2026-{number:04d}", kind="full-pipeline", created_at=days_ago(age), status=status,
                    config=config or {}, stages=stages)  # fmt: skip
    save_run(store, run)


ages = st.floats(0, 100)
artifacts = st.lists(st.tuples(st.sets(st.integers(0, 6), max_size=3), ages, st.booleans()), min_size=1, max_size=7)
runs = st.lists(st.tuples(st.sets(st.integers(0, 6), max_size=3), ages), max_size=4)


@settings(max_examples=150, deadline=None)
@given(artifacts, runs, st.sets(st.integers(0, 6), max_size=2), st.integers(0, 3), st.sampled_from([0.0, 30.0, 90.0]))
def test_nothing_that_is_referred_to_is_ever_freed(made, recorded, models, keep_runs, keep_days):
    """Against a plain statement of the rule: walk from each kept thing and see that all on the way is there."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        inputs = {n: {i for i in of if i < n} for n, (of, _, _) in enumerate(made)}
        all_made = {n: make(store, n, inputs[n], age=age, finished=whole) for n, (_, age, whole) in enumerate(made)}
        for number, (used, age) in enumerate(recorded):
            record(store, number, used, age=age)
        needed = {i for i in models if i in all_made} | {n for n, (_, age, _) in enumerate(made) if age < keep_days}
        newest_first = [run for _, run in sorted(enumerate(recorded), reverse=True)]
        for position, (used, age) in enumerate(newest_first):
            by_stage = {i % 3: i for i in used}  # a run has one artifact a stage
            if position < keep_runs or age < keep_days:
                needed |= set(by_stage.values()) & set(all_made)
        for _ in made:
            needed |= {i for n in needed for i in inputs[n]}
        uris = [all_made[i].uri for i in models if i in all_made]
        garbage = find_garbage(store, STAGES, keep_days=keep_days, keep_runs=keep_runs, registered=uris, now=NOW)
        freed = {int(entry.name.fingerprint, 16) for entry in garbage}
        assert freed == set(all_made) - needed
        assert all(entry.bytes == sum(Artifact(store, *entry.name).files().values()) for entry in garbage)
        assert all(remove(store, entry) for entry in garbage)
        for n, artifact in all_made.items():
            assert bool(artifact.files()) == (n in needed)
            assert artifact.is_whole() == (n in needed and made[n][2])
        assert not find_garbage(store, STAGES, keep_days=keep_days, keep_runs=keep_runs, registered=uris, now=NOW)


def test_what_is_being_written_stays_with_all_that_it_reads(tmp_path):
    store = Store(str(tmp_path))
    images = make(store, 0, (), age=80)
    model = make(store, 1, (0,), age=80, finished=False)
    options = {"keep_days": 30, "keep_runs": 0, "now": NOW}
    listed = find_garbage(store, STAGES, **options)
    assert len(listed) == 2
    with Lease(store, model.key("lease.json")):
        assert find_garbage(store, STAGES, **options) == []
        assert [remove(store, entry) for entry in listed if entry.name.stage == "train-repae"] == [False]
        assert images.is_whole()
        assert model.exists("work.json")


def test_a_run_that_has_not_ended_keeps_what_it_made_and_what_its_config_names(tmp_path):
    store = Store(str(tmp_path))
    images, vae, other = make(store, 0, (), age=80), make(store, 2, (), age=80), make(store, 5, (), age=70)
    options = {"keep_days": 30, "keep_runs": 0, "now": NOW}
    for reference in (vae.fingerprint[:15] + "2", vae.uri + "/"):
        record(store, 1, [0], age=80, status="running", config={"cache_latents": {"vae": reference}})
        assert [Artifact(store, *g.name).uri for g in find_garbage(store, STAGES, **options)] == [other.uri]
    record(store, 1, [0], age=80, status="running", config={"cache_latents": {"vae": "latest"}})
    assert [Artifact(store, *g.name).uri for g in find_garbage(store, STAGES, **options)] == [vae.uri]
    record(store, 1, [0], age=80, config={"cache_latents": {"vae": "latest"}})
    assert {Artifact(store, *g.name).uri for g in find_garbage(store, STAGES, **options)} == {
        images.uri, vae.uri, other.uri
    }  # fmt: skip


def test_an_interrupted_removal_is_finished_by_the_next(tmp_path):
    store = Store(str(tmp_path))
    artifact = make(store, 0, (), age=80)
    artifact.delete("manifest.json")
    (found,) = find_garbage(store, STAGES, keep_days=30, keep_runs=10, now=NOW)
    assert found.reason == "remains of a removed artifact"
    assert remove(store, found)
    assert store.folders("preprocess") == []


def test_a_damaged_manifest_stops(tmp_path):
    store = Store(str(tmp_path))
    artifact = make(store, 0, (), age=80)
    store.write_bytes(artifact.key("manifest.json"), b"{}")
    with pytest.raises(ValueError, match=r"preprocess/0+/manifest.json"):
        find_garbage(store, STAGES, keep_days=30, keep_runs=10, now=NOW)
    assert artifact.exists("data.bin")
