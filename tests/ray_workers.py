"""Ray workers as a failure test sees them: processes to kill."""

import contextlib
import time

import psutil

from repae_core.artifacts import Store


def kill_a_worker(killed: list[str], key: str, store: Store, stage: str) -> None:
    """SIGKILL the first Ray worker that is seen once a file of that kind is there; its name goes to `killed`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not killed:
        found = [name for name in store.files(stage) if key in name]
        # Those of this process only: others may have Ray workers on the same machine.
        for process in psutil.Process().children(recursive=True) if found else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::RayTrainWorker" in "".join(process.cmdline()):
                    process.kill()
                    killed.append(found[0])
                    return
        time.sleep(0.02)
