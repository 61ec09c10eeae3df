"""One worker function on Ray Train: the only file that imports Ray.

A pipeline run has one `RaySession`, opened on first use. Workers report through a mailbox actor that the
driver reads while it waits, so that only the driver talks to MLflow, Prefect and the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from repae_core.config.environment import repae_home

Report = Callable[[dict[str, Any]], None]
Worker = Callable[[dict[str, Any], Report], dict[str, Any]]  # (payload, report) -> result of rank 0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the training on a busy machine
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_PROBE_SECONDS = 10.0


class WorkersFailedError(RuntimeError):
    """The workers failed more often than allowed; the message is the first line of the cause."""


class RaySession:
    """A connection to RAY_ADDRESS, or a private local cluster that ends with this process."""

    def __init__(self) -> None:
        self.address: str | None = None

    def connect(self, cpus: int = 0) -> None:
        """Open the session if it is not open yet; `cpus`: what the workers will ask for.

        Raises:
            ConnectionError: RAY_ADDRESS does not answer (ray.init would wait for minutes).
        """
        if self.address is not None:
            return
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        given = os.environ.get("RAY_ADDRESS")
        if given:
            _probe(given)
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

    def close(self) -> None:
        """End the session, and the private cluster with it."""
        if self.address is not None:
            import ray

            with _signal_handlers_kept():
                ray.shutdown()
            self.address = None


def launch(
    worker: Worker,
    payload: dict[str, Any],
    *,
    session: RaySession,
    workers: int,
    cpus_per_worker: int,
    gpus_per_worker: int = 0,
    max_failures: int = 0,
    on_report: Report,
) -> dict[str, Any]:
    """Run `worker` on that many Ray Train workers (0: here, without Ray); returns rank 0's result.

    worker: importable module-level function; `payload` and reports are small JSON-able dicts.
    A failed worker restarts the group up to `max_failures` times; the worker continues from its checkpoint.

    Raises:
        WorkersFailedError: the workers failed more often than that.
    """
    if workers == 0:
        return worker(payload, on_report)
    session.connect(workers * cpus_per_worker)
    import ray

    mailbox: Any = cast(Any, ray.remote(num_cpus=0)(_Mailbox)).remote()

    def deliver() -> None:
        for message in ray.get(mailbox.drain.remote(), timeout=60):
            on_report(message)

    with tempfile.TemporaryDirectory(prefix="repae-ray-", ignore_cleanup_errors=True) as scratch:
        trainer = _trainer(
            {"worker": worker, "payload": payload, "mailbox": mailbox},
            scratch,
            workers=workers,
            cpus=cpus_per_worker,
            gpus=gpus_per_worker,
            max_failures=max_failures,
        )
        try:
            result = _interruptible(trainer.fit, meanwhile=deliver)
        except Exception as error:
            raise WorkersFailedError(_root_cause(error)) from error
        deliver()
    ray.kill(mailbox)
    return dict(result.return_value)


class _Mailbox:
    """Messages from the workers, kept until the driver takes them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        messages, self.messages = self.messages, []
        return messages


def _trainer(
    loop_config: dict[str, Any], scratch: str, *, workers: int, cpus: int, gpus: int, max_failures: int
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    return TorchTrainer(
        cast(Any, _train_loop),
        train_loop_config=loop_config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        # A fresh name and scratch folder: our checkpoints decide where a run starts, never Ray's storage.
        run_config=cast(Any, RunConfig)(
            name=f"repae-{uuid.uuid4().hex[:12]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray worker."""

    result: dict[str, Any] = config["worker"](config["payload"], config["mailbox"].put.remote)
    return result


def _interruptible(fit: Callable[[], Any], *, meanwhile: Callable[[], None], poll: float = 0.5) -> Any:
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


def _root_cause(error: BaseException) -> str:
    """The line that says what went wrong in the first failed worker."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause = error
    while (nested := getattr(cause, "cause", None) or cause.__cause__) is not None and nested is not cause:
        cause = nested
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


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


def _private_cluster(cpus: int) -> dict[str, Any]:
    scratch = Path(tempfile.gettempdir()) / f"repae-ray-{os.getuid()}"  # socket paths must stay short
    scratch.mkdir(mode=0o700, exist_ok=True)
    (repae_home() / "ray").mkdir(exist_ok=True)
    return {
        # On a machine with fewer CPUs than asked for, Ray would wait for ever; slower is better.
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "object_store_memory": 200_000_000,
        "_temp_dir": str(scratch),
        "_node_ip_address": "127.0.0.1",
    }


def _probe(address: str) -> None:
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=3):
                return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                raise ConnectionError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
            time.sleep(1)
