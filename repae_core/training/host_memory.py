"""The C allocator of a process that trains on its CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps freed memory for the next allocation; elsewhere (musl, macOS) nothing changes.

    It returns large blocks to the system by default, which hands them out again page by page, zeroed: a sixth of a
    VAE step's time. A process that was started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gets them in pages of 2 MiB
    where the kernel has them: 2 % of a VAE step, and less memory (`benchmarks/step.py` measures both against neither).
    """
    libc: Any = None
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_ARENA_MAX, 1)
    try:
        yield
    finally:
        with suppress(AttributeError):
            for option, value in _DEFAULTS.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)
