"""A running `repae serve`, and how another terminal talks to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tiny
import yaml

BUSY = 503  # Prefect's answer while another writer holds SQLite: its clients ask again
ROOT = Path(__file__).resolve().parents[1]


class Served(NamedTuple):
    """The environment of another terminal."""

    environment: dict[str, str]

    @property
    def api(self) -> str:
        return self.environment["PREFECT_API_URL"]

    def run(self, name: str, *parameters: str) -> subprocess.CompletedProcess[str]:
        """`prefect deployment run --watch`."""
        command = [sys.executable, "-m", "prefect", "deployment", "run", name, "--watch"]
        command += [part for parameter in parameters for part in ("-p", parameter)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=280)

    def ask(self, what: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        """Prefect's API."""
        request = urllib.request.Request(
            f"{self.api}/{what}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        for attempt in range(5):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    content = answer.read()
                return json.loads(content) if content else None
            except urllib.error.HTTPError as error:
                if error.code != BUSY or attempt == 4:
                    raise
                time.sleep(2)
        return None


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Start it as users do; in the end Ctrl-C must leave nothing."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "REPAE_", "RAY_"))}
    env = kept | {"REPAE_HOME": str(folder / "home"), "REPAE_STORE": str(folder / "store")}
    prefect_port, mlflow_port = str(free_port()), str(free_port())
    command = [sys.executable, "-m", "flows.cli", "serve", "--prefect-port", prefect_port, "--mlflow-port", mlflow_port]
    log = folder / "serve.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while "Ctrl-C ends all" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        api = {"PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api", "PREFECT_HOME": str(folder / "terminal")}
        yield Served(env | api)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, 5)
        assert not alive
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()


def overrides(images: Path, *more: str) -> dict[str, Any]:
    """The tiny pipeline as the parameter `overrides`."""
    nested: dict[str, Any] = {}
    for pair in (*tiny.overrides(images), *more):
        name, value = pair.split("=", 1)
        section, field = name.split(".")
        nested.setdefault(section, {})[field] = yaml.safe_load(value)
    return nested


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
