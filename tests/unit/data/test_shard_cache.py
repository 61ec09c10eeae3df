import threading

import numpy as np
import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.data import ImageShards, LatentShards, ShardCache, open_source, preprocess_images
from repae_core.data.latent_writer import LatentWriter


@pytest.fixture
def remote(tmp_path):
    """A store that is not local, with a data set in it; counts whole-file downloads."""
    store = Store("memory://shard-cache")
    made = Artifact(store, "preprocess", "test")
    folder = tiny.write_images(tmp_path / "images")
    preprocess_images(open_source(str(folder)), made, resolution=32, images_per_shard=6, seed=0)
    yield made
    store.delete("preprocess", recursive=True)
    store.delete("cache-latents", recursive=True)


def counted(monkeypatch):
    fetched = []
    real = Store.download
    monkeypatch.setattr(Store, "download", lambda self, key, target: (fetched.append(key), real(self, key, target))[1])
    return fetched


def test_each_shard_is_fetched_once(remote, tmp_path, monkeypatch):
    fetched = counted(monkeypatch)
    cache = ShardCache(tmp_path / "cache", 10**9)
    plain, cached = ImageShards(remote), ImageShards(remote, shard_cache=cache)
    order = np.random.default_rng(0).permutation(len(plain))
    assert torch.equal(cached.images(order), plain.images(order))
    assert torch.equal(cached.images(order), plain.images(order))
    assert sorted(fetched) == sorted(remote.key(f"shards/{k:05d}.tar") for k in range(6))
    again = ImageShards(remote, shard_cache=ShardCache(tmp_path / "cache", 10**9))
    assert torch.equal(again.images(order), plain.images(order))
    assert len(fetched) == 6


def test_the_least_recently_used_go(remote, tmp_path, monkeypatch):
    fetched = counted(monkeypatch)
    size = remote.files()["shards/00000.tar"]
    cache = ShardCache(tmp_path / "cache", int(2.5 * size))
    images = ImageShards(remote, shard_cache=cache)
    for k in (0, 1, 0, 2, 0):
        images.images(images.shard_indices(k))
    assert [key[-9:-4] for key in fetched] == ["00000", "00001", "00002"]
    images.images(images.shard_indices(1))
    assert len(fetched) == 4
    kept = [path for path in (tmp_path / "cache").iterdir() if not path.suffix]
    assert sum(path.stat().st_size for path in kept) <= cache.limit_bytes
    locks = {path.stem for path in (tmp_path / "cache").glob("*.lock")}
    assert locks == {path.name for path in kept}, "a lock goes with its copy"


def test_several_readers_of_one_small_cache(remote, tmp_path):
    plain = ImageShards(remote)
    order = np.random.default_rng(0).permutation(len(plain))
    expected, wrong = plain.images(order), []

    def work():
        images = ImageShards(remote, shard_cache=ShardCache(tmp_path / "cache", 1))
        if not torch.equal(images.images(order), expected):
            wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_latents_too(remote, tmp_path, monkeypatch):
    images = ImageShards(remote)
    writer = LatentWriter(Artifact(remote.store, "cache-latents", "test"), images)
    for k in writer.missing():
        count = len(images.shard_indices(k))
        writer.write(k, mean=torch.full((count, 2, 2, 2), float(k)), std=torch.ones(count, 2, 2, 2))
    writer.finish()
    fetched = counted(monkeypatch)
    latents = LatentShards(writer.artifact, shard_cache=ShardCache(tmp_path / "cache", 10**9))
    order = np.arange(len(images))[::-1].copy()
    assert torch.equal(latents.latents(order)[0], LatentShards(writer.artifact).latents(order)[0])
    assert len(fetched) == 6


def test_a_damaged_download_is_refused_and_not_kept(remote, tmp_path, monkeypatch):
    def cut(self, key, target):
        content = self.read_bytes(key)
        with open(target, "wb") as file:
            file.write(content[:-1] + b"x")

    images = ImageShards(remote, shard_cache=ShardCache(tmp_path / "cache", 10**9))
    with monkeypatch.context() as patched:
        patched.setattr(Store, "download", cut)
        with pytest.raises(ValueError, match=r"shards/00000.tar: \d+ bytes with sha256 .* damaged"):
            images.images(np.arange(2))
    assert torch.equal(images.images(np.arange(2)), ImageShards(remote).images(np.arange(2)))


def test_a_copy_cut_short_is_fetched_again(remote, tmp_path, monkeypatch):
    fetched = counted(monkeypatch)
    cache = ShardCache(tmp_path / "cache", 10**9)
    images = ImageShards(remote, shard_cache=cache)
    expected = images.images(np.arange(2))
    (copy,) = (path for path in cache.folder.iterdir() if not path.suffix)
    copy.write_bytes(copy.read_bytes()[:100])
    assert torch.equal(images.images(np.arange(2)), expected)
    assert len(fetched) == 2


def test_a_shard_made_again_is_not_taken_from_the_cache(remote, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**9)
    ImageShards(remote, shard_cache=cache).images(np.arange(2))
    again = Artifact(remote.store, "preprocess", "again")
    preprocess_images(open_source(str(tmp_path / "images")), again, resolution=16, images_per_shard=6, seed=0)
    for name in again.files():
        remote.write_bytes(name, again.read_bytes(name))
    made_again = ImageShards(remote, shard_cache=cache).images(np.arange(2))
    assert torch.equal(made_again, ImageShards(remote).images(np.arange(2)))
