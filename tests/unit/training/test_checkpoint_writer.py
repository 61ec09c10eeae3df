"""The background writer: what is kept, what happens while the store is away or full, and after a lost lease."""

import contextlib
import errno
import os
import shutil
import tempfile
import threading

import pytest
import torch
from safetensors import SafetensorError

from repae_core.artifacts import Artifact, Store, StoreError
from repae_core.artifacts.checkpoints import CommittedFiles, committed_checkpoints
from repae_core.training import checkpoint_writer
from repae_core.training.checkpoint_writer import CheckpointWriter
from repae_core.training.distributed import open_group
from repae_core.training.optim import Network
from repae_core.training.state import LDMState


class Lost(Exception):
    pass


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def state() -> LDMState:
    layer = torch.nn.Linear(2, 2)
    return LDMState(open_group(), Network(layer, layer, learning_rate=0.1), torch.nn.Linear(2, 2))


@pytest.fixture
def folder(tmp_path) -> Artifact:
    return Artifact(Store(str(tmp_path / "store")), "train-ldm", "f" * 16)


def writer(folder, state, *, guard=lambda: None, keep=2, **settings) -> CheckpointWriter:
    return CheckpointWriter(folder, state, guard=guard, keep=keep, **settings)


def save(target: CheckpointWriter, images_seen: int) -> None:
    target.save({"images_seen": images_seen, "history": []})


def test_keeps_the_newest_and_every_nth(folder, state, tmp_path):
    with writer(folder, state, keep=2, keep_every=30) as target:
        for images_seen in range(10, 80, 10):
            save(target, images_seen)
    assert committed_checkpoints(folder) == [30, 60, 70]
    assert not any(name.split("/")[1] == "40" for name in folder.files())
    assert list(tmp_path.glob("repae-checkpoints-*/*")) == []
    assert target.seconds > 0


def test_what_a_killed_attempt_left_is_removed(folder, state):
    """Killed right after its last commit, or while it uploaded; the run that goes on may have no step left."""
    with writer(folder, state) as killed:
        save(killed, 10)
        save(killed, 20)
    folder.write_bytes("checkpoints/30/rank1.safetensors", b"half")
    with writer(folder, state, keep=1):
        pass
    assert committed_checkpoints(folder) == [20]
    assert all(name.startswith("20/") for name in folder.files("checkpoints"))


def test_a_failed_listing_removes_no_checkpoint(folder, state, monkeypatch):
    with writer(folder, state) as first:
        save(first, 10)
        save(first, 20)
    scandir, failures = os.scandir, []

    def stale_once(path="."):
        if str(path).endswith("checkpoints") and not failures:
            failures.append(path)
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale_once)
    with pytest.raises(StoreError, match="Stale file handle"), writer(folder, state):
        pass
    assert committed_checkpoints(folder) == [10, 20]


def test_what_someone_has_put_beside_the_checkpoints_is_left_alone(folder, state):
    """A copy under another name, a file manager's notes."""
    with writer(folder, state) as first:
        save(first, 10)
    for name in ("checkpoints/10.bak/commit.json", "checkpoints/.DS_Store"):
        folder.write_bytes(name, b"{}")
    with writer(folder, state, keep=1) as second:
        save(second, 20)
    assert committed_checkpoints(folder) == [20]
    assert folder.files("checkpoints").keys() >= {"10.bak/commit.json", ".DS_Store"}


def test_a_checkpoint_is_committed_as_its_snapshot_was(folder, state, monkeypatch):
    """What a rival removes in the last moment is missed by whoever reads it, and not silently left out."""
    commit = checkpoint_writer.commit_checkpoint

    def with_a_rival(folder, *more):
        folder.store.delete(folder.key("checkpoints/10/sit.safetensors"))
        commit(folder, *more)

    monkeypatch.setattr(checkpoint_writer, "commit_checkpoint", with_a_rival)
    with writer(folder, state) as target:
        save(target, 10)
    names = {file["name"] for file in folder.read_json("checkpoints/10/commit.json")["files"]}
    assert "sit.safetensors" in names
    assert committed_checkpoints(folder) == []


def test_an_attempt_that_was_given_up_cannot_hollow_out_its_successors_checkpoint(folder, state, tmp_path, monkeypatch):
    """Frozen in its own upload, it wakes up and drops what is old while the next one uploads."""
    frozen, awake, reached = threading.Event(), threading.Event(), threading.Event()
    upload = folder.upload
    successor = Artifact(folder.store, folder.stage, folder.fingerprint)
    upload_of_successor = successor.upload

    def slow(name, path):
        upload(name, path)
        frozen.set()
        awake.wait(20)

    def watched(name, path):
        upload_of_successor(name, path)
        if "/20/" in name and not awake.is_set():
            reached.set()
            awake.set()
            with contextlib.suppress(StoreError):  # it finds its own half gone
                first.flush()

    folder.upload, successor.upload = slow, watched
    first = writer(folder, state)
    first.__enter__()
    save(first, 10)
    assert frozen.wait(20)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(checkpoint_writer, "open_scratch", lambda _: tmp_path / "other")
    with writer(successor, state) as second:
        save(second, 20)
        second.flush()
    with pytest.raises(StoreError, match="checkpoints/10: another process has changed it"):
        first.__exit__(None, None, None)
    assert reached.is_set()
    assert committed_checkpoints(successor) == [20]
    assert CommittedFiles(successor, 20).read("sit.safetensors")


def test_a_checkpoint_that_changed_while_it_was_written_is_not_committed(folder, state):
    upload = folder.upload

    def with_a_rival(name, path):
        upload(name, path)
        if name.endswith("20/state.json"):
            folder.store.delete(folder.key("checkpoints/20/sit.safetensors"))

    folder.upload = with_a_rival
    target = writer(folder, state)
    target.__enter__()
    save(target, 10)
    save(target, 20)
    with pytest.raises(StoreError, match=r"checkpoints/20: another process has changed it"):
        target.__exit__(None, None, None)
    assert committed_checkpoints(folder) == [10]


def test_a_snapshot_is_the_state_of_its_step(folder, state):
    """The weights change while the upload waits: the checkpoint has those of its step."""
    before = state.sit.module.weight.detach().clone()
    gate = threading.Event()
    with writer(folder, state, guard=lambda: gate.wait(10)) as target:
        save(target, 10)
        state.sit.module.weight.data.zero_()
        assert committed_checkpoints(folder) == []
        gate.set()
        target.flush()
        assert committed_checkpoints(folder) == [10]
    from safetensors.torch import load

    assert torch.equal(load(folder.read_bytes("checkpoints/10/sit.safetensors"))["weight"], before)


def test_scratch_is_bounded(folder, state, tmp_path, monkeypatch):
    """And a step that waits for a slow store tells the watchdog that it has not hung."""
    monkeypatch.setattr(checkpoint_writer, "_PULSE_SECONDS", 0.05)
    gate, waits = threading.Event(), []
    settings = {"waits": lambda: waits.append(1), "keep": 9, "waiting": 2}
    with writer(folder, state, guard=lambda: gate.wait(20), **settings) as target:
        save(target, 10)
        save(target, 20)
        assert waits == []
        third = threading.Thread(target=save, args=(target, 30))
        third.start()
        third.join(0.5)
        assert third.is_alive()
        assert len(waits) > 2
        assert len(list(tmp_path.glob("repae-checkpoints-*/*/*"))) == 2
        gate.set()
        third.join(20)
    assert committed_checkpoints(folder) == [10, 20, 30]


def test_waiting_for_a_slow_store_is_no_hang(folder, state, monkeypatch):
    """As before a machine is taken away."""
    monkeypatch.setattr(checkpoint_writer, "_PULSE_SECONDS", 0.05)
    gate, waits = threading.Event(), []

    def working():
        waits.append(1)
        if len(waits) == 3:
            gate.set()

    with writer(folder, state, guard=lambda: gate.wait(20), waits=working) as target:
        save(target, 10)
        target.flush()
        assert committed_checkpoints(folder) == [10]
    assert len(waits) >= 3


@pytest.mark.parametrize("late_with", [save, lambda target, images: target.write({"1.png": b"late"}, images)])
def test_what_the_next_owner_has_committed_is_left_alone(folder, state, late_with):
    """A worker whose lease was taken over while it trained comes late with the same checkpoint, or a picture."""
    with writer(folder, state) as owner:
        save(owner, 10)
        save(owner, 20)
        owner.write({"1.png": b"picture"}, None)
    answers = iter([None, Lost])  # the first: before the writer cleans up at its start

    def guard():
        if answer := next(answers):
            raise answer

    late = writer(folder, state, guard=guard).__enter__()
    late_with(late, 20)
    with pytest.raises(Lost):
        late.__exit__(None, None, None)
    assert committed_checkpoints(folder) == [10, 20]
    assert folder.read_bytes("1.png") == b"picture"


def test_a_cancel_commits_nothing_that_it_takes_away(folder, state, monkeypatch):
    """The store answers again while the scratch of a cancelled run is being removed."""
    monkeypatch.setattr(checkpoint_writer, "_CANCEL_SECONDS", 0.1)
    uploading, back, calls = threading.Event(), threading.Event(), []

    def guard():
        calls.append(1)
        if len(calls) == 2:  # the first: before the writer cleans up at its start
            uploading.set()
            back.wait(20)

    def remove_all_but_the_record(scratch, **_):
        for path in scratch.rglob("*.*"):
            if path.is_file() and path.name != "state.json":
                path.unlink()

    target = writer(folder, state, guard=guard).__enter__()
    save(target, 10)
    assert uploading.wait(20)
    monkeypatch.setattr(shutil, "rmtree", remove_all_but_the_record)
    target.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    back.set()
    target._thread.join(20)
    assert committed_checkpoints(folder) == []


def test_a_store_that_never_answers_at_the_end_is_left_to_the_watchdog(folder, state, monkeypatch):
    """While files are written the end says that it is alive; after that it says nothing more."""
    monkeypatch.setattr(checkpoint_writer, "_PULSE_SECONDS", 0.05)
    monkeypatch.setattr(checkpoint_writer, "_STUCK_SECONDS", 3.0)
    away, waits = threading.Event(), []

    def train():
        with writer(folder, state, guard=lambda: away.wait(60), waits=lambda: waits.append(1)) as target:
            save(target, 10)

    run = threading.Thread(target=train)
    run.start()
    run.join(5.0)
    said = len(waits)
    assert 2 < said < 80  # 3 s in pulses of 0.05 s, and some slack
    run.join(0.5)
    assert run.is_alive()
    assert len(waits) == said
    away.set()
    run.join(20)
    assert committed_checkpoints(folder) == [10]


def test_a_failed_upload_stops_the_run_and_damages_nothing(folder, state, monkeypatch):
    with writer(folder, state) as target:
        save(target, 10)
    monkeypatch.setattr(folder, "upload", lambda name, path: (_ for _ in ()).throw(StoreError("no space left")))
    failing = writer(folder, state)
    with pytest.raises(StoreError, match="no space left"), failing:  # noqa: PT012
        save(failing, 20)
        failing.flush()
    assert committed_checkpoints(folder) == [10]


@pytest.mark.parametrize(
    "told",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter: No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_local_disk_is_one_line(folder, state, monkeypatch, told):
    def full(*_):
        raise told

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", full)
    target = writer(folder, state)
    with pytest.raises(StoreError, match=r"checkpoint scratch .*: .*No space left on device"), target:
        save(target, 10)


@pytest.mark.parametrize("wait", ["flush", "end"])
def test_waits_for_the_store_count_as_lost_to_checkpoints(folder, state, wait):
    upload, gate = folder.upload, threading.Event()

    def slow(name, path):
        gate.wait(0.5)
        upload(name, path)

    folder.upload = slow
    with writer(folder, state) as target:
        save(target, 10)
        before = target.seconds
        if wait == "flush":
            target.flush()
            assert target.seconds > before + 0.5
    assert target.seconds > before + 0.5


def test_pictures_wait_for_the_store_in_the_background(folder, state):
    """`write` returns while the store is away; a picture is there before a later checkpoint counts."""
    gate, seen = threading.Event(), []
    upload = folder.upload

    def away(name, path):
        gate.wait(20)
        upload(name, path)
        seen.append((name, committed_checkpoints(folder)))

    folder.upload = away
    with writer(folder, state) as target:
        target.write({"previews/1.png": b"picture"}, "receipt")
        save(target, 10)
        assert target.take_receipts() == []
        assert folder.files() == {}
        gate.set()
        target.flush()
        assert target.take_receipts() == ["receipt"]
    assert seen[0] == ("previews/1.png", [])
    assert folder.read_bytes("previews/1.png") == b"picture"
    assert committed_checkpoints(folder) == [10]
