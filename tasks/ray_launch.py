"""One worker function on Ray Train; beside this file only `ray_side_task` imports Ray.

A pipeline run has one `RaySession`, opened on first use. Workers report through a mailbox actor that the
driver reads while it waits, so that only the driver talks to MLflow, Prefect and the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from repae_core.config.environment import repae_home
from tasks.interruptible import interruptible, signal_handlers_kept

Report = Callable[[dict[str, Any]], None]
Worker = Callable[[dict[str, Any], Report], dict[str, Any]]  # (payload, report) -> result of rank 0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a frozen process; Ray's default is ten minutes
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the training on a busy machine
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

logger = logging.getLogger("repae")

_PROBE_SECONDS = 10.0
_ANSWER_SECONDS = 30.0  # a busy machine takes seconds to start the process that answers
_FINAL = "final_error"  # key of a worker's message that no restart would help
_COLLECTIVE_SECONDS = 300  # gloo and NCCL; longer than a store may be away, shorter than torch's half hour
_HEAD_SECONDS = 120.0  # a restarted Ray head is waited for


class WorkersFailedError(RuntimeError):
    """The workers failed more often than allowed; the message is the first line of the cause."""


class FinalError(RuntimeError):
    """Raised by a worker for what no restart would mend; `launch` raises it in the driver at once."""


class ReportFailedError(RuntimeError):
    """What the driver does with a worker's report went wrong; the cause says how."""


class FinalInputError(FinalError, ValueError):
    """The same where the input is at fault: the user's to mend."""


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
        given = os.environ.get("RAY_ADDRESS")
        if given:
            _probe(given)
        else:
            # Else Ray takes the machine's address for 127.0.0.1, and then listens on every interface.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        with signal_handlers_kept():
            context: Any = ray.init(
                address=given,
                include_dashboard=None if given else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                namespace="repae",
                **({} if given else _private_cluster(cpus)),
            )
        self.address = context.address_info["address"]

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

            with signal_handlers_kept():
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
    max_failures: int = 1,
    on_report: Report,
    position: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Run `worker` on that many Ray Train workers (0: here, without Ray); returns rank 0's result.

    worker: importable module-level function; `payload` and reports are small JSON-able dicts.
    After a failure the group starts again and continues from its checkpoints; the `max_failures`-th failure without
    `position` (where the next start would continue) having moved on in between is the last. A cancel (anything that
    is no Exception) ends the workers before it goes on: what it meets on its way out may wait for the store. So does
    an error that `on_report` raises, which then goes on as it is.

    Raises:
        FinalError: a worker raised it.
        WorkersFailedError: the workers failed too often.
    """
    if workers == 0:
        return worker(payload, on_report)
    failures, reached = 0, position()
    while True:
        session.connect(workers * cpus_per_worker)
        try:
            return _fit(worker, payload, on_report, workers=workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
        except FinalError:
            raise
        except ReportFailedError as error:
            session.close()
            raise error.__cause__ or error from None
        except Exception as error:
            now = position()
            failures, reached = (failures if now == reached else 0) + 1, now
            if failures >= max_failures:
                raise WorkersFailedError(root_cause(error)) from error
            logger.warning("the workers failed (%s); starting again, failure %d of %d without a new checkpoint",
                           root_cause(error), failures, max_failures)  # fmt: skip
            session.recover()
        except BaseException:
            session.close()
            raise


def _fit(
    worker: Worker, payload: dict[str, Any], on_report: Report, *, workers: int, cpus: int, gpus: int
) -> dict[str, Any]:
    """One `fit()`; FinalError when a worker raised it."""
    import ray

    # Restarted where its machine is lost: `fit` alone decides whether the workers have failed.
    mailbox: Any = cast(Any, ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox)).remote()
    final: list[FinalError] = []

    def deliver() -> None:
        for message in ray.get(mailbox.drain.remote(), timeout=60):
            if _FINAL in message:
                final.append((FinalInputError if message["bad_input"] else FinalError)(message[_FINAL]))
                continue
            try:
                on_report(message)
            except Exception as error:
                raise ReportFailedError(str(error)) from error

    def deliver_if_possible() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # tried again; nothing but the live view depends on it
            deliver()

    with tempfile.TemporaryDirectory(prefix="repae-ray-", ignore_cleanup_errors=True) as scratch:
        trainer = _trainer(
            {"worker": worker, "payload": payload, "mailbox": mailbox, "folder": os.getcwd()},
            scratch,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
        )
        try:
            result = interruptible(trainer.fit, meanwhile=deliver_if_possible)
            deliver_if_possible()
        except ReportFailedError:
            raise
        except Exception as error:
            deliver_if_possible()  # the cluster may be gone
            if final:
                raise final[0] from error
            raise
        finally:
            with contextlib.suppress(Exception):
                ray.kill(mailbox)
    return dict(result.return_value)


def preempted() -> bool:
    """In a worker: whether Ray announces that one of the group's machines is taken away; all ranks must ask."""
    import ray.train

    return ray.train.get_preemption_info() is not None


def _answer() -> bool:
    return True


class _Mailbox:
    """Messages from the workers, kept until the driver takes them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        messages, self.messages = self.messages, []
        return messages


def _trainer(loop_config: dict[str, Any], scratch: str, *, workers: int, cpus: int, gpus: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    return TorchTrainer(
        cast(Any, _train_loop),
        train_loop_config=loop_config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        # A fresh name and scratch folder: our checkpoints decide where a run starts, never Ray's storage. Restarts
        # are `launch`'s: Ray counts failures in total, not since the last checkpoint.
        run_config=cast(Any, RunConfig)(
            name=f"repae-{uuid.uuid4().hex[:12]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray worker."""
    import ray

    with contextlib.suppress(OSError):  # on the driver's machine relative paths of a config mean the same
        os.chdir(config["folder"])
    put = config["mailbox"].put.remote
    try:
        result: dict[str, Any] = config["worker"](config["payload"], put)
    except FinalError as error:
        ray.get(put({_FINAL: str(error), "bad_input": isinstance(error, FinalInputError)}), timeout=30)
        raise
    return result


def root_cause(error: BaseException) -> str:
    """The line that says what went wrong in the first failed worker."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause = error
    while (nested := getattr(cause, "cause", None) or cause.__cause__) is not None and nested is not cause:
        cause = nested
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


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
