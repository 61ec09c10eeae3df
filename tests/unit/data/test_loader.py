"""The joined sequence of images is the same for any number of reading processes and ranks, and after any stop."""

import pickle
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.data import DataOrder, ImageShards, Selection, load_batches, open_source, preprocess_images
from repae_core.data.loader import _Batches

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


def test_an_error_arrives_at_its_batch_and_is_the_same_from_a_worker(tmp_path):
    made = Artifact(Store(str(tmp_path / "store")), "preprocess", "test")
    folder = tiny.write_images(tmp_path / "images", per_class=2)
    preprocess_images(open_source(str(folder)), made, resolution=32, images_per_shard=1, seed=0)
    images = ImageShards(made)
    made.write_bytes("shards/00003.tar", b"\0" * made.files()["shards/00003.tar"])
    selections = [Selection(np.array([i])) for i in range(6)]
    texts = []
    for workers in (0, 1):
        batches = load_batches(images.images, selections, workers=workers)
        assert [len(next(batches)) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(ValueError, match=r"00003\.tar: image \d+ is damaged") as caught:
            next(batches)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


class OddError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_travel_is_replaced_by_its_text():
    """Torch's queue would lose it, and the reader wait for ever."""

    def read(indices, flip_mask):
        raise OddError("this", "that")

    failure = pickle.loads(pickle.dumps(_Batches(read)[Selection(np.array([0]))]))
    assert str(failure.error) == "this and that"
    assert "OddError" in failure.error.__notes__[0]


SCRIPT = """
import itertools, sys
import numpy as np
from repae_core.artifacts import Artifact, Store
from repae_core.data import ImageShards, Selection, load_batches
images = ImageShards(Artifact(Store(sys.argv[1]), "preprocess", "test"))
for _ in load_batches(images.images, (Selection(np.arange(2)) for _ in itertools.count()), workers=2):
    print("read", flush=True)
    sys.stdin.readline()
"""


def test_no_helper_outlives_a_killed_process(images):
    """Only the process itself is killed, as the OOM killer does it, not its group."""
    command = [sys.executable, "-c", SCRIPT, images.artifact.store.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "read\n"
        helpers = psutil.Process(process.pid).children(recursive=True)
        assert len(helpers) >= 3  # fork server and workers
        process.kill()
    assert remaining(helpers) == []


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def remaining(processes, seconds=20.0):
    """Those that still run after that time; they are ended. A process that nobody waits for stays as a zombie."""
    deadline = time.monotonic() + seconds
    alive = processes
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [process for process in alive if runs(process)]
    for process in alive:
        process.kill()
    return alive
