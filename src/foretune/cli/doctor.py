"""`foretune doctor`: is this machine ready, and what would make it so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import foretune
from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table
from foretune.models.named import WHEELS

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 11)  # that tests run on
HUB = "huggingface.co"
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 2, 2


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: What was checked.
        value: What it is on this machine; "found" in the table and in JSON.
        state: "ok", "note" (works, with a limitation) or "fix" (must be fixed first).
        advice: What to do about it.
    """

    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def doctor(json: Json = False) -> None:
    """Check this machine and say what to fix."""
    with quiet_stdout():
        checks = [check for run_checks in CHECKS for check in run_checks()]
    bad = any(check.state == "fix" for check in checks)
    if json:
        records = [
            {"name": c.name, "found": c.value, "state": c.state, "advice": c.advice} for c in checks
        ]
        emit_json({"ready": not bad, "checks": records})
    else:
        emit(table(["", "check", "found"], [[c.state, c.name, c.value] for c in checks]))
        advice = [f"{c.name}: {c.advice}" for c in checks if c.advice]
        emit("\n" + ("\n".join(advice) if advice else "Nothing to fix."))
    if bad:
        _fail()


def _fail() -> NoReturn:
    raise typer.Exit(1)


def _versions() -> list[Check]:
    return [_python(sys.version_info[:2]), Check("foretune", foretune.__version__), *_libraries()]


def _python(version: tuple[int, ...]) -> Check:
    shown = platform.python_version()
    if version < OLDEST_PYTHON:
        return Check("python", shown, "fix", "use Python 3.11")
    if version > NEWEST_PYTHON:
        return Check("python", shown, "note", "newer than tested; if something fails: Python 3.11")
    return Check("python", shown)


def _libraries() -> list[Check]:
    """Whether each dependency, and each installed dependency of an extra, has a tested version.

    The oldest tested versions are foretune's lower bounds, the newest are written by `make lock`.
    """
    try:
        required = importlib.metadata.requires("foretune") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        required = []
    requirements = {canonicalize_name(r.name): r for r in map(Requirement, required)}
    lines = (resources.files(__package__) / "tested.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    checks = [
        _library(requirements[canonicalize_name(name)], newest)
        for name, newest in pins
        if canonicalize_name(name) in requirements
    ]
    return [check for check in checks if check]


def _library(requirement: Requirement, newest: str) -> Check | None:
    """Compares the installed version with those tested; None for a missing one of an extra."""
    name = requirement.name
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if requirement.marker is not None:
            return None
        return Check(name, "missing", "fix", f"pip install {name}")
    release = Version(Version(installed).base_version)  # 2.13.0 of 2.13.0+cpu
    if release not in requirement.specifier:
        advice = f"older than tested: pip install '{name}{requirement.specifier}'"
        return Check(name, installed, "fix", advice)
    if release > Version(newest):
        advice = f"newer than tested; if something fails: pip install {name}=={newest}"
        return Check(name, installed, "note", advice)
    return Check(name, installed)


def _device() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("device", "torch does not import", "fix", f"reinstall torch ({error})")]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        value = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        bf16 = torch.cuda.is_bf16_supported()
        checks = [Check("device", value), Check("bf16", "yes" if bf16 else "no")]
    else:
        checks = [Check("device", "cpu, no CUDA device", "note")]
    threads, cores = torch.get_num_threads(), _cores()
    many = threads > cores
    advice = (
        f"set OMP_NUM_THREADS={cores}: more threads than cores slow one another" if many else ""
    )
    checks.append(Check("threads", f"{threads} of {cores} cores", "note" if many else "ok", advice))
    return checks


def _memory() -> list[Check]:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return []
    try:  # includes what the system frees on demand
        with Path("/proc/meminfo").open() as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(available.split()[1]) / 2**20
    except (OSError, StopIteration):
        pass
    little = free < LITTLE_MEMORY_GB
    advice = "the quickstart needs 2 GB: close other programs" if little else ""
    return [Check("memory", f"{free:.1f} GB free", "note" if little else "ok", advice)]


def _disk() -> list[Check]:
    free = shutil.disk_usage(".").free / 2**30
    little = free < LITTLE_DISK_GB
    advice = "free some disk space, or give --out on another disk" if little else ""
    return [Check("disk", f"{free:.1f} GB free here", "note" if little else "ok", advice)]


def _models() -> list[Check]:
    return [
        Check(name, "installed")
        if importlib.util.find_spec(wheel.package) is not None
        else Check(name, "missing", "note", f"{wheel.install} ({wheel.use})")
        for name, wheel in WHEELS.items()
    ]


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
    _models,
    _hub,
)
