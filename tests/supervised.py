"""A training stage in a driver process of its own, with real Ray workers: start it, watch it, find its processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tiny

SCRIPT = """
import importlib, json, sys
import tiny
import tasks.training as training
from tasks.pipeline_run import open_run

stage, source, store, reports, *sets = sys.argv[1:]
module = importlib.import_module("tasks." + stage.replace("-", "_"))
relay = training.relay

def noted(context, message):
    with open(reports, "a") as file:
        file.write(json.dumps({"step": message["step"], "restored": bool(message["history"])}) + chr(10))
    relay(context, message)

training.relay = noted
with open_run(tiny.config(source, store, *sets), kind=stage) as run:
    getattr(module, stage.replace("-", "_")).fn(run)
"""


def hear_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: CI may be such a job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process whose REPAE_HOME that is: what a run started inherits it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("REPAE_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Driver:
    """One stage's run, started as often as need be.

    home: its REPAE_HOME; every process of it is known by that. reports: what the workers said of their position.
    """

    def __init__(self, stage: str, source: Path, store: str, home: Path, *sets: str, **variables: str) -> None:
        self.arguments = [stage, str(source), store, str(home.parent / f"{home.name}.reports"), *sets]
        self.home, self.variables = home, variables
        self.log = home.parent / f"{home.name}.log"
        self.process: subprocess.Popen[bytes]
        home.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """A new driver process."""
        paths = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
        variables = os.environ | self.variables | {"PYTHONPATH": paths, "REPAE_HOME": str(self.home)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *self.arguments],
                env=variables,
                stdout=log,
                stderr=log,
                preexec_fn=hear_interrupts,
            )

    def run(self, seconds: float) -> float:
        """Start it and wait for its good end, at most so long; seconds it took."""
        began = time.monotonic()
        self.start()
        assert self.process.wait(timeout=seconds) == 0, self.log.read_text()[-3000:]
        return time.monotonic() - began

    def reports(self) -> list[dict[str, Any]]:
        """Every report that a driver has got so far."""
        path = Path(self.arguments[3])
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        """The furthest step reported."""
        return max((report["step"] for report in self.reports()), default=0)

    def processes(self) -> list[psutil.Process]:
        """Every process that works, or was left behind, in this home."""
        return processes_of(self.home)

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers among them."""
        return [p for p in self.processes() if "ray::RayTrainWorker" in _command(p)]

    def left_after(self, seconds: float) -> list[str]:
        """Command lines of what is still there when all should be gone."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [_command(process) for process in left]

    def end(self) -> None:
        """Kill everything: for the end of a failed test."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
