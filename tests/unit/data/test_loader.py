"""The joined sequence of images is the same for any number of reading processes and ranks, and after any stop."""

import numpy as np
import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.data import DataOrder, ImageShards, Selection, load_batches, open_source, preprocess_images

BATCH, TOTAL = 6, 60


def sequence(images, *, start=0, stop=TOTAL, workers=0, rank=0, world=1):
    """(indices, pixels) of one rank between two positions."""
    order = DataOrder(len(images), 3, images.shard_starts, window=1)
    selections = [
        Selection(indices, indices % 2 == 0)
        for indices in order.batches(start=start, stop=stop, batch_size=BATCH, rank=rank, world=world)
    ]
    pixels = torch.cat(list(load_batches(images.images, selections, workers=workers)))
    return torch.from_numpy(np.concatenate([s.indices for s in selections])), pixels


def joined(images, world, **settings):
    """All ranks' parts in the order of the global batches."""
    parts = [sequence(images, rank=rank, world=world, **settings) for rank in range(world)]
    size = BATCH // world
    return [torch.cat([piece for group in zip(*(p[i].split(size) for p in parts), strict=True) for piece in group])
            for i in range(2)]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_stopped_and_started_again(images, workers, world):
    expected = sequence(images)
    cut = 24
    first = joined(images, world, stop=cut, workers=workers)
    rest = joined(images, world, start=cut, workers=workers)
    for whole, before, after in zip(expected, first, rest, strict=True):
        assert torch.equal(whole, torch.cat([before, after]))
    epoch = expected[0][: len(images)]
    assert sorted(epoch.tolist()) == list(range(len(images)))


def test_what_is_read_is_the_image(images):
    indices, pixels = sequence(images, stop=12)
    for i, image in zip(indices.tolist(), pixels, strict=True):
        stored = images.images(np.array([i]))[0]
        assert torch.equal(image, stored.flip(-1) if i % 2 == 0 else stored)
    assert not torch.equal(pixels, pixels.flip(-1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_arrives_at_its_batch(tmp_path, workers):
    made = Artifact(Store(str(tmp_path / "store")), "preprocess", "test")
    folder = tiny.write_images(tmp_path / "images", per_class=2)
    preprocess_images(open_source(str(folder)), made, resolution=32, images_per_shard=1, seed=0)
    images = ImageShards(made)
    made.write_bytes("shards/00003.tar", b"\0" * made.files()["shards/00003.tar"])
    selections = [Selection(np.array([i])) for i in range(6)]
    batches = load_batches(images.images, selections, workers=workers)
    assert [len(next(batches)) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"00003\.tar: image \d+ is damaged"):
        next(batches)
