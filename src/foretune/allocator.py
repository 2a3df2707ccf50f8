"""What the process does with memory that it has freed (glibc; elsewhere nothing happens).

A training step frees its activations and asks for as much again in the next one. By default glibc
gives large blocks back to the system in between, which hands them out anew page by page: a step of
MiniLM took 1.2 to 1.7 times as long. A program that does nothing but train keeps them instead; a
library must not decide that for the process it lives in, so only the command line does.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h numbers them


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees, for its own next request."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Gives back now what is free, so that a peak of memory tells what was used since."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
