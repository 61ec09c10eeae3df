"""From a source to a finished set of image shards, in this process or in several."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from repae_core.artifacts import Artifact, Store
from repae_core.data.end_with_parent import end_with_parent
from repae_core.data.sampler import work_share
from repae_core.data.shards import (
    SUFFIXES,
    Sample,
    ShardSettings,
    check_failures,
    default_images_per_shard,
    finish,
    finished_shards,
    plan_shards,
    shard_name,
    shard_samples,
    skipped_in,
    write_shard,
)
from repae_core.data.sources import ImageReader, ImageSource

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def preprocess_images(
    source: ImageSource, artifact: Artifact, *, processes: int = 1, progress: Progress | None = None, **settings: Any
) -> dict[str, Any]:
    """Crop, encode and pack all images of a source, here; returns the summary for the manifest.

    settings: as of `plan_preprocessing`; progress: (images done, of all).

    Raises:
        ValueError: bad settings; more unreadable files than allowed (names the first); no image at all.
    """
    work = plan_preprocessing(source, artifact, **settings)
    write_missing_shards(work, processes=processes, progress=progress)
    return finish_preprocessing(work)


@dataclass(frozen=True)
class PreprocessWork:
    """All shards of one data set: `plan[k]` are the source positions of shard k, whoever writes it."""

    source: ImageSource
    plan: list[np.ndarray]
    artifact: Artifact
    settings: ShardSettings
    images_per_shard: int


def plan_preprocessing(
    source: ImageSource,
    artifact: Artifact,
    *,
    resolution: int,
    seed: int,
    images_per_shard: int | None = None,
    encoding: str = "png",
    jpeg_quality: int = 95,
    max_skipped_fraction: float = 0.01,
) -> PreprocessWork:
    """Which image goes where; the same in every process that is given the same source and settings.

    images_per_shard: None = as `default_images_per_shard`. max_skipped_fraction: share of the names that should have
    given an image.

    Raises:
        ValueError: bad settings, or the listing alone has more failures than allowed (names the first).
    """
    if encoding not in SUFFIXES:
        raise ValueError(f"preprocess.encoding: {encoding!r} is not one of {', '.join(SUFFIXES)}")
    size = (
        default_images_per_shard(len(source.items), resolution, encoding)
        if images_per_shard is None
        else images_per_shard
    )
    max_failures = allowed_failures(source, max_skipped_fraction)
    plan = plan_shards(len(source.items), size, seed)
    return PreprocessWork(source, plan, artifact, ShardSettings(resolution, encoding, jpeg_quality, max_failures), size)


def allowed_failures(source: ImageSource, max_skipped_fraction: float) -> int:
    """How many names of a source may fail to give an image.

    Raises:
        ValueError: the listing alone has more failures than that (names the first).
    """
    expected = len(source.items) + sum(entry.failure for entry in source.skipped)
    # As it is written: the product of floats can lie under a whole number, 0.29 * 100 = 28.999999999999996.
    allowed = math.floor(Fraction(str(max_skipped_fraction)) * expected)
    check_failures(source.skipped, allowed)
    return allowed


def write_missing_shards(
    work: PreprocessWork,
    *,
    rank: int = 0,
    world: int = 1,
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """This worker's share of the shards that are not there yet, in `processes` processes.

    Shards that an earlier, interrupted run finished are kept. The files are the same, byte for byte, for any number
    of workers and processes and after any interruption (with the same versions of Pillow and zlib).
    progress: images of this worker's shards and of those found finished (rank 0 counts these), of all.

    Raises:
        ValueError: more unreadable files than allowed so far. Names the first: with a limit of 0 the first in the
            order of this worker's share of the plan, whatever the number of processes; else by name of those so far.
        RuntimeError: one of the processes was killed or crashed; names the files that were being read.
    """
    if processes > 1 and work.artifact.store.url.startswith("memory://"):
        raise ValueError("a memory:// store is seen by one process only: set preprocess.processes=1")
    report = progress or (lambda done, total: None)
    kept = finished_shards(work.artifact, len(work.plan))
    if kept:
        logger.info("%d of %d shards are there already", len(kept), len(work.plan))
    skipped = work.source.skipped + [entry for entries in kept.values() for entry in entries]
    total = len(work.source.items)
    done = sum(len(work.plan[k]) for k in kept) if rank == 0 else 0
    report(done, total)
    missing = work_share([k for k in range(len(work.plan)) if k not in kept], rank, world)
    write = _write_here if processes <= 1 or len(missing) <= 1 else _write_in_processes
    for k, sidecar in write(work, missing, processes):
        skipped += skipped_in(sidecar)
        check_failures(skipped, work.settings.max_failures)
        done += len(work.plan[k])
        report(done, total)


def finish_preprocessing(work: PreprocessWork) -> dict[str, Any]:
    """Write what describes the whole data set, once all shards are there; returns the summary for the manifest.

    Raises:
        ValueError: more unreadable files than allowed over all shards, or not one image left.
    """
    index = finish(
        work.source,
        work.artifact,
        work.settings,
        num_shards=len(work.plan),
        images_per_shard=work.images_per_shard,
    )
    fields = ("num_images", "num_classes", "resolution", "num_skipped", "num_other_files", "pixel_mean", "pixel_std")
    shards = index["shards"]
    size = sum(shard["tar"]["bytes"] for shard in shards)
    return {name: index[name] for name in fields} | {"num_shards": len(shards), "bytes": size}


Written = Iterator[tuple[int, dict[str, Any]]]  # (k, sidecar) of every missing shard, in their order


def _write_here(work: PreprocessWork, missing: Iterable[int], _: int) -> Written:
    for k in missing:
        samples = shard_samples(work.source, work.plan[k])
        yield k, write_shard(work.source.reader, samples, k, work.artifact, work.settings)


def _write_in_processes(work: PreprocessWork, missing: Sequence[int], processes: int) -> Written:
    """This process is one of them: it is at work while the others start.

    What comes of a shard, also an error, is handed on after those before it: so the error does not depend on timing.
    """
    where = (work.artifact.store.url, work.artifact.stage, work.artifact.fingerprint)
    # A server process forks the workers: forking this one, which may have threads (torch, fsspec), could deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    others = min(processes, len(missing)) - 1
    reading = context.RawArray("q", [_NOT_OPEN] * len(missing))  # of each shard: the sample that a worker is at
    slots = {k: slot for slot, k in enumerate(missing)}
    pool = ProcessPoolExecutor(others, context, initializer=_begin_worker, initargs=(reading,))
    waiting, order = iter(missing), deque(missing)
    futures: dict[int, Future[dict[str, Any]]] = {}

    def submit(count: int) -> None:
        for k in itertools.islice(waiting, max(0, count)):
            samples = shard_samples(work.source, work.plan[k])
            futures[k] = pool.submit(_write_in_process, work.source.reader, samples, k, slots[k], where, work.settings)

    def in_order(block: bool) -> Written:
        while order and order[0] in futures and (block or futures[order[0]].done()):
            k = order.popleft()
            yield k, futures.pop(k).result()

    try:
        submit(2 * others)
        for k in waiting:
            futures[k] = _made_here(work, k)
            yield from in_order(block=False)
            done = [future for future in futures.values() if future.done()]
            if any(future.exception() for future in done):
                break
            submit(2 * others - (len(futures) - len(done)))
        yield from in_order(block=True)
    except BrokenProcessPool:
        raise RuntimeError(_what_broke(work, missing, reading)) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _made_here(work: PreprocessWork, k: int) -> Future[dict[str, Any]]:
    """Shard k, written in this process."""
    future: Future[dict[str, Any]] = Future()
    try:
        [(_, sidecar)] = _write_here(work, [k], 1)
        future.set_result(sidecar)
    except Exception as error:
        future.set_exception(error)
    return future


_NOT_OPEN = -1
_reading: MutableSequence[int] = []  # in a worker: what it was given, see `_write_in_processes`


def _begin_worker(reading: MutableSequence[int]) -> None:
    global _reading
    _reading = reading
    end_with_parent()


def _write_in_process(
    reader: ImageReader,
    samples: list[Sample],
    k: int,
    slot: int,
    where: tuple[str, str, str],
    settings: ShardSettings,
) -> dict[str, Any]:
    def noted() -> Iterator[Sample]:
        for number, sample in enumerate(samples):
            _reading[slot] = number
            yield sample

    url, stage, fingerprint = where
    try:
        return write_shard(reader, noted(), k, Artifact(Store(url), stage, fingerprint), settings)
    finally:
        _reading[slot] = _NOT_OPEN


def _what_broke(work: PreprocessWork, missing: Sequence[int], reading: Sequence[int]) -> str:
    """A worker that is killed says nothing, and the others are ended with it: one of these files was the last."""
    at = {k: work.plan[k][number] for k, number in zip(missing, reading, strict=True) if number != _NOT_OPEN}
    if not at:
        return (
            "a process of preprocess ended before it read a file; a script that starts processes must do so below "
            "`if __name__ == '__main__':`"
        )
    files = [f"{work.source.items[position].name} (for {shard_name(k)})" for k, position in at.items()]
    return (
        "a process of preprocess was killed, for want of memory perhaps, or crashed in a decoder, while reading "
        f"{' or '.join(files)}. Finished shards are kept: run again, with fewer preprocess.processes "
        "if memory was short; if it ends at the same file again, take that file out of the source"
    )
