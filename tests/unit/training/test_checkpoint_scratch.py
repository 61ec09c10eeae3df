"""What waits below TMPDIR for the store when a process is killed: who takes it over, who removes it."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from repae_core.artifacts import Artifact, Store, StoreError
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.training import checkpoint_scratch
from repae_core.training.checkpoint_scratch import (
    discard,
    finish,
    open_scratch,
    remove_scratch,
    unfinished,
    whole_folders,
)
from repae_core.training.checkpoint_writer import CheckpointWriter
from repae_core.training.distributed import open_group
from repae_core.training.optim import Network
from repae_core.training.state import LDMState

NOBODY = "999999999"  # no process has this id

KILLED = """
import sys, threading, torch
from repae_core.artifacts import Artifact, Store
from repae_core.training.checkpoint_writer import CheckpointWriter
from repae_core.training.distributed import open_group
from repae_core.training.optim import Network
from repae_core.training.state import LDMState

torch.manual_seed(0)
layer = torch.nn.Linear(2, 2)
state = LDMState(open_group(), Network(layer, layer, learning_rate=0.1), torch.nn.Linear(2, 2))
folder = Artifact(Store(sys.argv[1]), "train-ldm", "f" * 16)
away = threading.Event()
writer = CheckpointWriter(folder, state, guard=away.wait, keep=9, training=sys.argv[2])
writer.__enter__()
for seen in (10, 20):
    writer.save({"images_seen": seen, "history": []})
    writer.write({f"previews/{seen}-samples.png": b"png %d" % seen}, seen)
print("waiting", flush=True)
away.wait()
"""


@pytest.fixture(autouse=True)
def scratch_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def folder(tmp_path) -> Artifact:
    return Artifact(Store(str(tmp_path / "store")), "train-ldm", "f" * 16)


@pytest.fixture
def killed(folder, tmp_path):
    """A process that was killed while the store was away; two checkpoints and their pictures waited."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-c", KILLED, folder.store.url, "this"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGKILL)
    assert committed_checkpoints(folder) == []


def writer(folder: Artifact, training: str) -> CheckpointWriter:
    layer = torch.nn.Linear(2, 2)
    state = LDMState(open_group(), Network(layer, layer, learning_rate=0.1), torch.nn.Linear(2, 2))
    return CheckpointWriter(folder, state, guard=lambda: None, keep=9, training=training)


def left_by_a_dead_process(training: str, *, host: str = "", boot: str = "", namespace: str = "") -> Path:
    """Its folder, with a checkpoint in it."""
    mine = open_scratch("mine").name.split("@")
    parent = Path(tempfile.gettempdir()) / f"repae-checkpoints-{os.getuid()}"
    left = parent / "@".join([training, host or mine[1], boot or mine[2], namespace or mine[3], NOBODY])
    (left / "10").mkdir(parents=True)
    return left


def test_what_a_killed_process_left_is_committed_first(folder, killed, tmp_path):
    with writer(folder, "this") as target:
        target.flush()
        assert committed_checkpoints(folder) == [10, 20]
        assert target.take_receipts() == []
    pictures = {name: folder.read_bytes(f"previews/{name}") for name in folder.files("previews")}
    assert pictures == {"10-samples.png": b"png 10", "20-samples.png": b"png 20"}
    torch.manual_seed(0)
    expected = torch.nn.Linear(2, 2).weight
    from safetensors.torch import load

    assert torch.equal(load(folder.read_bytes("checkpoints/20/sit.safetensors"))["weight"], expected)
    assert list(tmp_path.glob("repae-checkpoints-*/*")) == []


def test_a_later_checkpoint_of_the_store_is_kept_as_it_is(folder, killed):
    with writer(folder, "another") as target:
        target.save({"images_seen": 20, "history": ["other"]})
    before = folder.read_bytes("checkpoints/20/commit.json")
    left = left_by_a_dead_process("this")  # with 10: the other one has removed what was left before
    with writer(folder, "this"):
        pass
    assert not left.exists()
    assert committed_checkpoints(folder) == [20]
    assert folder.read_bytes("checkpoints/20/commit.json") == before


def test_it_is_lost_to_another_training(folder, killed, tmp_path):
    with writer(folder, "begun anew"):
        pass
    assert committed_checkpoints(folder) == []
    assert list(tmp_path.glob("repae-checkpoints-*/*")) == []


def test_only_what_is_whole_and_of_this_machines_present_life_is_taken_over():
    before_a_crash, of_another = (
        left_by_a_dead_process("this", boot="b"),
        left_by_a_dead_process("this", host="another"),
    )
    assert whole_folders(open_scratch("this")) == []
    assert not before_a_crash.exists()
    assert of_another.exists()
    left = left_by_a_dead_process("this")
    for name in ("9", "100", "files-b", "files-a"):
        (left / name).mkdir()
    unfinished(left, "200").mkdir()
    (left / "10" / "state.json").write_text("{}")
    found = whole_folders(open_scratch("this"))
    assert [each.name for each in found] == ["files-a", "files-b", "9", "10", "100"]
    assert (found[3] / "state.json").read_text() == "{}"
    assert not left.exists()


def test_a_process_that_lives_keeps_its_own(tmp_path):
    living = left_by_a_dead_process("this")
    living = living.rename(living.with_name(living.name.replace(NOBODY, str(os.getppid()))))
    assert whole_folders(open_scratch("this")) == []
    assert living.exists()


def test_a_killed_process_is_dead_before_its_parent_has_looked():
    left = left_by_a_dead_process("this")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        left.rename(left.with_name(left.name.replace(NOBODY, str(process.pid))))
        assert [folder.name for folder in whole_folders(open_scratch("this"))] == ["10"]


def test_names_say_what_is_whole(tmp_path):
    """Killed while it fills or removes a folder, a process leaves none that seems whole."""
    filling = unfinished(tmp_path, "10")
    filling.mkdir()
    (filling / "state.json").write_text("{}")
    assert whole_folders(tmp_path) == []
    folder = finish(filling)
    assert whole_folders(tmp_path) == [folder] == [tmp_path / "10"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint_scratch.shutil, "rmtree", lambda path, **_: seen.append((path.name, list(path.iterdir())))
        )
        discard(folder)
    assert [name for name, _ in seen] == [filling.name]
    assert whole_folders(tmp_path) == []
    discard(folder)  # gone already


def test_killed_while_it_removes_a_scratch_a_process_leaves_nothing_that_seems_whole(monkeypatch):
    of_another = left_by_a_dead_process("another")
    (mine,) = of_another.parent.glob("mine@*")
    (mine / "20").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    remove_scratch(mine)
    open_scratch("this")
    for scratch in (mine, of_another):
        assert scratch.exists()
        assert whole_folders(scratch) == []


def test_another_users_folder_is_refused(monkeypatch):
    """What lies there would be trained on."""
    open_scratch("this")
    uid = os.getuid()
    parent = Path(tempfile.gettempdir()) / f"repae-checkpoints-{uid + 1}"
    parent.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(StoreError, match=f"{parent.name}: belongs to another user; set TMPDIR"):
        open_scratch("this")


def test_the_name_of_a_machine_is_in_the_folders(tmp_path):
    assert f"@{platform.node()}@" in open_scratch("this").name
