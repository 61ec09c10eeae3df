"""Batches read ahead by worker processes, in an order that does not depend on how many there are."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from repae_core.data.end_with_parent import end_with_parent

T = TypeVar("T")


class Selection(NamedTuple):
    """Items of one batch, int64 [B], and which of them are read mirrored, bool [B] (None = none)."""

    indices: np.ndarray
    flip_mask: np.ndarray | None = None


class _Failure(NamedTuple):
    """What `read` raised in a worker. Torch would raise it anew with the worker's whole traceback as its text."""

    error: Exception


class _Batches(Dataset[T | _Failure], Generic[T]):
    """What torch's DataLoader asks for item by item: here an item is a whole batch."""

    def __init__(self, read: Callable[[np.ndarray, np.ndarray | None], T]) -> None:
        self.read = read

    def __getitem__(self, selection: Selection) -> T | _Failure:
        try:
            return self.read(*selection)
        except Exception as error:
            return _Failure(_travelling(error))


def _travelling(error: Exception) -> Exception:
    """The error in a form that reaches the parent, where the note of its place in the worker is shown with it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(str(error)).with_traceback(error.__traceback__)
    error.add_note("In a loader worker:\n" + "".join(traceback.format_exception(error)))
    return error


def load_batches(
    read: Callable[[np.ndarray, np.ndarray | None], T],
    selections: Iterable[Selection],
    *,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[T]:
    """`read(indices, flip_mask)` of every batch, in their order.

    read: e.g. `ImageShards.images`; picklable, for it goes to the processes. workers: processes that read ahead,
    `prefetch` batches each; 0 = read here, when asked. An exception of `read` reaches the caller at its batch, the same
    for any number of workers.
    """
    if workers == 0:
        yield from itertools.starmap(read, selections)
        return
    # A server process forks the workers: forking this one, which has threads (torch, gloo, fsspec), could deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["repae_core.data.image_shards"])
    loader: DataLoader[T | _Failure] = DataLoader(
        _Batches(read),
        batch_size=None,
        sampler=selections,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context=context,
        worker_init_fn=_begin_worker,
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise batch.error
        yield batch


def _begin_worker(worker: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)  # readers decode; more threads a reader would only fight for the cores
