"""What the process does with memory that it has freed (glibc only; elsewhere a no-op).

A training step frees its activations and allocates as much again in the next one. By default glibc
returns large blocks to the operating system in between, which maps them again page by page: a step
of MiniLM took 1.2 to 1.7 times as long. A program that only trains keeps them instead; a library
must not decide that for its process, so only the command line does.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the values in malloc.h


def keep_freed_memory() -> None:
    """Make the process keep freed memory for its own later allocations, from now on."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return free memory to the operating system, so that peak memory measures later use only."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
