"""Time of the quick start's training steps by workers, threads and OpenMP policy, and the ratio to one thread.

    .venv/bin/python benchmarks/threads.py            # quiet machine
    .venv/bin/python benchmarks/threads.py --busy 1   # with one neighbour that keeps a core busy

The global batch is the same in every row; each figure is the median of a few steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.environment import THREADS_AND_MEMORY

if TYPE_CHECKING:
    from repae_core.artifacts import Artifact

POLICIES = {  # how idle threads wait
    "spin": {},  # OpenMP's default
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "repae": {name: THREADS_AND_MEMORY[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
}
CASES = [  # workers, threads of each, policy
    (1, 1, "repae"),
    (1, 2, "spin"),
    (1, 2, "passive"),
    (1, 2, "repae"),
    (2, 1, "repae"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Example: python benchmarks/threads.py --busy 1 --steps 5"
    )
    parser.add_argument("--steps", type=int, default=9, help="steps timed in each row (default 9)")
    parser.add_argument("--busy", type=int, default=0, help="busy neighbour processes (default 0)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        warm, joint = step_seconds(chosen.worker, chosen.steps)
        if os.environ.get("RANK", "0") == "0":
            print(warm, joint)
        return
    with tempfile.TemporaryDirectory() as store, neighbours(chosen.busy):
        preprocess(store)
        base: list[float] = []
        print(f"{'workers':>8} {'threads':>8} {'policy':>8} {'warm-up s':>10} {'joint s':>8} {'ratios':>12}")
        for workers, threads, policy in CASES:
            seconds = run_case(store, chosen.steps, workers, threads, policy)
            base = base or seconds
            ratios = " ".join(f"{s / b:6.2f}" for s, b in zip(seconds, base, strict=True))
            print(f"{workers:8} {threads:8} {policy:>8} {seconds[0]:10.3f} {seconds[1]:8.3f} {ratios:>12}", flush=True)


def run_case(store: str, steps: int, workers: int, threads: int, policy: str) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_NUM_THREADS": str(threads)} | POLICIES[policy]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(workers):
        ranks: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        extra = {k: str(v) for k, v in ranks.items()} if workers > 1 else {}
        command = [sys.executable, __file__, "--worker", store, "--steps", str(steps)]
        started.append(subprocess.Popen(command, env=environment | extra, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a worker failed: see above")
    return [float(value) for value in outputs[0].split()]


def preprocess(store: str) -> None:
    from repae_core.config import load_config
    from repae_core.data import open_source, preprocess_images

    section = load_config("quickstart", []).preprocess
    preprocess_images(
        open_source(section.source),
        artifact(store, "preprocess"),
        resolution=section.resolution,
        images_per_shard=5000,
        seed=0,
    )


def artifact(store: str, stage: str) -> Artifact:
    from repae_core.artifacts import Artifact, Store

    return Artifact(Store(store), stage, "0" * 16)


def step_seconds(store: str, steps: int) -> tuple[float, float]:
    import torch

    from repae_core.config import load_config
    from repae_core.data import ImageShards
    from repae_core.training.distributed import open_group
    from repae_core.training.joint_run import JointRun

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = load_config("quickstart", [])
    group = open_group()
    run = JointRun(config, ImageShards(artifact(store, "preprocess")), artifact(store, "train-repae"), group)
    medians = []
    for first in (0, config.train_repae.vae_warmup_steps):
        batches, times = run.batches(first), []
        for index in range(first, first + steps + 2):
            began = time.perf_counter()
            run.step(index, next(batches))
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times[2:]))
    group.barrier()
    group.accelerator.end_training()
    return medians[0], medians[1]


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
