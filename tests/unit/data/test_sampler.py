import threading
import time

import numpy as np
import pytest

from repae_core.data.sampler import BatchLoader, batch_indices, rank_slice


def sequence(num_items, seed, start, count):
    return batch_indices(num_items, seed=seed, images_seen=start, batch_size=count)


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (100, 1)])
def test_nothing_is_lost_or_repeated_in_an_epoch(num_items, batch_size):
    batches = [sequence(num_items, 3, seen, batch_size) for seen in range(0, num_items * batch_size, batch_size)]
    joined = np.concatenate(batches)
    for epoch in range(len(joined) // num_items):
        assert sorted(joined[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_any_start_gives_the_same_sequence():
    whole = sequence(13, 0, 0, 60)
    for start in range(40):
        assert np.array_equal(sequence(13, 0, start, 20), whole[start : start + 20])


def test_order_depends_on_seed_and_epoch():
    first, second = sequence(50, 0, 0, 50), sequence(50, 0, 50, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, sequence(50, 1, 0, 50))


def test_the_order_is_frozen():
    # Stored runs rely on it: a change here changes what a resumed run reads.
    assert sequence(10, 7, 3, 9).tolist() == [1, 3, 6, 2, 4, 5, 9, 9, 0]


def test_ranks_partition_the_batch():
    batch = sequence(100, 0, 0, 12)
    assert np.array_equal(np.concatenate([rank_slice(batch, rank, 3) for rank in range(3)]), batch)


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match="multiple of workers"):
        rank_slice(np.arange(10), 0, 3)
    with pytest.raises(ValueError, match="data set is empty"):
        sequence(0, 0, 0, 4)
    with pytest.raises(ValueError, match="batch_size"):
        sequence(4, 0, 0, 0)
    with pytest.raises(ValueError, match="negative"):
        sequence(4, 0, -1, 1)
    with pytest.raises(ValueError, match="not a whole number of batches"):
        BatchLoader(lambda i: i, num_items=4, seed=0, batch_size=3, max_images=4)
    with pytest.raises(ValueError, match="multiple of workers"):
        BatchLoader(lambda i: i, num_items=4, seed=0, batch_size=3, world=2)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_loader_resumes_anywhere(world, stop):
    def read(rank, start, count):
        with BatchLoader(
            lambda i: i, num_items=10, seed=1, batch_size=4, images_seen=start, rank=rank, world=world
        ) as loader:
            batches = [next(loader) for _ in range(count)]
            return batches, loader.images_seen

    for rank in range(world):
        whole, _ = read(rank, 0, 9)
        first, seen = read(rank, 0, stop)
        rest, _ = read(rank, seen, 9 - stop)
        assert seen == 4 * stop
        assert np.array_equal(np.concatenate(first + rest), np.concatenate(whole))
    parts = [read(rank, 0, 9)[0] for rank in range(world)]
    joined = np.concatenate([np.concatenate(batch) for batch in zip(*parts, strict=True)])
    assert np.array_equal(joined, sequence(10, 1, 0, 36))


def test_loader_stops_at_max_images():
    loader = BatchLoader(lambda i: i, num_items=5, seed=0, batch_size=4, images_seen=8, max_images=20)
    assert len(list(loader)) == 3
    assert loader.images_seen == 20
    assert list(loader) == []


def test_loader_works_ahead_by_its_depth_only():
    fetched = threading.Semaphore(0)
    calls = []

    def fetch(indices):
        calls.append(indices)
        fetched.release()
        return len(calls)

    with BatchLoader(fetch, num_items=9, seed=0, batch_size=3, depth=2) as loader:
        assert next(loader) == 1
        for _ in range(4):  # the one handed out, two waiting, one that waits for a place
            assert fetched.acquire(timeout=5)
        time.sleep(0.05)
        assert len(calls) == 4
        assert loader.images_seen == 3


def test_loader_hands_on_the_error_at_its_batch():
    def fetch(indices):
        if fetch.calls == 2:
            raise OSError("shard 3 is gone")
        fetch.calls += 1
        return fetch.calls

    fetch.calls = 0
    loader = BatchLoader(fetch, num_items=9, seed=0, batch_size=3)
    assert [next(loader), next(loader)] == [1, 2]
    with pytest.raises(OSError, match="shard 3 is gone"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    loader = BatchLoader(lambda i: i, num_items=9, seed=0, batch_size=3)
    next(loader)
    assert set(threading.enumerate()) - before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
