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
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, cast

import psutil

from tasks.ray_answer import answer_of
from tasks.ray_processes import kill, mark_processes, ray_processes

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a frozen process; Ray's default is ten minutes
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "604800",  # of waiting for room, which is no failure: see `require_room`
    "RAY_task_events_shutdown_flush_timeout_ms": "500",  # of statistics; else 5 s of a cancel: Prefect ends all at once
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
_CANCEL_SECONDS = 8.0  # for a start that is under way; a cancelled run must be gone within 15 s
_INTERRUPT_SECONDS = 30.0  # the same in a process that stays: Ray ends one whose services are gone, a minute later
_LOOK_SECONDS = 0.01
_GRACE_SECONDS = 0.5  # for a private cluster to end in order
_KEPT_SECONDS = 7 * 86400.0  # that logs of private clusters are kept


class RaySession:
    """A connection to RAY_ADDRESS, or a private local cluster that ends with this process."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._cpus = 0.0  # of the private cluster; a given one's are its own affair
        self._closed = threading.Event()

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
        if not given or _host_and_port(given)[0] in ("127.0.0.1", "localhost"):
            # Else Ray takes the machine's address for 127.0.0.1: it waits for a cluster there for ever, and a private
            # one listens on every interface.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        self._closed = threading.Event()
        mark_processes()
        self.address = ""  # a cancel before it is known leaves something to close
        context = _init_ray(
            self._closed,
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
            answer_of(cast(Any, ray.remote(num_cpus=0)(_answer)).remote(), _ANSWER_SECONDS)
        except Exception:
            logger.warning("the Ray cluster does not answer; connecting anew")
            self.close()
            _probe(given, _HEAD_SECONDS)

    def close(self) -> None:
        """End the session, and the private cluster with it."""
        if self.address is not None:
            _shut_down()
            self.address = None
            self._closed.set()


def _init_ray(closed: threading.Event, **settings: Any) -> Any:
    """`ray.init`; a cancel meanwhile lets it come to its end, for a while, and then ends what it has started.

    In a thread: in the main one it waits in C++, where no signal is heard, and makes an exit of SIGTERM. The thread
    stays until `closed`, as the system ends Ray's services with the thread that has started them. They inherit that it
    is deaf to SIGTERM, which Prefect sends to all processes at once: a start whose services die under it hangs.
    """
    import ray

    if "://" in (settings["address"] or ""):  # a client's connection belongs to the thread that makes it
        with _signal_handlers_kept():
            return ray.init(**settings)
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would say that it leaves SIGTERM alone
    opened: Future[Any] = Future()

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            opened.set_result(ray.init(**settings))
            closed.wait()
        except BaseException as error:
            opened.set_exception(error)

    threading.Thread(target=work, name="ray-init", daemon=True).start()
    try:
        while not opened.done():
            with _signal_handlers_kept():  # Ray's libraries put theirs in the place of Python's whole machinery
                time.sleep(_LOOK_SECONDS)
        with _signal_handlers_kept():
            return opened.result()
    except Exception:
        raise
    except BaseException as error:
        signal.alarm(0)  # by which Ray's handler of SIGTERM, were it the one that heard this, aborts after 3 s
        if wait([opened], _INTERRUPT_SECONDS if isinstance(error, KeyboardInterrupt) else _CANCEL_SECONDS).done:
            _shut_down()
            closed.set()
        elif not settings["address"]:
            for _ in range(10):  # the thread may just be starting the next one
                kill(ray_processes())
                time.sleep(0.1)
        raise


def _shut_down() -> None:
    """`ray.shutdown`, and the end of all processes of a private cluster.

    By force: Ray would wait a second for each of its services, which are deaf to its SIGTERM. And seen: a worker that
    had shut down hung in its process's exit and kept 800 MB; one that had just been started stayed for 40 s.
    """
    import ray

    started = ray_processes()

    def end() -> None:
        started.update(ray_processes())  # before their parent ends: without it they are not known for long
        kill(started)

    killing = threading.Timer(_GRACE_SECONDS, end)
    killing.start()
    with _signal_handlers_kept():
        ray.shutdown()
    killing.join()
    kill(psutil.wait_procs({*started, *ray_processes()}, timeout=_GRACE_SECONDS)[1])


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
    """Ray replaces the handlers of SIGTERM, in C too: a cancel by Prefect would be a crash, or not be heard."""
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
    host, port = _host_and_port(address)
    deadline = time.monotonic() + (seconds or _PROBE_SECONDS)
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=3):
                return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                raise ConnectionError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
            time.sleep(1)


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host, port
