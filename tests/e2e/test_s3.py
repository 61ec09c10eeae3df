"""The whole pipeline in a real S3 server: the same fingerprints and bytes as on the local disk."""

import json
import os
import subprocess
import sys
import time
import uuid

import pytest
import s3fs
import tiny
from s3_server import BUCKET, s3_server

from repae_core.artifacts import Artifact, Store, StoreError
from repae_core.config import STAGES


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "data") as variables:
        yield variables


@pytest.fixture
def bucket(server, monkeypatch) -> str:
    """URL of an empty store there."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def test_store(bucket):
    store = Store(bucket, retry_seconds=10)
    store.check()
    assert store.create("a/lease.json", b"one")
    assert not store.create("a/lease.json", b"two")
    assert store.last_change("a", besides="lease.json") is None
    assert abs(store.last_change("a").timestamp() - time.time()) < 60  # aware, or it would be off by hours
    assert store.read_bytes("a/lease.json") == b"one"
    with store.writer("a/b/big.bin") as stream:
        for _ in range(3):
            stream.write(bytes(6_000_000))  # more than one part
    assert store.files("a") == {"b/big.bin": 18_000_000, "lease.json": 3}
    assert store.folders("a") == ["b"]
    assert store.read_ranges(["a/lease.json", "a/b/big.bin"], [1, 5], [2, 3]) == [b"ne", bytes(3)]
    with pytest.raises(TypeError), store.writer("a/half") as stream:
        stream.writelines([bytes(6_000_000), "not bytes"])
    assert not store.exists("a/half")
    store.delete("a", recursive=True)
    assert store.files() == {}


def test_wrong_credentials_are_one_line(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    s3fs.S3FileSystem.clear_instance_cache()  # it would go on with the session of the right one
    with pytest.raises(StoreError, match=f"store {bucket}/x: The request signature") as raised:
        Store(bucket + "/x").check()
    assert "another" not in str(raised.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_pipeline_equals_the_local_one(bucket, tmp_path, home):
    images = tiny.write_images(tmp_path / "images")
    settings = ("cache_latents.encoder=digits-vit", "cache_latents.flip=true", "train_ldm.flip=true")
    local = tiny.run_pipeline(tiny.config(images, tmp_path / "local", *settings))
    remote = tiny.run_pipeline(tiny.config(images, bucket, *settings))
    for stage in STAGES:
        assert remote.stages[stage].fingerprint == local.stages[stage].fingerprint
        here, there = (
            Artifact(Store(record.config["store"]), stage, record.stages[stage].fingerprint)
            for record in (local, remote)
        )
        assert tiny.contents(there) == tiny.contents(here), stage
        assert there.verify() == []
        assert not there.exists("lease.json")
    again = tiny.run_pipeline(tiny.config(images, bucket, *settings))
    assert {stage.status for stage in again.stages.values()} == {"skipped"}


@pytest.mark.slow
def test_command_with_ray_workers_and_a_shard_cache(bucket, server, tmp_path, home, short_tmp):
    """As a user runs it: everything from the environment, two workers, images and latents read through the cache."""
    images = tiny.write_images(tmp_path / "images")
    fast = [value for value in tiny.overrides(images) if ".workers=" not in value and ".threads=" not in value]
    workers = [f"{stage}.workers=2" for stage in ("preprocess", "train_repae", "cache_latents", "train_ldm")]
    cached = [f"{stage}.shard_cache_gib=1" for stage in ("train_repae", "cache_latents", "train_ldm")]
    values = tiny.arguments([*fast, *workers, *cached, "train_repae.memory_cache_gib=0", "train_ldm.loader_workers=1"])
    command = [sys.executable, "-m", "flows.cli", "run", *values]
    places = {"REPAE_STORE": bucket, "REPAE_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    variables = os.environ | server | places | {"TMPDIR": str(short_tmp)}
    subprocess.run(command, env=variables, check=True, timeout=600, cwd=tmp_path)
    store = Store(bucket)
    for stage in STAGES:
        assert [Artifact(store, stage, name).verify() for name in store.folders(stage)] == [[]]
    assert any((home / "shards").iterdir())
    logs = [name for name in store.files() if "/logs/" in name]
    (of_training,) = (name for name in logs if name.startswith("train-repae/") and name.endswith("/rank0.log"))
    line = json.loads(store.read_bytes(of_training).splitlines()[0])
    assert {"time", "level", "run", "stage", "rank", "message"} <= set(line)
    # No credential in the store, in MLflow's and Prefect's databases, or in any log, Ray's too.
    secret = server["AWS_SECRET_ACCESS_KEY"].encode()
    assert [name for name in store.files() if secret in store.read_bytes(name)] == []
    ours = [path for path in home.rglob("*") if path.is_file()]
    of_ray = list(short_tmp.glob("repae-ray-*/session_2*/logs/worker-*"))
    assert {"mlflow.db", "prefect.db"} <= {path.name for path in ours}
    assert of_ray
    assert [path for path in ours + of_ray if secret in path.read_bytes()] == []
    subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", *values], env=variables, check=True, timeout=200, cwd=tmp_path
    )
