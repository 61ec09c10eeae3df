"""Work in an open Ray session beside the training: on what it leaves free, and waited for by nobody."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, cast

from tasks.ray_answer import Answer
from tasks.ray_launch import root_cause

_POLL_SECONDS = 0.2


class LostError(RuntimeError):
    """The work ended with its process or its cluster; it said nothing itself."""


class SideTask:
    """Work in the cluster that nothing waits for; at the end of the session it is gone."""

    def __init__(self, reference: Any) -> None:
        self._reference, self._connection = reference, _connection()
        self._returned = Answer(reference)  # never comes when the cluster ends

    def done(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, well or not; waits up to so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._returned.here(max(0.0, min(_POLL_SECONDS, deadline - time.monotonic()))):
            if _connection() != self._connection:
                return True
            if time.monotonic() >= deadline:
                return False
        return True

    def result(self) -> dict[str, Any]:
        """What it returned, when it is done.

        Raises:
            RuntimeError: it failed; the first line of the cause.
            LostError: it did not come to an end.
        """
        import ray

        if not self._returned.here():
            raise LostError("its Ray cluster has ended")
        try:
            return cast(dict[str, Any], self._returned.value())
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(root_cause(error)) from error
        except Exception as error:
            raise LostError(f"it did not come to an end: {root_cause(error)}") from error

    def cancel(self) -> None:
        """End it; after the end of the session there is nothing to end."""
        import ray

        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.cancel(self._reference, force=True)


def start_beside(
    work: Callable[[dict[str, Any]], dict[str, Any]], payload: dict[str, Any], *, cpus: int, gpus: int = 0
) -> SideTask | None:
    """Run `work` on CPUs and GPUs of the open session that nobody has reserved; None where there are not so many.

    Raises:
        RuntimeError: Ray could not, as while its head starts again; the first line of the cause.
    """
    import ray

    try:
        free = ray.available_resources() if ray.is_initialized() else {}
        if free.get("CPU", 0) < cpus or free.get("GPU", 0) < gpus:
            return None
        # max_calls: its process ends with it; with the low priority that `work` may take, Ray must not use it for a
        # worker.
        remote: Any = cast(Any, ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1))(work)
        return SideTask(remote.remote(payload))
    except Exception as error:
        raise RuntimeError(root_cause(error)) from error


def _connection() -> tuple[str, str] | None:
    """Which cluster this process is connected to, and for the how-manieth time; None: to none."""
    import ray

    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()
