"""What a block still writes to the store when it ends, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

_CANCEL_SECONDS = 2.0  # a cancelled run must be gone within 15 s, and there are several such blocks


def at_the_end(error: BaseException | None, action: Callable[[], None]) -> None:
    """Do it; after a cancel (what is no `Exception`) only as far as it gets in two seconds: the store may be away.

    error: what ends the block. Exceptions of an action that took longer are lost.
    """
    if error is None or isinstance(error, Exception):
        action()
        return
    raised: list[BaseException] = []

    def work() -> None:
        try:
            action()
        except BaseException as reason:
            raised.append(reason)

    thread = threading.Thread(target=work, name="parting", daemon=True)
    thread.start()
    thread.join(_CANCEL_SECONDS)
    if raised:
        raise raised[0]
