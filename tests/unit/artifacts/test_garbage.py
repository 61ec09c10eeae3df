import os
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
    local_files,
    remove,
    save_run,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)
STAGES = ("preprocess", "train-repae", "extract-vae")


# What `resolve_reference` takes for an artifact, and some it refuses today; then what may name a registered one.
SPELLINGS = {
    "uri": lambda a: a.uri,
    "slash": lambda a: f"{a.uri}/",
    "dot": lambda a: f"{a.uri}/.",
    "file": lambda a: f"file://{a.uri}",
    "relative": lambda a: os.path.relpath(a.uri),
    "dot first": lambda a: f"./{os.path.relpath(a.uri)}",
    "twice": lambda a: f"{a.store.url}//{a.stage}//{a.fingerprint}",
    "up": lambda a: f"{a.store.url}/x/../{a.stage}/x/../{a.fingerprint}",
    "key": lambda a: a.prefix,
    "fingerprint": lambda a: a.fingerprint,
    "link": lambda a: f"{a.store.url}-link/{a.prefix}",
    "address": lambda a: f"memory://another-address/{a.prefix}",
}
MODEL_SPELLINGS = ("uri", "slash", "link", "address")


@pytest.fixture(autouse=True, scope="module")
def times_can_be_set():
    """A file's age is its mtime alone, which a test can set; `test_store.py` has the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "changed_at", lambda path: os.stat(path).st_mtime)
        yield


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
        artifact.write_json("work.json", {"inputs": inputs_json, "started_at": days_ago(200)})
        set_age(artifact, age)
    return artifact


def set_age(artifact, days):
    changed = (NOW - timedelta(days=days)).timestamp()
    for name in artifact.files():
        os.utime(Path(artifact.uri, name), (changed, changed))


def record(store, number, used, *, age, status="finished", config=None):
    stages = {STAGES[i % 3]: StageRecord(fingerprint=f"{i:016x}", status="skipped") for i in used}
    run = RunRecord(run_id=f"2026-{number:04d}", kind="full-pipeline", created_at=days_ago(age), status=status,
                    config=config or {}, stages=stages)  # fmt: skip
    save_run(store, run)


ages = st.floats(0, 100)
artifacts = st.lists(st.tuples(st.sets(st.integers(0, 6), max_size=3), ages, st.booleans()), min_size=1, max_size=7)
runs = st.lists(st.tuples(st.sets(st.integers(0, 6), max_size=3), ages), max_size=4)
models = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(MODEL_SPELLINGS)), max_size=2)
names = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(sorted(SPELLINGS))), max_size=2)


@settings(max_examples=150, deadline=None)
@given(artifacts, runs, models, names, st.integers(0, 3), st.sampled_from([0.0, 30.0, 90.0]))
def test_nothing_that_is_referred_to_is_ever_freed(made, recorded, models, named, keep_runs, keep_days):
    """Against a plain statement of the rule: walk from each kept thing and see that all on the way is there."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/store")
        os.symlink(store.url, f"{store.url}-link")
        inputs = {n: {i for i in of if i < n} for n, (of, _, _) in enumerate(made)}
        all_made = {n: make(store, n, inputs[n], age=age, finished=whole) for n, (_, age, whole) in enumerate(made)}
        for number, (used, age) in enumerate(recorded):
            record(store, number + 1, used, age=age)
        config = {f"of{i}": SPELLINGS[how](all_made[i]) for i, how in named if i in all_made}
        record(store, 0, (), age=100, status="running", config={"section": config})
        needed = {i for i, _ in models + named if i in all_made} | {
            n for n, (_, age, _) in enumerate(made) if age < keep_days
        }
        newest_first = [run for _, run in sorted(enumerate(recorded), reverse=True)]
        for position, (used, age) in enumerate(newest_first):
            by_stage = {i % 3: i for i in used}  # a run has one artifact a stage
            if position < keep_runs or age < keep_days:
                needed |= set(by_stage.values()) & set(all_made)
        for _ in made:
            needed |= {i for n in needed for i in inputs[n]}
        uris = [SPELLINGS[how](all_made[i]) for i, how in models if i in all_made]
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
    set_age(artifact, 80)
    artifact.write_bytes("lease.json", b"")  # the removal's own, of a moment ago
    (found,) = find_garbage(store, STAGES, keep_days=30, keep_runs=10, now=NOW)
    assert found.reason.startswith("remains of a removed artifact")
    assert remove(store, found)
    assert store.folders("preprocess") == []


def test_what_may_still_be_arriving_is_kept(tmp_path):
    """A copy or a restore: no manifest yet, or a work.json of long ago."""
    store = Store(str(tmp_path))
    copy, begun = make(store, 0, (), age=80), make(store, 1, (), age=80, finished=False)
    copy.delete("manifest.json")
    options = {"keep_days": 30, "keep_runs": 10, "now": NOW}
    for artifact in (copy, begun):
        set_age(artifact, 80)
        artifact.write_bytes("new.bin", b"x")
        os.utime(Path(artifact.uri, "new.bin"), (NOW.timestamp(), NOW.timestamp()))
    empty = tmp_path / "preprocess" / f"{3:016x}"
    empty.mkdir()
    os.utime(empty, (NOW.timestamp(), NOW.timestamp()))
    assert find_garbage(store, STAGES, **options) == []
    assert len(find_garbage(store, STAGES, **options | {"now": NOW + timedelta(days=31)})) == 3


def test_a_folder_with_another_name_is_nobodys_and_keeps_its_inputs(tmp_path):
    store = Store(str(tmp_path))
    notes = tmp_path / "preprocess" / "my-notes" / "n.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("of a person")
    os.utime(notes, (0, 0))
    used = make(store, 0, (), age=80)
    (tmp_path / "train-repae").mkdir()
    os.rename(make(store, 1, (0,), age=80).uri, tmp_path / "train-repae" / "the-good-one")
    assert find_garbage(store, STAGES, keep_days=30, keep_runs=10, now=NOW) == []
    assert used.is_whole()


def test_a_registered_model_of_another_store_keeps_what_it_was_made_from(tmp_path, caplog):
    store, other = Store(str(tmp_path / "here")), Store(f"memory://{uuid.uuid4().hex}")
    images, vae, unused = make(store, 0, (), age=80), make(store, 2, (0,), age=80), make(store, 5, (), age=80)
    make(other, 3, (2,), age=80)
    model, damaged = make(other, 4, (3,), age=80), make(other, 1, (), age=80)
    other.write_bytes(damaged.key("manifest.json"), b"{}")
    options = {"keep_days": 30, "keep_runs": 0, "now": NOW}
    freed = find_garbage(store, STAGES, registered=[damaged.uri, model.uri], **options)
    assert [Artifact(store, *entry.name).uri for entry in freed] == [unused.uri]
    assert f"{damaged.uri}/manifest.json" in caplog.text
    assert model.uri not in caplog.text
    caplog.clear()
    find_garbage(store, STAGES, registered=[f"memory://nowhere/{vae.prefix}"], **options)
    assert not caplog.text  # it is this store's, by another address
    away = [f"{tmp_path}/gone/{model.prefix}", f"nothing://x/{model.prefix}", "a model's tag", "x/y", "https://x/y/z"]
    freed = find_garbage(store, STAGES, registered=away, **options)
    assert {entry.name for entry in freed} == {(a.stage, a.fingerprint) for a in (images, vae, unused)}
    assert [name in caplog.text for name in (away[0], "nothing://x:", *away[2:])] == [True, True, False, False, False]


def test_a_damaged_manifest_stops(tmp_path):
    store = Store(str(tmp_path))
    artifact = make(store, 0, (), age=80)
    store.write_bytes(artifact.key("manifest.json"), b"{}")
    with pytest.raises(ValueError, match=r"preprocess/0+/manifest.json"):
        find_garbage(store, STAGES, keep_days=30, keep_runs=10, now=NOW)
    assert artifact.exists("data.bin")
