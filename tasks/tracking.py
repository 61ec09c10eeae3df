"""MLflow: the only file that imports it. One parent run a pipeline run, one child a stage.

The driver creates the schema and every run before any worker starts, and is the only process that writes:
SQLite with several writers that create it at once does not survive. What a stage logs while it works goes through
`live_log`, so that an MLflow that is slow or away delays no step and ends no run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from repae_core.artifacts import Artifact
from repae_core.config.environment import repae_home
from tasks.live_log import LiveLog
from tasks.outbox import PROGRAMMING_ERRORS

logger = logging.getLogger("repae")

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",
    "GIT_PYTHON_REFRESH": "quiet",
}
_LAST_SECONDS = 60.0  # for what is still to be sent when a stage ends
_CLOSING_SECONDS = 10.0  # the same when all was delivered before, or the stage failed
_CANCELLED_SECONDS = 2.0  # a cancelled run must be gone within 15 s
_NOTE_SECONDS = 1.0  # the same


def _tracking_uri() -> str:
    """As given, credentials and all."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repae_home() / 'mlflow.db'}"


def tracking_uri() -> str:
    """Where runs are tracked: MLFLOW_TRACKING_URI or the database in REPAE_HOME, without credentials."""
    return _without_credentials(_tracking_uri())


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _client_uri() -> str:
    """For MLflow's client, which repeats it in its errors: a server's user and password go by their own variables."""
    uri = _tracking_uri()
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.username is None:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return _without_credentials(uri)


class Tracker:
    """One pipeline run in MLflow."""

    def __init__(self, experiment: str) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        for repetitive in ("mlflow.system_metrics", "urllib3.connectionpool"):  # a line a try while MLflow is away
            logging.getLogger(repetitive).setLevel(logging.ERROR)
        self._mlflow = mlflow
        self.metric = mlflow.entities.Metric
        home, self.uri = repae_home(), _client_uri()
        embedded = self.uri.startswith("sqlite:")
        try:
            # Not `set_tracking_uri`: it is for the whole process, and writes the environment that we read it from.
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                location = (home / "mlartifacts").as_uri() if embedded else None
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=location)
            else:
                self.experiment_id = found.experiment_id
        except mlflow.exceptions.MlflowException as error:
            reason = " ".join(str(error).split())[:200]
            raise ConnectionError(f"MLflow at {self.display_uri}: {reason}") from None
        self.parent_id: str | None = None

    @property
    def display_uri(self) -> str:
        """The tracking URI without credentials."""
        return _without_credentials(self.uri)

    @contextlib.contextmanager
    def pipeline_run(self, name: str, config: Mapping[str, Any]) -> Iterator[str]:
        """The parent run; FAILED or KILLED when left by an exception."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags={"repae.kind": "pipeline"})
        self.parent_id = run.info.run_id
        self.client.log_dict(self.parent_id, dict(config), "config.json")
        with self._closing(self.parent_id):
            yield self.parent_id

    @contextlib.contextmanager
    def stage_run(self, stage: str, artifact: Artifact, resume_id: str | None) -> Iterator[StageRun]:
        """A stage's child run with system metrics; `resume_id` continues the run of a stopped attempt."""
        if resume_id is None or not self._usable(resume_id):
            tags = {"repae.kind": "stage", "repae.stage": stage, "repae.artifact": artifact.uri}
            if self.parent_id:
                tags["mlflow.parentRunId"] = self.parent_id
            resume_id = self.client.create_run(self.experiment_id, run_name=stage, tags=tags).info.run_id
        else:
            self.client.update_run(resume_id, status="RUNNING")
        monitor = self._system_metrics(resume_id)
        run = StageRun(self, resume_id)
        try:
            with self._closing(resume_id), _emptied(run):
                yield run
        except BaseException as error:
            self._note(monitor.finish, hurried=not isinstance(error, Exception))
            raise
        self._note(monitor.finish)

    def link_skipped(self, stage: str, mlflow_run_id: str | None, uri: str) -> None:
        """Note on the parent which earlier run made a skipped stage; that one is over, whatever ended its process."""
        if parent := self.parent_id:
            made_by = f"{mlflow_run_id or '-'} {uri}"
            self._note(lambda: self.client.set_tag(parent, f"repae.skipped.{stage}", made_by))
        if mlflow_run_id is not None:
            self._finish(mlflow_run_id)

    def _finish(self, run_id: str) -> None:
        with contextlib.suppress(self._mlflow.exceptions.MlflowException):  # tracked elsewhere
            if self.client.get_run(run_id).info.status == "RUNNING":
                self.client.set_terminated(run_id, "FINISHED")

    def describe(self, markdown: str, *, hurried: bool = False) -> None:
        """The parent run's description; hurried: of a cancelled run."""
        if parent := self.parent_id:
            self._note(lambda: self.client.set_tag(parent, "mlflow.note.content", markdown), hurried=hurried)

    def register_model(self, run_id: str, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]) -> str:
        """Upload a model's files (safetensors, JSON) to the run and register them; returns `models:/name/version`.

        Once a run and tags: an attempt that died before its stage was whole has registered them already.
        """
        folder = name.rpartition("-")[2]
        for file, data in files.items():
            self._log_bytes(run_id, data, folder, file)
        with contextlib.suppress(self._mlflow.exceptions.MlflowException):
            self.client.create_registered_model(name)
        found = self.client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        version = next((v for v in found if tags.items() <= v.tags.items()), None) or self.client.create_model_version(
            name, source=f"runs:/{run_id}/{folder}", run_id=run_id, tags=dict(tags)
        )
        self.client.set_registered_model_alias(name, "latest-run", version.version)
        return f"models:/{name}/{version.version}"

    def registered_artifacts(self) -> set[str]:
        """URIs of the artifacts behind all registered model versions, whatever the models are called by now."""
        found: set[str] = set()
        token = None
        while True:
            page = self.client.search_model_versions(page_token=token)
            found |= {version.tags["artifact"] for version in page if "artifact" in version.tags}
            token = page.token
            if not token:
                return found

    def _log_bytes(self, run_id: str, data: bytes, folder: str, name: str) -> None:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            path.write_bytes(data)
            self.client.log_artifact(run_id, str(path), folder)

    def _usable(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except self._mlflow.exceptions.MlflowException:
            return False

    def _system_metrics(self, run_id: str) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    @contextlib.contextmanager
    def _closing(self, run_id: str) -> Iterator[None]:
        status = "KILLED"
        try:
            yield
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self._note(lambda: self.client.set_terminated(run_id, status), hurried=status == "KILLED")

    def _note(self, send: Callable[[], Any], *, hurried: bool = False) -> None:
        """What no result depends on, and must not replace the error that is under way: trouble with it is a warning.

        hurried: left alone after a second, as a cancelled run must be gone soon and MLflow may not answer.
        """

        def attempt() -> None:
            try:
                send()
            except (self._mlflow.exceptions.MlflowException, OSError) as error:
                logger.warning("%s: %s", self.display_uri, " ".join(str(error).split())[:200])

        if not hurried:
            attempt()
            return
        sender = threading.Thread(target=attempt, name="mlflow-note", daemon=True)
        sender.start()
        sender.join(_NOTE_SECONDS)


class StageRun(LiveLog):
    """A stage's MLflow run: what it logs live, parameters, tables, inputs and output."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        super().__init__(tracker.client, run_id, f"MLflow at {tracker.display_uri}", tracker.metric)
        self.tracker = tracker

    def deliver(self) -> None:
        """Wait, for a minute at most, until MLflow has what was logged so far."""
        self.flush(_LAST_SECONDS)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Every setting as a parameter (those not logged yet), and the whole as an artifact."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        flat = {k: str(v) for k, v in _flatten(config).items() if k not in known}
        self._client.log_batch(self.run_id, params=[Param(k, v) for k, v in flat.items()])
        self._client.log_dict(self.run_id, dict(config), "config.json")

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Final values, without a step."""
        for name, value in scores.items():
            self._client.log_metric(self.run_id, name, value)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Rows of equal keys as `{name}.json`, which MLflow shows and compares between runs."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        self._client.log_table(self.run_id, columns, f"{name}.json")

    def log_inputs(self, inputs: Mapping[str, str], output: str) -> None:
        """URIs of what the stage read, also as MLflow datasets, and of what it writes."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = []
        for role, uri in inputs.items():
            self._client.set_tag(self.run_id, f"repae.input.{role}", uri)
            name, digest = uri.rsplit("/", 2)[1:]
            scheme = uri.split("://")[0] if "://" in uri else "local"
            dataset = Dataset(name, digest, source_type=scheme, source=json.dumps({"uri": uri}))
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
        if datasets:
            self._client.log_inputs(self.run_id, datasets)
        self._client.set_tag(self.run_id, "repae.artifact", output)


@contextlib.contextmanager
def _emptied(run: StageRun) -> Iterator[None]:
    """What is still to be sent is sent when the block ends; trouble with it never hides what ended the block."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(*PROGRAMMING_ERRORS):
            run.close(_CLOSING_SECONDS if isinstance(error, Exception) else _CANCELLED_SECONDS)
        raise
    run.close(_CLOSING_SECONDS)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
