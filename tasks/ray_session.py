"""The connection to a Ray cluster: the one at RAY_ADDRESS, or a private one on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a frozen process; Ray's default is ten minutes
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "604800",  # of waiting for room, which is no failure: see `require_room`
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the training on a busy machine
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # read when ray is imported; else a call after the end starts a cluster of its own
}

logger = logging.getLogger("repae")

_PROBE_SECONDS = 10.0
_ANSWER_SECONDS = 30.0  # a busy machine takes seconds to start the process that answers
_HEAD_SECONDS = 120.0  # a restarted Ray head is waited for
_EXIT_SECONDS = 5.0  # for processes whose cluster has ended
_KEPT_SECONDS = 7 * 86400.0  # that logs of private clusters are kept


class RaySession:
    """A connection to RAY_ADDRESS, or a private local cluster that ends with this process."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._cpus = 0.0  # of the private cluster; a given one's are its own affair

    def connect(self, cpus: int = 0) -> None:
        """Open the session if it is not open yet; `cpus`: what the workers will ask for.

        A private cluster that was made for fewer gives way to a larger one: Ray would wait for the rest for ever.

        Raises:
            ConnectionError: RAY_ADDRESS does not answer (ray.init would wait for minutes).
        """
        if self.address is not None and cpus <= self._cpus:
            return
        self.close()
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        given = os.environ.get("RAY_ADDRESS")
        if given:
            _probe(given)
        else:
            # Else Ray takes the machine's address for 127.0.0.1, and then listens on every interface.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        with _signal_handlers_kept():
            context: Any = ray.init(
                address=given,
                include_dashboard=None if given else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                namespace="repae",
                **({} if given else _private_cluster(cpus)),
            )
        self.address = context.address_info["address"]
        self._cpus = math.inf if given else _private_cpus(cpus)

    def require_room(self, workers: int, cpus: int, gpus: int) -> None:
        """Say what the cluster lacks for so many workers with `cpus` and `gpus` each; Ray waits for it in silence.

        A given cluster may still grow, or get a lost machine back: a warning.

        Raises:
            ValueError: the open private cluster has fewer GPUs.
        """
        import ray

        if os.environ.get("RAY_ADDRESS"):
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            wanted = {kind: count for kind, count in (("CPU", cpus), ("GPU", gpus)) if count}
            room = sum(min(int(has.get(kind, 0) // n) for kind, n in wanted.items()) for has in machines)
            if room < workers:
                logger.warning("the Ray cluster has room for %d of %d workers of %d CPU(s) and %d GPU(s): waiting for "
                               "more machines", room, workers, cpus, gpus)  # fmt: skip
        elif gpus:
            found = int(ray.cluster_resources().get("GPU", 0))
            if workers * gpus > found:
                raise ValueError(
                    f"gpus_per_worker: the workers need {workers * gpus} GPU(s), and Ray finds {found} on this machine"
                )

    def recover(self) -> None:
        """After a failure: a new private cluster; of a given one only the connection, if it does not answer any more.

        Ray Train frees the CPUs of a group that failed by asking the dashboard, which a private cluster has not: they
        would stay reserved, and the next group would wait for them for ever.
        """
        given = os.environ.get("RAY_ADDRESS")
        if not given:
            self.close()
            return
        import ray

        try:
            ray.get(cast(Any, ray.remote(num_cpus=0)(_answer)).remote(), timeout=_ANSWER_SECONDS)
        except Exception:
            logger.warning("the Ray cluster does not answer; connecting anew")
            self.close()
            _probe(given, _HEAD_SECONDS)

    def close(self) -> None:
        """End the session, and the private cluster with it."""
        if self.address is not None:
            import ray

            workers = [] if os.environ.get("RAY_ADDRESS") else _workers_of_this_process()
            with _signal_handlers_kept():
                ray.shutdown()
            self.address = None
            # Seen once: a worker that had shut down hung in its process's exit, and kept 800 MB.
            for worker in psutil.wait_procs(workers, timeout=_EXIT_SECONDS)[1]:
                with contextlib.suppress(psutil.Error):
                    worker.kill()


def _workers_of_this_process() -> list[psutil.Process]:
    """Processes of its private cluster that run tasks and actors."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::"):
                workers.append(process)
    return workers


def on_this_machine(function: Callable[..., Any]) -> Any:
    """`function` as a Ray task that takes no CPU, runs on the driver's machine and never twice."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    settings = {n: value for n, value in os.environ.items() if n in _QUIET or n.startswith("RAY_TRAIN_")}
    decorate: Any = ray.remote(
        num_cpus=0, max_retries=0, scheduling_strategy=cast(Any, here), runtime_env={"env_vars": settings}
    )
    return decorate(function)


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
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


def _answer() -> bool:
    return True


def _private_cpus(cpus: int) -> int:
    """On a machine with fewer CPUs than asked for, Ray would wait for ever; slower is better."""
    return max(cpus, os.cpu_count() or 1)


def _private_cluster(cpus: int) -> dict[str, Any]:
    scratch = Path(tempfile.gettempdir()) / f"repae-ray-{os.getuid()}"  # socket paths must stay short
    scratch.mkdir(mode=0o700, exist_ok=True)
    _remove_old_sessions(scratch)
    return {
        "num_cpus": _private_cpus(cpus),
        "object_store_memory": 200_000_000,
        "_temp_dir": str(scratch),
        "_node_ip_address": "127.0.0.1",
    }


def _remove_old_sessions(scratch: Path) -> None:
    """Folders of clusters that ended a while ago: Ray leaves them, with their logs."""
    for folder in scratch.glob("session_*_*"):
        pid = folder.name.rpartition("_")[2]
        with contextlib.suppress(OSError):  # another process may remove it too
            old = time.time() - folder.stat().st_mtime > _KEPT_SECONDS
            if old and pid.isdigit() and not psutil.pid_exists(int(pid)) and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)


def _probe(address: str, seconds: float | None = None) -> None:
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    deadline = time.monotonic() + (seconds or _PROBE_SECONDS)
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=3):
                return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                raise ConnectionError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
            time.sleep(1)
