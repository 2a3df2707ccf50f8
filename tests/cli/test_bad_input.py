"""Every kind of bad input, through the command line as a user types it: one line, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import call

GOOD = [
    {"task": f"t{t}", "split": split, "text": f"{word} {i}", "label": word}
    for t in range(3)
    for split in ("train", "validation", "test")
    for i, word in enumerate(("cat", "dog"))
]
RECIPE = """
name: bad
model: {name: minilm}
tasks: {source: data.jsonl, unseen: 1}
objective: {kind: classification}
retrain: {methods: [none], steps: 2, learning_rate: 1e-4}
adapt: {method: lora, steps: 2, learning_rate: 1e-3, shots: [1]}
"""
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
"""


def run(*changes: str, code: int = 2) -> str:
    """The one line that `foretune run` says about this recipe."""
    result = call("run", "bad.yaml", *changes)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes rows (dicts, or raw lines) to data.jsonl beside the recipe."""
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(RECIPE)

    def lines(rows: list[dict | str], name: str = "data.jsonl") -> None:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        Path(name).write_text(text)

    return lines


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*GOOD, '{"task": "t0", '], ["data.jsonl", "19", "JSON"]),
        ([*GOOD, "[1, 2]"], ["data.jsonl", "19", "object"]),
        ([*GOOD, {"task": "t0", "text": "x"}], ["data.jsonl", "19", "label"]),
        ([*GOOD, {"task": "", "text": "x", "label": "cat"}], ["data.jsonl", "19", "task"]),
        ([*GOOD, {"task": "t0", "split": "dev2", "text": "x", "label": "cat"}], ["19", "dev2"]),
        ([*GOOD, {**GOOD[4], "label": "cow"}], ["t0", "cow", "training rows", "cat", "dog"]),
        ([r for r in GOOD if r["task"] == "t0"], ["unseen=1", "only one"]),
        ([r for r in GOOD if r["task"] != "t1" or r["split"] == "test"], ["t1", "no train"]),
        ([], ["data.jsonl", "empty"]),
    ],
    ids=["json", "object", "field", "name", "split", "label", "one task", "empty task", "empty"],
)
def test_bad_rows_have_their_own_error(write: Any, rows: list, says: list[str]) -> None:
    write(rows)
    line = run()
    for part in says:
        assert part in line


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"candidates": ["a", "b"], "answer": 2}, "outside the candidates: got answer=2"),
        ({"candidates": ["a"], "answer": 0}, "candidates"),
        ({"candidates": ["a", "b"]}, "answer"),
    ],
    ids=["outside", "single", "missing"],
)
def test_bad_candidates_are_named_by_file_and_line(write: Any, row: dict, says: str) -> None:
    write([{"task": "t0", "context": "hello", **row}])
    line = run("objective.kind=choice")
    assert says in line
    assert "data.jsonl" in line


def test_a_task_in_both_groups(write: Any) -> None:
    write(GOOD)
    write(GOOD[:6], "new.jsonl")
    line = run("tasks.unseen=new.jsonl")
    assert "t0" in line
    assert "both" in line


def test_unseen_names_that_are_not_there(write: Any) -> None:
    write(GOOD)
    assert 'Did you mean "t1"?' in run("tasks.unseen=[t1x]")


def test_a_model_folder_that_is_no_model(write: Any) -> None:
    write(GOOD)
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("no model")
    line = run("model.name=./folder")
    assert "notes.txt" in line
    assert "config.json" in line


def arrays() -> None:
    """Data and a model of the user's own, so that training itself can fail."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    np.savez("data.npz", task=np.repeat(["a", "b", "c"], 20), x=x, y=(x[:, 0] > 0).astype(int))
    Path("my_model.py").write_text(MODEL)
    old = "model: {name: minilm}\ntasks: {source: data.jsonl"
    new = "model: {file: my_model.py}\ntasks: {source: data.npz"
    Path("bad.yaml").write_text(RECIPE.replace(old, new))


def test_target_modules_that_match_nothing(write: Any) -> None:
    arrays()
    line = run("retrain.methods=[{peft-ml: {lora: {target_modules: [q_proj]}}}]")
    assert "no module matches target_modules='q_proj'" in line
    assert "Sequential has: 0, 2" in line


def test_a_loss_that_is_no_number(write: Any) -> None:
    arrays()
    line = run(
        "retrain.methods=[standard]", "retrain.learning_rate=1e30", "retrain.steps=9", code=1
    )
    assert "step" in line
    assert "lower learning_rate" in line


def test_unknown_fields_of_a_method(write: Any) -> None:
    arrays()
    line = run("retrain.methods=[{peft-ml: {adapter_learning_rat: 1}}]")
    assert 'Did you mean "adapter_learning_rate"?' in line
