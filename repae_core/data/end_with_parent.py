"""Helper processes end with the process that they work for, also when that is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Watch, from a process that `multiprocessing` started, the one that asked for it.

    Without it a helper whose parent was killed would wait for work for ever, and its fork server with it. Torch's own
    watch of its loader's workers looks at `os.getppid()`: the fork server, which lives as long as they do.
    """
    parent = multiprocessing.parent_process()  # who asked, not the fork server that forked
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
