"""What frozen layers read: each text goes through them once, then its states are looked up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass
class Reading:
    """What frozen layers have read in a block.

    Args:
        asked: Texts whose states were asked for, each as often as it was.
        computed: Texts that went through the layers, with those that fill up a batch.
        seconds: The time that this took.
    """

    asked: int = 0
    computed: int = 0
    seconds: float = 0.0

    def seconds_per_text(self) -> float:
        """Mean time of a text; 0 where none was read."""
        return self.seconds / self.computed if self.computed else 0.0


_OPEN: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextlib.contextmanager
def metered_reading() -> Iterator[Reading]:
    """Yields what frozen layers have read since the beginning of the block."""
    reading = Reading()
    token = _OPEN.set(reading)
    try:
        yield reading
    finally:
        _OPEN.reset(token)


def note_asked(texts: int) -> None:
    """Counts texts whose states are asked for."""
    reading = _OPEN.get()
    if reading is not None:
        reading.asked += texts


@contextlib.contextmanager
def note_computed(texts: int, device: torch.device) -> Iterator[None]:
    """Counts texts that go through frozen layers in the block, and its time."""
    reading = _OPEN.get()
    if reading is None:
        yield
        return
    start = _now(device)
    yield
    reading.computed += texts
    reading.seconds += _now(device) - start


def _now(device: torch.device) -> float:
    """The time when the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
