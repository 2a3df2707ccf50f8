"""The simulation behind the statistics, at small size, and what its committed result promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = BENCHMARKS / "evidence" / "verdict_simulation.py"
    spec = importlib.util.spec_from_file_location("verdict_simulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("luck", [0.0, 0.02])
@pytest.mark.parametrize("num_repeats", [1, 2, 3])
def test_a_base_that_is_no_better_is_rarely_taken(simulation, num_repeats, luck):
    judged = simulation.simulate(40, num_repeats, luck, situation="behind", trials=150)
    assert judged["false_take"] <= 0.05
    assert 0.91 <= judged["coverage"] <= 0.99  # six pairs of 150 comparisons


def test_a_base_that_is_better_is_taken(simulation):
    assert simulation.simulate(40, 5, 0.004, better=0.05, trials=20)["take"] > 0.9


def test_an_interrupted_simulation_continues(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "NUM_TASKS", (6,))
    monkeypatch.setattr(simulation, "LUCK", (0.004,))
    whole = simulation.run(tmp_path / "whole.json", trials=4)
    part = {**whole, "cells": whole["cells"][:3]}
    (tmp_path / "part.json").write_text(json.dumps(part), encoding="utf-8")
    assert simulation.run(tmp_path / "part.json", trials=4) == whole


def test_the_committed_simulation_takes_rarely_and_covers(simulation):
    result = json.loads(simulation.RESULT.read_text("utf-8"))
    assert [
        {key: row[key] for key in cell}
        for cell, row in zip(simulation.cells(), result["cells"], strict=True)
    ] == simulation.cells()
    assert all(row["false_take"] <= 0.05 for row in result["cells"])
    for row in result["cells"]:
        fewest = 0.88 if row["num_repeats"] == 2 else 0.92
        assert fewest <= row["coverage_worst"] <= row["coverage"] <= 0.985
