"""One worker function on Ray Train; only the `ray_*` files import Ray.

A pipeline run has one `RaySession`, opened on first use. Workers report through a mailbox actor that the
driver reads while it waits, so that only the driver talks to MLflow, Prefect and the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

from repae_core.artifacts import StoreError
from tasks.ray_answer import Answer, answer_of
from tasks.ray_session import RaySession, on_this_machine

Report = Callable[[dict[str, Any]], None]
Worker = Callable[[dict[str, Any], Report], dict[str, Any]]  # (payload, report) -> result of rank 0

logger = logging.getLogger("repae")

_FINAL = "final_error"  # key of a worker's message that no restart would help
_LOGGED = "logged_error"  # key of a line for the driver's log
_POLL_SECONDS = 0.2
_MAILBOX_SECONDS = 30.0
_LAST_LOOKS = 3  # into the mailbox when the workers have ended: what it holds then is delivered now or never
_COLLECTIVE_SECONDS = 300  # gloo and NCCL; longer than a store may be away, shorter than torch's half hour


class WorkersFailedError(RuntimeError):
    """The workers failed more often than allowed; the message is the first line of the cause."""


class FinalError(RuntimeError):
    """Raised by a worker for what no restart would mend; `launch` raises it in the driver at once."""


class ReportFailedError(RuntimeError):
    """What the driver does with a worker's report went wrong; the cause says how."""


class FinalInputError(FinalError, ValueError):
    """The same where the input is at fault: the user's to mend."""


class FinalStoreError(FinalError, StoreError):
    """The same where the store stays away: another attempt may find it again."""


_FINAL_KINDS = {kind.__name__: kind for kind in (FinalError, FinalInputError, FinalStoreError)}


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
        ValueError: a private cluster has not the GPUs.
    """
    if workers == 0:
        return worker(payload, on_report)
    failures, reached = 0, position()
    while True:
        session.connect(workers * cpus_per_worker)
        session.require_room(workers, cpus_per_worker, gpus_per_worker)
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
    """One `fit()`, in a Ray task: a thread of this process would still be inside Ray when a cancel shuts it down, and
    Ray then ends the process. FinalError when a worker raised it.
    """
    import ray

    # Restarted where its machine is lost: `fit` alone decides whether the workers have failed.
    mailbox: Any = cast(Any, ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox)).remote()
    deliveries = _Deliveries(mailbox, on_report)
    config = {"worker": worker, "payload": payload, "mailbox": mailbox, "folder": os.getcwd()}
    with tempfile.TemporaryDirectory(prefix="repae-ray-", ignore_cleanup_errors=True) as scratch:
        fit = on_this_machine(_run_trainer).remote(config, scratch, workers=workers, cpus=cpus, gpus=gpus)
        fitted = Answer(fit)
        try:
            while not fitted.here(_POLL_SECONDS):
                deliveries.look()
            deliveries.look(_LAST_LOOKS)
            return cast(dict[str, Any], fitted.value())
        except ReportFailedError:
            raise
        except Exception as error:
            deliveries.look(_LAST_LOOKS)  # the cluster may be gone
            if deliveries.final:
                raise deliveries.final[0] from error
            raise
        finally:
            with contextlib.suppress(Exception):
                ray.kill(mailbox)


class _Deliveries:
    """The driver's side of the mailbox: reports go to `on_report`, what a worker says of its end is kept or logged."""

    def __init__(self, mailbox: Any, on_report: Report) -> None:
        self.final: list[FinalError] = []
        self._mailbox, self._on_report, self._received = mailbox, on_report, ""

    def look(self, attempts: int = 1) -> None:
        """A look that fails is made again later, the last one at once; a lost mailbox ends no training."""
        import ray

        for _ in range(attempts):
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                self._deliver()
                return
            time.sleep(_POLL_SECONDS)

    def _deliver(self) -> None:
        self._received, messages = answer_of(self._mailbox.read.remote(self._received), _MAILBOX_SECONDS)
        for message in messages:
            if _FINAL in message:
                self.final.append(_FINAL_KINDS.get(message["kind"], FinalError)(message[_FINAL]))
            elif _LOGGED in message:
                logger.error(message[_LOGGED])
            else:
                try:
                    self._on_report(message)
                except Exception as error:
                    raise ReportFailedError(str(error)) from error


def preempted() -> bool:
    """In a worker: whether Ray announces that one of the group's machines is taken away; all ranks must ask."""
    import ray.train

    return ray.train.get_preemption_info() is not None


class _Mailbox:
    """Messages from the workers, kept until the driver has them: an answer that does not arrive is given again."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.answer, self.answered = "", 0  # name of the last answer, messages in it

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def read(self, received: str) -> tuple[str, list[dict[str, Any]]]:
        """This answer's name and messages; those of the answer that the driver says it has received are dropped."""
        if received == self.answer:
            del self.messages[: self.answered]
        self.answer, self.answered = uuid.uuid4().hex, len(self.messages)
        return self.answer, self.messages


def _run_trainer(loop_config: dict[str, Any], scratch: str, *, workers: int, cpus: int, gpus: int) -> dict[str, Any]:
    """Runs in a Ray task beside the driver."""
    try:
        return dict(_trainer(loop_config, scratch, workers=workers, cpus=cpus, gpus=gpus).fit().return_value)
    except Exception as error:  # Ray's own exceptions do not survive the way to the driver
        raise WorkersFailedError(root_cause(error)) from error


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
        # are `launch`'s: Ray counts failures in total, not since the last checkpoint, and those of workers that do
        # not start (the controller's, without limit by default) not at all.
        run_config=cast(Any, RunConfig)(
            name=f"repae-{uuid.uuid4().hex[:12]}",
            storage_path=scratch,
            failure_config=cast(Any, FailureConfig)(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray worker."""
    import ray
    import ray.train

    with contextlib.suppress(OSError):  # on the driver's machine relative paths of a config mean the same
        os.chdir(config["folder"])
    put = config["mailbox"].put.remote
    errors = _ErrorsToDriver(ray.train.get_context().get_world_rank(), put)
    for name in ("repae", "repae_core"):
        logging.getLogger(name).addHandler(errors)
    try:
        result: dict[str, Any] = config["worker"](config["payload"], put)
    except FinalError as error:
        answer_of(put({_FINAL: str(error), "kind": type(error).__name__}), _MAILBOX_SECONDS)
        raise
    return result


class _ErrorsToDriver(logging.Handler):
    """A worker's errors also in the driver's log: a process that the watchdog ends leaves no file."""

    def __init__(self, rank: int, put: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(logging.ERROR)
        self._rank, self._put = rank, put

    def emit(self, record: logging.LogRecord) -> None:
        self._put({_LOGGED: f"worker {self._rank}: {record.getMessage()}"})


def root_cause(error: BaseException) -> str:
    """The first line of what went wrong in the first failed worker."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    while (nested := _wrapped(error)) is not None and nested is not error:
        error = nested
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _wrapped(error: BaseException) -> BaseException | None:
    """What Ray, Ray Train's controller or its worker wrapped (whose messages are whole tracebacks), or the cause."""
    for name in ("cause", "controller_failure", "_base_exc", "__cause__"):
        if isinstance(nested := getattr(error, name, None), BaseException):
            return nested
    return None
