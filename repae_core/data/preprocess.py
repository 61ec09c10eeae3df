"""From a source to a finished set of image shards, in this process or in several."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from repae_core.artifacts import Artifact, Store
from repae_core.data.shards import (
    ENCODINGS,
    Sample,
    check_failures,
    finish,
    finished_shards,
    plan_shards,
    shard_samples,
    skipped_in,
    write_shard,
)
from repae_core.data.sources import ImageReader, ImageSource

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def preprocess_images(
    source: ImageSource,
    artifact: Artifact,
    *,
    resolution: int,
    images_per_shard: int,
    seed: int,
    encoding: str = "png",
    max_skipped_fraction: float = 0.01,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Crop, encode and pack all images of a source; returns the summary for the manifest.

    Shards that an earlier, interrupted run finished are kept. The files are the same, byte for byte, for any number
    of processes and after any interruption (with the same versions of Pillow and zlib).
    max_skipped_fraction: share of the names that should have given an image; progress: (images done, of all).

    Raises:
        ValueError: bad settings; more unreadable files than allowed (names the first); no image at all.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"preprocess.encoding: {encoding!r} is not one of {', '.join(ENCODINGS)}")
    if processes > 1 and artifact.store.url.startswith("memory://"):
        raise ValueError("a memory:// store is seen by one process only: set preprocess.processes=1")
    expected = len(source.items) + sum(entry.failure for entry in source.skipped)
    max_failures = math.floor(max_skipped_fraction * expected)
    check_failures(source.skipped, max_failures)
    plan = plan_shards(len(source.items), images_per_shard, seed)
    settings = {"resolution": resolution, "encoding": encoding, "max_failures": max_failures}
    work = _Work(source, plan, artifact, settings)
    _write_missing(work, processes, progress or (lambda done, total: None))
    index = finish(
        source,
        artifact,
        num_shards=len(plan),
        images_per_shard=images_per_shard,
        resolution=resolution,
        encoding=encoding,
        max_failures=max_failures,
    )
    return _summary(index)


def _summary(index: dict[str, Any]) -> dict[str, Any]:
    fields = ("num_images", "num_classes", "resolution", "num_skipped", "num_other_files", "pixel_mean", "pixel_std")
    shards = index["shards"]
    size = sum(shard["tar"]["bytes"] for shard in shards)
    return {name: index[name] for name in fields} | {"num_shards": len(shards), "bytes": size}


@dataclass(frozen=True)
class _Work:
    """All shards of one data set."""

    source: ImageSource
    plan: list[np.ndarray]
    artifact: Artifact
    settings: dict[str, Any]


def _write_missing(work: _Work, processes: int, progress: Progress) -> None:
    kept = finished_shards(work.artifact, len(work.plan))
    if kept:
        logger.info("%d of %d shards are there already", len(kept), len(work.plan))
    skipped = work.source.skipped + [entry for entries in kept.values() for entry in entries]
    total = len(work.source.items)
    done = sum(len(work.plan[k]) for k in kept)
    progress(done, total)
    missing = [k for k in range(len(work.plan)) if k not in kept]
    write = _write_here if processes <= 1 or len(missing) <= 1 else _write_in_processes
    for k, sidecar in write(work, missing, processes):
        skipped += skipped_in(sidecar)
        check_failures(skipped, work.settings["max_failures"])
        done += len(work.plan[k])
        progress(done, total)


def _write_here(work: _Work, missing: Sequence[int], _: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for k in missing:
        samples = shard_samples(work.source, work.plan[k])
        yield k, write_shard(work.source.reader, samples, k, work.artifact, **work.settings)


def _write_in_processes(work: _Work, missing: Sequence[int], processes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(k, sidecar) of every missing shard in the order in which they are finished."""
    where = (work.artifact.store.url, work.artifact.stage, work.artifact.fingerprint)
    # spawn: forking a process that has started threads (torch, fsspec) can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(missing)), context, initializer=_end_with_parent)
    waiting = iter(missing)
    running: dict[Future[dict[str, Any]], int] = {}

    def submit(count: int) -> None:
        for k in itertools.islice(waiting, count):
            samples = shard_samples(work.source, work.plan[k])
            running[pool.submit(_write_in_process, work.source.reader, samples, k, where, work.settings)] = k

    try:
        submit(2 * processes)
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
            submit(len(finished))
    finally:
        pool.shutdown(cancel_futures=True)


def _write_in_process(
    reader: ImageReader, samples: list[Sample], k: int, where: tuple[str, str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    url, stage, fingerprint = where
    return write_shard(reader, samples, k, Artifact(Store(url), stage, fingerprint), **settings)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
