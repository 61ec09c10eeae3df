"""Where a process id means the same process: one boot of one machine, one PID namespace (a container has its own)."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def boot_id() -> str:
    """Names the time since this machine was started."""
    return _BOOT.read_text().strip() if _BOOT.exists() else f"{psutil.boot_time():.0f} {platform.node()}"


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether the process runs; one that its parent has not asked about yet does not. started: Unix time, else any."""
    try:
        process = psutil.Process(pid)
        same = started is None or abs(process.create_time() - started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_namespace() -> str:
    """Names what this process's id counts in; empty where there is only one."""
    return os.readlink(_NAMESPACE).strip("pid:[]") if _NAMESPACE.exists() else ""
