"""The speed benchmarks run, agree with what they measure against, and their page is up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from warm import warm

SPEED = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"

# script, options, rows that it writes
SCRIPTS = [
    ("meta_step", [], 1),
    ("bound", [], 1),
    ("ragged", [], 1),
    ("memory", [], 4),
    ("quantised", [], 4),
    ("adaptation", [], 3),
    ("many_tasks", ["--methods", "lora"], 2),
    ("search", ["--cases", "tower"], 2),
    ("bank", [], 2),
    ("heads", [], 2),
    ("rtd", [], 5),
    ("gpu", ["--device", "cpu"], 16),
    ("large_shapes", [], 6),
    ("forecast", [], 2),
]


@pytest.fixture(scope="module")
def python():
    with warm({**os.environ, "PYTHONWARNINGS": "ignore"}) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "rows"), SCRIPTS)
def test_a_benchmark_runs(name, options, rows, tmp_path, python):
    command = [str(SPEED / f"{name}.py"), "--quick", *options]
    command += ["--repeats", "1", "--out", str(tmp_path)]
    python.run(command, tmp_path).check_returncode()
    data = json.loads((tmp_path / f"speed-{name.replace('_', '-')}.json").read_text("utf-8"))
    assert len(data["rows"]) == rows
    assert not any("not_run" in row for row in data["rows"])
    if name == "meta_step":
        assert data["rows"][0]["gradient_error"] < 1e-5
    again = python.run(command, tmp_path)
    assert (again.returncode, again.stdout) == (0, "")  # nothing is measured twice


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_ends_itself(tmp_path):
    command = [sys.executable, "-W", "ignore", str(SPEED / "gpu.py"), "--quick", "--device", "cpu"]
    command += ["--minutes", "0.001", "--out", str(tmp_path)]
    ended = subprocess.run(command, check=True, capture_output=True)
    assert b"minutes are over; run it again for what is missing" in ended.stdout


def test_the_page_is_made_from_the_results():
    command = [sys.executable, str(SPEED / "page.py"), "--check"]
    subprocess.run(command, check=True, capture_output=True, text=True)
