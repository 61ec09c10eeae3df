"""A step in a Ray worker against the same step in a plain process, and on two workers against one.

    python benchmarks/scaling.py                        # SiT-S/2 on a small VAE, 64 px, batch 8: about 5 minutes
    python benchmarks/scaling.py --stage ldm --steps 40
    python benchmarks/scaling.py --model SiT-B/2 --resolution 128 --batch 4 --vae f8d4 --steps 20

All groups are started first and then take their steps in turn, one at a time, so that what else the machine does hits
them alike; figures are medians. Every process has the same number of threads; two workers share the batch of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from engine import Case, Stepper, write_weights

GROUPS = {"plain process": 0, "Ray, 1 worker": 1, "Ray, 2 workers": 2}


def serve_steps(payload: dict[str, Any], report: Any = None) -> dict[str, Any]:
    """In each worker: connect, then one step whenever the benchmark asks for one."""
    import torch

    from repae_core.training.distributed import open_group
    from repae_core.training.host_memory import freed_memory_kept

    case = Case(**payload["case"])
    torch.set_num_threads(case.threads)
    group = open_group(use_gpu=case.device != "cpu")
    with freed_memory_kept():
        stepper = Stepper(
            case, group
        )  # before it connects: the parent takes one worker at a time, a group builds as one
        with Client(tuple(payload["address"]), authkey=bytes.fromhex(payload["key"])) as parent:
            parent.send((payload["group"], group.rank))
            while parent.recv():
                parent.send(stepper.timed_step())
    return {}


def ray_group(payload: dict[str, Any], workers: int) -> None:
    """In a driver process of its own: the launch that training stages use."""
    from tasks.ray_launch import launch
    from tasks.ray_session import RaySession

    session = RaySession()
    try:
        launch(
            serve_steps,
            payload,
            session=session,
            workers=workers,
            cpus_per_worker=1,
            max_failures=1,
            on_report=lambda message: None,
        )
    finally:
        session.close()


def connections(listener: Listener, expected: int) -> dict[str, list[Connection]]:
    """Every worker's connection, by group."""
    found: dict[str, list[Connection]] = {name: [] for name in GROUPS}
    for _ in range(expected):
        connection = listener.accept()
        group, _ = connection.recv()
        found[group].append(connection)
        print(f"  {group}: ready", flush=True)
    return found


def step_of(group: list[Connection]) -> float:
    """One step of all its workers at once; the slowest one's seconds."""
    for worker in group:
        worker.send(True)
    return max(worker.recv() for worker in group)


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("repae", "ldm"), default="repae")
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--vae", default="{base_channels: 32, norm_groups: 8}")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each group, after two that are not")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.driver:
        import json

        payload, workers = json.loads(chosen.driver[0]), int(chosen.driver[1])
        if workers:
            ray_group(payload, workers)
        else:
            serve_steps(payload)
        return
    with tempfile.TemporaryDirectory(prefix="repae-bench-") as scratch:
        sizes = {name: getattr(chosen, name) for name in ("stage", "model", "vae", "resolution", "batch", "threads")}
        case = Case(**sizes, weights=scratch)
        write_weights(Path(scratch), case.encoder)
        print(
            f"{case.stage}: {case.model}, {case.resolution} px, batch {case.batch}, {case.threads} thread(s) a process"
        )
        compare(case, chosen.steps)


def compare(case: Case, steps: int) -> None:
    """Start all groups, let them take turns, print."""
    import json

    key = secrets.token_bytes(16)
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        drivers = []
        for name, workers in GROUPS.items():
            payload = {"case": dataclasses.asdict(case), "address": listener.address, "key": key.hex(), "group": name}
            command = [sys.executable, __file__, "--driver", json.dumps(payload), str(workers)]
            here = os.path.dirname(os.path.abspath(__file__))
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
            drivers.append(subprocess.Popen(command, env=environment))
        stop = threading.Event()
        threading.Thread(target=_watch, args=(drivers, stop), daemon=True).start()
        groups = connections(listener, sum(max(workers, 1) for workers in GROUPS.values()))
        times: dict[str, list[float]] = {name: [] for name in groups}
        for _ in range(steps + 2):
            for name, group in groups.items():
                times[name].append(step_of(group))
        stop.set()
        for group in groups.values():
            for worker in group:
                worker.send(False)
        for driver in drivers:
            driver.wait()
    medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
    plain, one, two = (medians[name] for name in GROUPS)
    for name, seconds in medians.items():
        print(f"{name:16} {seconds * 1000:8.0f} ms a step")
    print(f"Ray worker / plain process   {one / plain:.3f}")
    print(f"2 workers / 1 worker         {two / one:.3f}   (speed-up {one / two:.2f})")


def _watch(drivers: list[subprocess.Popen[bytes]], stop: threading.Event) -> None:
    """A driver that fails would be waited for without end."""
    while not stop.wait(1.0):
        if any(driver.poll() for driver in drivers):
            print("a group failed: see above", file=sys.stderr)
            for driver in drivers:
                driver.terminate()
            os._exit(1)


if __name__ == "__main__":
    main()
