"""Batches read ahead by worker processes, in an order that does not depend on how many there are."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


class Selection(NamedTuple):
    """Items of one batch, int64 [B], and which of them are read mirrored, bool [B] (None = none)."""

    indices: np.ndarray
    flip_mask: np.ndarray | None = None


class _Batches(Dataset[T], Generic[T]):
    """What torch's DataLoader asks for item by item: here an item is a whole batch."""

    def __init__(self, read: Callable[[np.ndarray, np.ndarray | None], T]) -> None:
        self.read = read

    def __getitem__(self, selection: Selection) -> T:
        return self.read(*selection)


def load_batches(
    read: Callable[[np.ndarray, np.ndarray | None], T],
    selections: Iterable[Selection],
    *,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[T]:
    """`read(indices, flip_mask)` of every batch, in their order.

    read: e.g. `ImageShards.images`; picklable, for it goes to the processes. workers: processes that read ahead,
    `prefetch` batches each; 0 = read here, when asked. An exception of `read` reaches the caller at its batch.
    """
    if workers == 0:
        yield from itertools.starmap(read, selections)
        return
    # A server process forks the workers: forking this one, which has threads (torch, gloo, fsspec), could deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["repae_core.data.image_shards"])
    loader: DataLoader[T] = DataLoader(
        _Batches(read),
        batch_size=None,
        sampler=selections,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context=context,
        worker_init_fn=_one_thread,
    )
    yield from loader


def _one_thread(worker: int) -> None:
    """Readers decode; more threads a reader would only fight for the cores."""
    torch.set_num_threads(1)
