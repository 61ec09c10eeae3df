"""One writer an artifact: `lease.json`, created exclusively and kept alive by a heartbeat."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

import psutil

from repae_core.artifacts.parting import at_the_end
from repae_core.artifacts.processes import boot_id, is_alive, pid_namespace
from repae_core.artifacts.store import Store

logger = logging.getLogger("repae")

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_SETTLE_SECONDS = 0.3


class LeaseHeld(RuntimeError):
    """Another process is writing the artifact; one line naming it."""


class LeaseLost(RuntimeError):
    """Another process took the artifact over; nothing more may be committed."""


class Lease:
    """Held while the block runs; `check()` before every commit.

    The lease of a dead process on the same host (boot, and PID namespace) is taken over at once, else after 60 s
    without a heartbeat.

    Raises:
        LeaseHeld: on entering, when a live process holds it.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self.owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self.store.create(self.key, self._content()):
            self._take_over()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        at_the_end(error, self._release)

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if _owner(_read(self.store, self.key)) == self.owner:
            self.store.delete(self.key)

    def check(self) -> None:
        """LeaseLost when the lease is no longer this object's."""
        check_lease(self.store, self.key, self.owner)

    def _content(self) -> bytes:
        process = psutil.Process()
        content = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "pid_namespace": pid_namespace(),
            "pid": process.pid,
            "pid_started": process.create_time(),
            "heartbeat": time.time(),
        }
        return json.dumps(content).encode()

    def _take_over(self) -> None:
        for _ in range(3):
            held = _read(self.store, self.key)
            if held is not None:
                reason = _why_free(held)
                if not reason:
                    raise LeaseHeld(_held_line(self.store.uri(self.key), held))
                if _read(self.store, self.key) == held:
                    logger.warning("%s: taken over, %s", self.store.uri(self.key), reason)
                    self.store.delete(self.key)
            elif self.store.exists(self.key):  # unreadable: no one's
                self.store.delete(self.key)
            if self.store.create(self.key, self._content()):
                # Someone who judged the same dead lease a moment ago may have removed ours instead.
                time.sleep(_SETTLE_SECONDS)
                if _owner(_read(self.store, self.key)) == self.owner:
                    return
        raise LeaseHeld(_held_line(self.store.uri(self.key), _read(self.store, self.key) or {}))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if _owner(_read(self.store, self.key)) != self.owner:
                    return  # lost: `check` will say so
                self.store.write_bytes(self.key, self._content())
            except OSError as error:  # StoreError, or what a shared file system says for a moment (EIO, ESTALE)
                logger.warning("heartbeat failed: %s", error)


def is_held(store: Store, key: str) -> bool:
    """Whether a live process holds the lease at `key`."""
    held = _read(store, key)
    return held is not None and not _why_free(held)


def check_lease(store: Store, key: str, owner: str) -> None:
    """LeaseLost unless `owner` holds the lease at `key`."""
    held = _read(store, key)
    if _owner(held) != owner:
        by = f"now held by pid {held['pid']} on {held['host']}" if held else "gone"
        raise LeaseLost(f"{store.uri(key)}: the lease is {by}; nothing more is written")


def _read(store: Store, key: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = store.read_json(key)
        return content
    except (FileNotFoundError, ValueError):
        return None


def _owner(held: dict[str, Any] | None) -> str | None:
    return held["owner"] if held else None


def _why_free(held: dict[str, Any]) -> str:
    """Why a lease may be taken over; empty while its holder may live."""
    place = (held["host"], held["boot_id"], held.get("pid_namespace"))  # leases of former versions have no namespace
    if place == (socket.gethostname(), boot_id(), pid_namespace()):
        return "" if is_alive(held["pid"], held["pid_started"]) else f"its process {held['pid']} is gone"
    age = time.time() - held["heartbeat"]
    return f"no heartbeat for {age:.0f} s" if age > EXPIRY_SECONDS else ""


def _held_line(uri: str, held: dict[str, Any]) -> str:
    who = f"process {held['pid']} on {held['host']}" if held else "another process"
    return f"{uri.rsplit('/', 1)[0]} is being written by {who}; wait for it, or stop it first"
