"""The libraries `datasets` and `evaluate` without their count of who loads what."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Inside the block these two, where they are imported, report nothing to their counters.

    Without it they report local data, too.
    """
    libraries: list[Any] = [sys.modules[n] for n in ("datasets", "evaluate") if n in sys.modules]
    before = [library.config.HF_UPDATE_DOWNLOAD_COUNTS for library in libraries]
    for library in libraries:
        library.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.config.HF_UPDATE_DOWNLOAD_COUNTS = value
