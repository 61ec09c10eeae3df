"""Which images come when: the data order as a function of (seed, images seen)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DataOrder:
    """The endless sequence of items that training reads, shuffled anew each epoch.

    num_items: N. Position p is item `permutation_e[p % N]` of epoch e = p // N, so no item is lost or repeated in an
    epoch, a batch may hold the end of one epoch and the start of the next, and a run can start anywhere.
    shard_starts, window: with window w > 0 the shards are put in random order and each w consecutive ones are
    shuffled together, so that about w shards are read at a time; 0 = one permutation of all items. Items within a
    shard are a random part of the data set already (`plan_shards`), so a window costs little randomness.

    Raises:
        ValueError: no items, or a negative seed or window.
    """

    num_items: int
    seed: int
    shard_starts: tuple[int, ...] = ()
    window: int = 0

    def __post_init__(self) -> None:
        if self.num_items < 1:
            raise ValueError("num_items must be at least 1: the data set is empty")
        if self.seed < 0 or self.window < 0:
            raise ValueError(f"seed and window must not be negative, got {self.seed} and {self.window}")

    def batch(self, images_seen: int, batch_size: int) -> np.ndarray:
        """Items of the global batch that starts after `images_seen` images; int64 [batch_size].

        Raises:
            ValueError: a negative position, or an empty batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if images_seen < 0:
            raise ValueError(f"images_seen must not be negative, got {images_seen}")
        parts, position, end = [], images_seen, images_seen + batch_size
        while position < end:
            epoch, first = divmod(position, self.num_items)
            count = min(end - position, self.num_items - first)
            parts.append(_permutation(self, epoch)[first : first + count])
            position += count
        return np.concatenate(parts)

    def batches(self, *, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        """One rank's part of every global batch from `start` images seen to `stop`."""
        for seen in range(start, stop, batch_size):
            yield rank_slice(self.batch(seen, batch_size), rank, world)


def batch_indices(num_items: int, *, seed: int, images_seen: int, batch_size: int) -> np.ndarray:
    """`DataOrder(num_items, seed).batch(images_seen, batch_size)`: int64 [batch_size] of one permutation an epoch."""
    return DataOrder(num_items, seed).batch(images_seen, batch_size)


@functools.lru_cache(maxsize=4)
def _permutation(order: DataOrder, epoch: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([order.seed, epoch]))
    if order.window and len(order.shard_starts) > order.window:
        permutation = np.concatenate(list(_windows(order, rng)))
    else:
        permutation = rng.permutation(order.num_items)
    permutation.flags.writeable = False
    return permutation


def _windows(order: DataOrder, rng: np.random.Generator) -> Iterator[np.ndarray]:
    bounds = np.append(order.shard_starts, order.num_items)
    shards = rng.permutation(len(order.shard_starts))
    for first in range(0, len(shards), order.window):
        together = [np.arange(bounds[k], bounds[k + 1]) for k in shards[first : first + order.window]]
        yield rng.permutation(np.concatenate(together))


def rank_slice(indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """This rank's contiguous part of a global batch: [batch_size / world].

    Raises:
        ValueError: the number of ranks does not divide the batch.
    """
    assert 0 <= rank < world
    if len(indices) % world:
        raise ValueError(
            f"the global batch of {len(indices)} cannot be split evenly over {world} workers; "
            "choose a batch_size that is a multiple of workers"
        )
    size = len(indices) // world
    return indices[rank * size : (rank + 1) * size]


def work_share(missing: Sequence[int], rank: int, world: int) -> list[int]:
    """The shards still to be made that fall to one worker.

    By their number, not their place in the list: workers list what is missing at different moments.
    """
    assert 0 <= rank < world
    return [k for k in missing if k % world == rank]
