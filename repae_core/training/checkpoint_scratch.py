"""Local scratch of a training process: what waits there for the store, and what a killed process has left there.

Each thing that waits is a folder (a checkpoint's is named by its images seen), whole once it has its name: it is filled
and emptied under another one, so that a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

from repae_core.artifacts import StoreError
from repae_core.artifacts.processes import boot_id, is_alive, pid_namespace

_NOT_WHOLE = ".part"


def open_scratch(training: str) -> Path:
    """This process's folder below TMPDIR, with what a killed process of the same training has left there whole.

    training: a name for it from its first start to its end. What killed processes of others left is removed; so is
    what is older than this machine's start and may be torn. Other machines' is not seen: TMPDIR may be shared.

    Raises:
        StoreError: the folder there is another user's.
    """
    parent = Path(tempfile.gettempdir()) / f"repae-checkpoints-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.lstat().st_uid != os.getuid():
        raise StoreError(f"checkpoint scratch {parent}: belongs to another user; set TMPDIR to another folder")
    mine = f"{training}@{platform.node()}@{boot_id()}@{pid_namespace()}@"
    scratch = parent / f"{mine}{os.getpid()}"
    remove_scratch(scratch)
    scratch.mkdir()
    for folder in [folder for folder in parent.iterdir() if _is_of_the_dead(folder.name)]:
        if folder.name.startswith(mine):
            _take_over(folder, scratch)
        remove_scratch(folder)
    return scratch


def remove_scratch(scratch: Path) -> None:
    """With all that waits there."""
    with contextlib.suppress(FileNotFoundError):
        for folder in whole_folders(scratch):
            discard(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def unfinished(scratch: Path, name: str) -> Path:
    """Where the folder `name` is to be filled; not made yet."""
    return scratch / f"{name}{_NOT_WHOLE}"


def finish(folder: Path) -> Path:
    """Give a filled folder its name, under which it waits."""
    return folder.rename(folder.with_name(folder.name.removesuffix(_NOT_WHOLE)))


def discard(folder: Path) -> None:
    """Remove a folder that waits no more."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder.rename(unfinished(folder.parent, folder.name)), ignore_errors=True)


def whole_folders(scratch: Path) -> list[Path]:
    """What waits in it, checkpoints last and in their order."""
    whole = (folder for folder in scratch.iterdir() if not folder.name.endswith(_NOT_WHOLE))
    return sorted(whole, key=lambda folder: (int(folder.name) if folder.name.isdigit() else 0, folder.name))


def _take_over(left: Path, scratch: Path) -> None:
    for folder in whole_folders(left):
        with contextlib.suppress(OSError):  # of another killed process it is here already: the same
            folder.rename(scratch / folder.name)


def _is_of_the_dead(name: str) -> bool:
    """Whether a scratch's process is known to be gone: killed here, or running before this machine was started."""
    _, *place, pid = name.split("@")
    if len(place) != 3 or place[0] != platform.node() or not pid.isdigit():
        return False
    if place[1] != boot_id():
        return True
    return place[2] == pid_namespace() and not is_alive(int(pid))
