"""Preprocess and cache-latents on two real Ray workers: the same bytes as in one process, also after a kill."""

import threading

import pytest
import tiny
from ray_workers import kill_a_worker

from repae_core.artifacts import Artifact, RunRecord, Store
from tasks.cache_latents import cache_latents
from tasks.extract_vae import extract_vae
from tasks.pipeline_run import open_run
from tasks.preprocess import preprocess
from tasks.train_repae import train_repae

STAGES = ("preprocess", "cache-latents")


def run_stages(config) -> RunRecord:
    with open_run(config, kind="full-pipeline") as run:
        for stage in (preprocess, train_repae, extract_vae, cache_latents):
            stage.fn(run)
    return run.record


def made(record, stage) -> dict[str, str]:
    artifact = Artifact(Store(record.config["store"]), stage, record.stages[stage].fingerprint)
    return tiny.contents(artifact)


def test_two_workers_write_the_same_bytes(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray's workers have another working folder, where `images` does not exist
    images = tiny.write_images(tmp_path / "images")
    small = ("preprocess.images_per_shard=4", "cache_latents.flip=true", "cache_latents.batch_size=1")
    workers = ("preprocess.workers=2", "cache_latents.workers=2", "cache_latents.cpus_per_worker=1",
               "cache_latents.loader_workers=1")  # fmt: skip
    one = run_stages(tiny.config(images, tmp_path / "one", *small))
    killed: list[str] = []
    store = Store(str(tmp_path / "two"))
    thread = threading.Thread(target=kill_a_worker, args=(killed, ".safetensors", store, "cache-latents"))
    thread.start()
    two = run_stages(tiny.config("images", store.url, *small, *workers))
    thread.join()
    assert killed, "no worker was killed: the test proves less"
    for stage in STAGES:
        assert two.stages[stage].fingerprint == one.stages[stage].fingerprint
        assert made(two, stage) == made(one, stage)
        artifact = Artifact(store, stage, two.stages[stage].fingerprint)
        assert artifact.manifest().workers == 2
        assert artifact.verify() == []


def test_bad_input_on_a_worker_is_the_users_to_mend(tmp_path, home):
    """Said at once, as in one process (exit code 2), not tried again."""
    images = tiny.write_images(tmp_path / "images", per_class=3)
    (images / "two" / "bad.png").write_bytes(b"")
    settings = ("preprocess.workers=1", "preprocess.max_skipped_fraction=0")
    config = tiny.config(images, tmp_path / "store", *settings)
    with (
        pytest.raises(ValueError, match=r"two/bad.png: the file is empty \(1 unreadable"),
        open_run(config, kind="preprocess") as run,
    ):
        preprocess.fn(run)
