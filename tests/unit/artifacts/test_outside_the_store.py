"""No name that comes from a config, a manifest or an index leads out of the store."""

import pytest

from repae_core.artifacts import Artifact, Store, load_run, resolve_reference
from repae_core.artifacts.checkpoints import resolve_checkpoint
from repae_core.data import ImageShards, LatentShards

OUTSIDE = ["../secret.txt", "a/../../secret.txt", "/etc/passwd", "a//b", "..", ".", "", "a\\..\\..\\secret.txt"]


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "secret.txt").write_text("nobody's business")
    (tmp_path / "secret.json").write_text('{"shards": []}')
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("key", OUTSIDE)
def test_every_operation_refuses_the_key(store, tmp_path, key):
    source = tmp_path / "upload"
    source.write_bytes(b"x")
    operations = [
        lambda: store.read_bytes(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.read_json(key),
        lambda: store.download(key, str(tmp_path / "got")),
        lambda: store.write_bytes(key, b"x"),
        lambda: store.write_json(key, {}),
        lambda: store.upload(key, source),
        lambda: store.create(key, b"x"),
        lambda: store.exists(key),
        lambda: store.delete(key),
        lambda: store.delete(key, recursive=True),
        lambda: store.writer(key).__enter__(),
        lambda: store.reader(key).__enter__(),
        lambda: store.folders(key),
        lambda: store.clear_leftovers(key),
    ]
    for operation in operations:
        with pytest.raises(ValueError, match="is not a path inside the store"):
            operation()
    assert (tmp_path / "secret.txt").read_text() == "nobody's business"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.json", "secret.txt", "upload"]


@pytest.mark.parametrize("name", ["../../secret", "..", "/etc"])
def test_references_of_a_config(store, name):
    folder = Artifact(store, "train-repae", "f" * 16)
    folder.write_json("checkpoints/8/state.json", {})
    folder.write_json("checkpoints/8/commit.json", {"files": []})
    store.write_json("runs/one/run.json", {})
    with pytest.raises(ValueError, match="no checkpoint"):
        resolve_checkpoint(folder, name)
    with pytest.raises(ValueError, match="is no run"):
        load_run(store, name)
    with pytest.raises(ValueError, match="train-repae artifact"):
        resolve_reference(store, "train-repae", name)


def manifest(folder: Artifact, file: str) -> dict:
    entry = {"name": file, "bytes": 17, "sha256": "0" * 64}
    times = {"started_at": "2026-01-01T00:00:00+00:00", "finished_at": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
    return {"stage": folder.stage, "fingerprint": folder.fingerprint, "version": 1, "config": {}, "inputs": {},
            "files": [entry]} | times  # fmt: skip


def test_a_manifest_that_names_a_file_outside(store):
    folder = Artifact(store, "preprocess", "f" * 16)
    folder.write_json("manifest.json", manifest(folder, "../../../secret.txt"))
    assert not folder.is_whole()
    (problem,) = folder.verify()
    assert "secret.txt" in problem


@pytest.mark.parametrize(("stage", "reader"), [("preprocess", ImageShards), ("cache-latents", LatentShards)])
def test_an_index_that_names_a_file_outside(store, stage, reader):
    folder = Artifact(store, stage, "f" * 16)
    shard = {"tar": {"name": "../../../secret.txt", "bytes": 17, "sha256": "0" * 64},
             "sidecar": "../../../secret.json", "latents": "../../../secret.txt"}  # fmt: skip
    index = {"resolution": 8, "class_names": ["a"], "num_classes": 1, "shards": [shard], "latent_shape": [4, 1, 1],
             "flip": False, "encoders": [], "encoder_grid": None}  # fmt: skip
    folder.write_json("index.json", index)
    folder.write_json("latent_stats.json", {"scale": [1.0] * 4, "bias": [0.0] * 4})
    with pytest.raises(ValueError, match="is not a path inside the store"):
        reader(folder)
