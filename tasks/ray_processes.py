"""The processes of this process's private Ray cluster: its services, tasks and actors."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Sequence

import psutil

_MARK = "REPAE_RAY_CLUSTER"  # in the environment


def mark_processes() -> None:
    """Those started from now on are known as one cluster's."""
    os.environ[_MARK] = uuid.uuid4().hex


def ray_processes() -> set[psutil.Process]:
    """All; of those whose parent has ended the young ones, before they have a title: it overwrites the environment."""
    own, found = set(psutil.Process().children(recursive=True)), set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process in own or process.environ().get(_MARK) == os.environ.get(_MARK)
            if marked and _is_of_ray(process.cmdline()):
                found.add(process)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for those that still run, the oldest first: a raylet starts no others then."""
    for process in sorted(processes, key=psutil.Process.create_time):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _is_of_ray(arguments: Sequence[str]) -> bool:
    """By its program: the code of a `python -c`, as of a data loader's fork server, may name Ray's folders, too."""
    program = [part for part in arguments[:3] if part.startswith(os.sep) and f"{os.sep}ray{os.sep}" in part]
    return bool(program) or "".join(arguments[:1]).startswith("ray::")
