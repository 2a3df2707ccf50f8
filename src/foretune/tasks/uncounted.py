"""The library `datasets` without its count of who loads what."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Inside the block `datasets` reports nothing to its counter, as it does for local data too."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before
