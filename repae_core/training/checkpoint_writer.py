"""Checkpoints and pictures written beside the training: a snapshot in the step, the upload in the background."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError

from repae_core.artifacts import Artifact, StoreError
from repae_core.artifacts.checkpoints import FOLDER, commit_checkpoint, committed_checkpoints
from repae_core.training.checkpoint import write_snapshot
from repae_core.training.checkpoint_scratch import (
    discard,
    finish,
    open_scratch,
    remove_scratch,
    unfinished,
    whole_folders,
)
from repae_core.training.state import LDMState

logger = logging.getLogger("repae_core")

_PULSE_SECONDS = 0.5
_STUCK_SECONDS = 1800.0  # without one file written: the store has no time limits of its own, and the watchdog is to act
_CANCEL_SECONDS = 5.0  # a cancelled run must be gone within 15 s; an upload cut off is not committed


class CheckpointWriter:
    """Checkpoints of a run into `folder`; use as a context, which waits for the uploads when it ends.

    At most `waiting` snapshots lie in local scratch; `save` blocks while there are more, so that a store that is
    away for longer than its time budget stops the run instead of filling the disk. A failed upload is raised by the
    next `save`, `check` or at the end. Kept are the newest `keep`, and every one at a multiple of `keep_every`
    images (0 = none). What waited in scratch when a process of this training was killed comes first.

    training: a name of this training until it is begun anew; "" = what waits is lost with the process.
    guard: called before anything in the store is changed, raises when the stage's lease is lost; waits: called again
    and again, on every rank while `save` waits for room or `flush` for the store, on the main one while the end waits.
    """

    def __init__(
        self,
        folder: Artifact,
        state: LDMState,
        *,
        guard: Callable[[], None],
        waits: Callable[[], None] = lambda: None,
        training: str = "",
        keep: int,
        keep_every: int = 0,
        waiting: int = 2,
    ) -> None:
        self.seconds = 0.0  # that training has lost to checkpoints so far
        self._folder, self._state, self._guard = folder, state, guard
        self._waits = waits
        self._training = training or uuid.uuid4().hex
        self._moved = time.monotonic()  # when the background last began a job or wrote a checkpoint's file
        self._keep, self._keep_every = keep, keep_every
        self._room = threading.Semaphore(waiting)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._receipts: deque[Any] = deque()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._scratch = Path()

    def __enter__(self) -> Self:
        if self._state.group.is_main:
            self._scratch = open_scratch(self._training)
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
            self._thread.start()
            for left in whole_folders(self._scratch):
                self._queue.put(functools.partial(self._adopt if left.name.isdigit() else self._write, left))
            self._queue.put(self._clear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread is not None:
            self._queue.put(None)
            if kind is None or issubclass(kind, Exception):
                with self._timed():
                    self._wait_for_the_end()
            else:
                self._error = self._error or error  # from here on nothing is committed: its files may be going
            self._thread.join(_CANCEL_SECONDS)
            remove_scratch(self._scratch)
        if error is None:
            self.check()

    def save(self, record: dict[str, Any]) -> None:
        """Snapshot of the state as it is now; every rank calls it. record: JSON-able position and history.

        Raises:
            StoreError: no room on the local disk, or an earlier upload failed for good.
        """
        with self._timed():
            while self._state.group.from_main(not self._has_room()):
                self._waits()
            folder = unfinished(self._scratch, str(record["images_seen"]))
            with self._disk_errors():
                write_snapshot(folder, self._state, record)
                if self._thread is not None:
                    self._queue.put(functools.partial(self._commit, finish(folder)))

    def write(self, files: Mapping[str, bytes], receipt: Any = None) -> None:
        """Small files, written after what was saved before; `take_receipts` gives `receipt` once they are there.

        Raises:
            StoreError: no room on the local disk.
        """
        if self._thread is None or not files:
            return
        folder = unfinished(self._scratch, f"files-{time.time_ns()}")  # a successor writes them in this order
        with self._timed(), self._disk_errors():
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            self._queue.put(functools.partial(self._write, finish(folder), receipt))

    def take_receipts(self) -> list[Any]:
        """Receipts of files written since the last call."""
        return [self._receipts.popleft() for _ in range(len(self._receipts))]

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait until everything saved is committed; every rank calls it."""
        with self._timed():
            while self._state.group.from_main(self._is_busy()):
                self._waits()
        self.check()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """What the local disk refuses as one line."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "StreamWriter" not in str(error):  # torch.save on a full disk
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise StoreError(f"checkpoint scratch {self._scratch}: {reason}") from error

    def _has_room(self) -> bool:
        """On the main rank for one more snapshot, after a while at most; the others have."""
        room = self._thread is None or self._room.acquire(timeout=self._patience())
        self.check()
        return room

    def _patience(self) -> float:
        """Seconds until the ranks are told that the wait goes on."""
        return _PULSE_SECONDS if time.monotonic() - self._moved < _STUCK_SECONDS else threading.TIMEOUT_MAX

    def _is_busy(self) -> bool:
        """On the main rank, whether something is still to be written after a while; the others are not."""
        until = time.monotonic() + self._patience()
        while self._thread is not None and self._thread.is_alive() and self._queue.unfinished_tasks:
            if time.monotonic() > until:
                return True
            time.sleep(0.05)
        return False

    def _wait_for_the_end(self) -> None:
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(self._patience())
            self._waits()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._moved = time.monotonic()
            try:
                job()
            except BaseException as error:
                logger.error("written in the background: %s", error)
                self._error = error
            finally:
                self._queue.task_done()

    def _write(self, folder: Path, receipt: Any = None) -> None:
        try:
            if self._error is None:
                self._guard()
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    self._folder.upload(path.relative_to(folder).as_posix(), path)
                if receipt is not None:
                    self._receipts.append(receipt)
        finally:
            discard(folder)

    def _commit(self, snapshot: Path) -> None:
        try:
            if self._error is None:
                self._upload(snapshot)
        finally:
            discard(snapshot)
            self._room.release()

    def _adopt(self, snapshot: Path) -> None:
        """The snapshot of a killed process, unless the store has it or a later one."""
        if self._error is None and int(snapshot.name) > max(committed_checkpoints(self._folder), default=0):
            self._upload(snapshot)
            logger.info("checkpoint %s had waited in scratch when its process was killed", snapshot.name)
        discard(snapshot)

    def _upload(self, snapshot: Path) -> None:
        images_seen = int(snapshot.name)
        name = f"{FOLDER}/{images_seen}"
        self._guard()  # else a worker whose lease is lost would break what its successor has committed
        self._drop(images_seen)
        sizes = {}
        for path in sorted(snapshot.iterdir()):
            self._folder.upload(f"{name}/{path.name}", path)
            sizes[path.name] = path.stat().st_size
            self._moved = time.monotonic()
        self._guard()
        if self._folder.files(name) != sizes:  # an attempt that was given up, but still runs
            raise StoreError(f"{self._folder.uri}/{name}: another process has changed it while it was written")
        if self._error is None:
            commit_checkpoint(self._folder, name, sizes)
            self._prune(before=images_seen)

    def _clear(self) -> None:
        """What an attempt left that died while it uploaded or dropped a checkpoint."""
        self._guard()
        self._prune()

    def _prune(self, before: float = math.inf) -> None:
        """Keep the checkpoints that are to be kept, and what is newer: a later attempt may be writing it."""
        committed = committed_checkpoints(self._folder)
        kept = set(committed[-self._keep :])
        kept |= {images for images in committed if self._keep_every and images % self._keep_every == 0}
        found = {name.split("/")[0] for name in self._folder.files(FOLDER)}
        for images_seen in {int(name) for name in found if name.isdigit()} - kept:
            if images_seen < before:
                self._drop(images_seen)

    def _drop(self, images_seen: int) -> None:
        self._folder.delete(f"{FOLDER}/{images_seen}/commit.json")
        self._folder.delete(f"{FOLDER}/{images_seen}", recursive=True)
