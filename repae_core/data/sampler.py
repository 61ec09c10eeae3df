"""Which images come when: the data order as a function of (seed, images seen)."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


def batch_indices(num_items: int, *, seed: int, images_seen: int, batch_size: int) -> np.ndarray:
    """Items of the global batch that starts after `images_seen` images; int64 [batch_size].

    Position p of the endless sequence is item `permutation_e[p % N]` with e = p // N, where `permutation_e` is
    drawn by PCG64([seed, e]). So no item is lost or repeated in an epoch, a batch may hold the end of one epoch
    and the start of the next, and a run can start anywhere.

    Raises:
        ValueError: no items, a negative position or seed, or an empty batch.
    """
    if num_items < 1:
        raise ValueError("num_items must be at least 1: the data set is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if images_seen < 0 or seed < 0:
        raise ValueError(f"images_seen and seed must not be negative, got {images_seen} and {seed}")
    parts, position, end = [], images_seen, images_seen + batch_size
    while position < end:
        epoch, first = divmod(position, num_items)
        count = min(end - position, num_items - first)
        parts.append(_permutation(num_items, seed, epoch)[first : first + count])
        position += count
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_items)
    permutation.flags.writeable = False
    return permutation


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


class BatchLoader(Generic[T]):
    """Batches of one rank from `images_seen` on, fetched ahead by one thread.

    fetch: what a batch is, given the rank's indices int64 [batch_size / world]; runs in the thread, in order, so
    its results do not depend on the depth. Its exceptions reach the consumer at the batch they belong to.
    max_images: stop there (a multiple of the batch away from `images_seen`); none = endless.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray], T],
        *,
        num_items: int,
        seed: int,
        batch_size: int,
        images_seen: int = 0,
        max_images: int | None = None,
        rank: int = 0,
        world: int = 1,
        depth: int = 2,
    ) -> None:
        rank_slice(np.empty(batch_size), rank, world)
        batch_indices(num_items, seed=seed, images_seen=images_seen, batch_size=batch_size)
        if max_images is not None and (max_images - images_seen) % batch_size:
            raise ValueError(
                f"max_images={max_images} is not a whole number of batches of {batch_size} after {images_seen}"
            )
        self.images_seen = images_seen  # of the batches handed out, not of those fetched ahead
        self.batch_size = batch_size
        self._max_images = max_images
        self._fetch = fetch
        self._order = functools.partial(batch_indices, num_items, seed=seed, batch_size=batch_size)
        self._rank, self._world = rank, world
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set() or (self._max_images is not None and self.images_seen >= self._max_images):
            self.close()
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="batch-loader", daemon=True)
            self._thread.start()
        batch, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        self.images_seen += self.batch_size
        return batch  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; batches fetched ahead are dropped. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                self._drain()
                self._thread.join(timeout=0.01)
            self._thread = None
        self._drain()

    def __enter__(self) -> BatchLoader[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        seen = self.images_seen
        while not self._stop.is_set() and (self._max_images is None or seen < self._max_images):
            try:
                indices = self._order(images_seen=seen)
                self._ready.put((self._fetch(rank_slice(indices, self._rank, self._world)), None))
            except BaseException as error:
                self._ready.put((None, error))
                return
            seen += self.batch_size

    def _drain(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return
