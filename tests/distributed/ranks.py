"""Processes that form a gloo group without Ray, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

# Without the interpreter's end, in which torch's gloo threads abort the process once in hundreds of times.
_LEAVE = "\nimport os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)\n"


def start_ranks(script: str, world: int, *arguments: str, log: Path | None = None) -> list[subprocess.Popen]:
    """`python -c script arguments...` as `world` ranks of one group; a single one stands alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(world):
        extra = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        } if world > 1 else {}  # fmt: skip
        environment = (
            os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | extra
        )
        program = [sys.executable, "-c", script + _LEAVE, *arguments]
        errors = log.open("ab") if log else None
        processes.append(subprocess.Popen(program, env=environment, stderr=errors))
    return processes


def run_ranks(script: str, world: int, *arguments: str) -> None:
    """The same, until all have ended well."""
    assert [p.wait(timeout=280) for p in start_ranks(script, world, *arguments)] == [0] * world
