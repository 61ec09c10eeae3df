import itertools

import numpy as np
import pytest

from repae_core.data.sampler import DataOrder, batch_indices, rank_slice, work_share


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
    with pytest.raises(ValueError, match="negative"):
        DataOrder(4, 0, (0, 2), window=-1)


STARTS = (0, 5, 9, 9, 14)  # shards of 5, 4, 0, 5 and 3 items


def windowed(seed=0, window=2):
    return DataOrder(17, seed, STARTS, window)


def test_a_window_loses_and_repeats_nothing():
    whole = windowed().batch(0, 3 * 17)
    for epoch in range(3):
        assert sorted(whole[epoch * 17 : (epoch + 1) * 17]) == list(range(17))
    assert not np.array_equal(whole[:17], whole[17:34])
    for start in (1, 16, 20):
        assert np.array_equal(windowed().batch(start, 7), whole[start : start + 7])


def test_a_window_touches_so_many_shards_at_a_time():
    shard = np.searchsorted(STARTS, windowed(window=1).batch(0, 17), side="right")
    assert len([1 for a, b in itertools.pairwise(shard) if a != b]) == 3  # each of the four filled shards at once
    pairs = np.searchsorted(STARTS, windowed().batch(0, 17), side="right")
    assert len([1 for a, b in itertools.pairwise(pairs) if a != b]) > 3


def test_a_window_of_all_shards_is_the_whole_data_set():
    assert np.array_equal(windowed(window=5).batch(0, 17), windowed(window=0).batch(0, 17))


def test_batches_of_ranks_join_to_the_global_ones():
    order = windowed()
    parts = [list(order.batches(start=6, stop=42, batch_size=6, rank=rank, world=3)) for rank in range(3)]
    joined = [np.concatenate(batch) for batch in zip(*parts, strict=True)]
    assert np.array_equal(np.concatenate(joined), order.batch(6, 36))


def test_work_is_dealt_out_once_whenever_a_worker_looks():
    assert work_share([3, 4, 7], 1, 3) == [4, 7]
    shares = [work_share(range(11), rank, 3) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
