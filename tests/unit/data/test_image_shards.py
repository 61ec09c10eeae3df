import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from repae_core.artifacts import Artifact, Store
from repae_core.data.image_shards import ImageShards
from repae_core.data.preprocess import preprocess_images
from repae_core.data.sources import open_source


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(11):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    made = Artifact(Store(str(tmp_path_factory.mktemp("store"))), "preprocess", "test")
    preprocess_images(open_source(str(folder)), made, resolution=8, images_per_shard=4, seed=0)
    return made


def test_batches_in_any_order_and_with_repeats(artifact):
    images = ImageShards(artifact)
    everything = images.images(np.arange(len(images)))
    assert everything.shape == (11, 3, 8, 8)
    assert everything.dtype == torch.uint8
    order = np.array([10, 0, 3, 3, 7])
    assert torch.equal(images.images(order), everything[order])


def test_without_memory_the_same(artifact):
    cached, uncached = ImageShards(artifact, memory_bytes=2**20), ImageShards(artifact)
    order = np.array([4, 1, 4, 9])
    assert torch.equal(cached.images(order), uncached.images(order))


def test_memory_spares_the_second_read(artifact):
    images = ImageShards(artifact, memory_bytes=2**20)
    first = images.images(np.arange(5))
    reads = []
    images._decoded = lambda indices: reads.extend(indices.tolist()) or torch.zeros(len(indices), 3, 8, 8).byte()
    assert torch.equal(images.images(np.arange(5)), first)
    images.images(np.array([3, 5]))
    assert reads == [5]


def test_a_batch_is_the_callers_own(artifact):
    images = ImageShards(artifact)
    images.images(np.arange(3)).zero_()
    assert images.images(np.arange(3)).any()


def test_shards_partition_the_images(artifact):
    images = ImageShards(artifact)
    parts = [images.shard_indices(k) for k in range(images.num_shards)]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert np.array_equal(np.concatenate(parts), np.arange(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(artifact, workers):
    images = ImageShards(artifact)
    batches = list(
        DataLoader(images, batch_size=4, num_workers=workers, multiprocessing_context="forkserver" if workers else None)
    )
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.images(np.arange(11)))
    assert np.array_equal(torch.cat([labels for _, labels in batches]), images.labels)


def test_negative_numbers_count_from_the_end(artifact):
    images = ImageShards(artifact)
    for i in range(-11, 0):
        pixels, label = images[i]
        assert torch.equal(pixels, images[i + 11][0])
        assert label == images[i + 11][1]
    for beyond in (11, -12):
        with pytest.raises(IndexError):
            images[beyond]


def test_pickles_without_its_memory(artifact):
    images = ImageShards(artifact, memory_bytes=2**20)
    images.images(np.arange(11))
    again = pickle.loads(pickle.dumps(images))
    assert again._memory is None
    assert torch.equal(again.images(np.arange(11)), images.images(np.arange(11)))


def test_errors(artifact, tmp_path):
    with pytest.raises(ValueError, match="repae stage preprocess"):
        ImageShards(Artifact(Store(str(tmp_path)), "preprocess", "none"))
    copy = Artifact(Store(str(tmp_path)), "preprocess", "copy")
    for name in artifact.files():
        copy.write_bytes(name, artifact.read_bytes(name))
    tar = bytearray(copy.read_bytes("shards/00001.tar"))
    copy.write_bytes("shards/00001.tar", bytes(len(tar)))
    images = ImageShards(copy)
    with pytest.raises(ValueError, match=r"shards/00001.tar: image 0000\d+ is damaged: [^<]*$"):
        images.images(np.array([5]))
