"""What a run records beside weights: cost, versions, machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from foretune.allocator import give_back_freed_memory
from foretune.processes import num_local_processes, num_processes

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


_open_peaks: ContextVar[tuple[list[float], ...]] = ContextVar("open_peaks", default=())


@contextlib.contextmanager
def metered() -> Iterator[dict[str, Any]]:
    """Yields a dict that is filled with the time and peak memory of the block when it ends.

    `seconds` is wall-clock time, `cpu_seconds` CPU time of the process. `peak_memory_mb` is the
    peak of the process's resident memory during the block (of the device's memory on CUDA), None
    where the system does not report it. Blocks may be nested.
    """
    cost: dict[str, Any] = {}
    outer = _open_peaks.get()
    _note_peak(outer)  # it is about to be reset
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    give_back_freed_memory()
    can_reset = _reset_peak()
    peaks: list[float] = []
    token = _open_peaks.set((*outer, peaks))
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cost["seconds"] = round(time.perf_counter() - wall, 3)
        cost["cpu_seconds"] = round(time.process_time() - cpu, 3)
        _note_peak((*outer, peaks))
        _open_peaks.reset(token)
        measured = peaks and (can_reset or torch.cuda.is_available())
        cost["peak_memory_mb"] = max(peaks) if measured else None


def _note_peak(open_peaks: Sequence[list[float]]) -> None:
    """Adds the peak since the last reset to those of the blocks that are open."""
    if not open_peaks:
        return
    cuda = torch.cuda.is_available()
    peak = round(torch.cuda.max_memory_allocated() / 2**20, 1) if cuda else _peak_mb()
    if peak is not None:
        for peaks in open_peaks:
            peaks.append(peak)


_open_counts: ContextVar[tuple[Counter[str], ...]] = ContextVar("open_counts", default=())


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yields the tokens and examples that go through a forward and a backward pass in the block.

    Whatever they serve: training, validation that adapts, or a trial that diverges.
    """
    counts: Counter[str] = Counter(tokens=0, examples=0)
    before = _open_counts.get()
    _open_counts.set((*before, counts))
    try:
        yield counts
    finally:
        _open_counts.set(before)


def count(tokens: int, examples: int) -> None:
    """Adds a backward pass to the counts of the blocks that it is in."""
    for counts in _open_counts.get():
        counts.update(tokens=tokens, examples=examples)


def free_memory(device: str | None) -> int:
    """Free memory, in bytes, of the device that a run with this `device` will use."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // num_local_processes()
    except OSError:
        pass  # not Linux
    return 8 * 2**30


def environment() -> dict[str, Any]:
    """Versions and machine, for run.json."""
    versions = {}
    for name in ("foretune", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "processes": num_processes(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _reset_peak() -> bool:
    """Asks Linux to reset the peak of the process's resident memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_mb() -> float | None:
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None
