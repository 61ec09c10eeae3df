"""Blocking calls of Ray that leave signals to Prefect: a cancel must reach the main thread."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


def interruptible(fit: Callable[[], Any], *, meanwhile: Callable[[], None], poll: float = 0.5) -> Any:
    """`fit` in a thread, so that Prefect's SIGTERM reaches the main thread and Ray installs no handlers."""
    box: dict[str, Any] = {}
    done = threading.Event()

    def run() -> None:
        try:
            box["result"] = fit()
        except BaseException as error:
            box["error"] = error
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="ray-train-fit").start()
    while not done.wait(poll):
        meanwhile()
    if "error" in box:
        raise box["error"]
    return box["result"]


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Ray replaces the SIGTERM handler, and a cancel by Prefect would look like a crash."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
