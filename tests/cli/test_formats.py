"""Files of a recipe's run carry their format, and a newer one is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from command_line import call
from foretune import formats
from foretune.recipes.templates import template_text
from format_checks import assert_versions_by_command, newer

MODEL = """
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
"""
SMALL = [
    *("model.file=my_model.py", "model.args={width: 6}"),
    *("tasks.unseen=2", "retrain.methods=[none, standard]"),
    *("retrain.steps=2", "retrain.learning_rates=[1e-3]"),
    *("adapt.steps=2", "adapt.shots=[2]", "adapt.learning_rates=[1e-3]"),
    "spectrum={ranks: [1], shots: 2}",
]
RESUME = ("run", "my.yaml", *SMALL, "--out", "out", "--resume")
BASE = Path("out/bases/standard/seed-0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data and model, and the run of it, `out`."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 40, 4)).astype("f4")
    y = (x.sum(2) > 0).astype(int)
    task = np.repeat([f"t{i}" for i in range(5)], 40)
    np.savez(folder / "data.npz", task=task, x=x.reshape(-1, 4), y=y.reshape(-1))
    (folder / "my_model.py").write_text(MODEL)
    (folder / "my.yaml").write_text(template_text("arrays"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call("run", "my.yaml", *SMALL, "--out", "out")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "current"),
    [
        ("out/inputs.json", formats.INPUTS),
        (BASE / "stage.json", formats.STAGE),
        ("out/repeats/seed-0.json", formats.COMPARISON),
        ("out/spectrum.json", formats.SPECTRUM),
    ],
)
def test_files_of_stages(place: Path, file: str, current: str) -> None:
    assert_versions_by_command(place / file, current, *RESUME)


def test_comparison(place: Path) -> None:
    file = place / "out/comparison.json"
    assert_versions_by_command(file, formats.COMPARISON, "report", "out")
    record = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**record, "format": 1}), "utf-8")  # how it was first written
    assert call("report", "out").exit_code == 0


@pytest.mark.parametrize(
    ("file", "current"),
    [
        (BASE / "base/foretune.json", formats.BASE),
        (BASE / "base/foretune_module.json", formats.MODULE),
        (BASE / "run.json", formats.RUN),
    ],
)
def test_files_of_a_base(place: Path, file: Path, current: str) -> None:
    options = ("--tasks", "data.npz", "--out", "compared", "--shots", "2", "--overwrite")
    command = ("compare", BASE / "base", "out/bases/none/seed-0/base", "steps=1", *options)
    assert_versions_by_command(place / file, current, *command)


def test_recipe(place: Path) -> None:
    file = place / "out/config.yaml"
    text = file.read_text("utf-8")
    first = f"format: {formats.RECIPE}\n"
    assert text.startswith(first)
    file.write_text(text.replace(formats.RECIPE, newer(formats.RECIPE)), "utf-8")
    for command in (RESUME, ("plan", "out/config.yaml")):
        result = call(*command)
        assert result.exit_code == 2
        assert "config.yaml was written by a newer foretune" in result.stderr.splitlines()[-1]
    file.write_text(text.removeprefix(first), "utf-8")
    assert call(*RESUME).exit_code == 0


def test_a_run_from_before_formats_goes_on(place: Path) -> None:
    """None of its files has a format, the last repeat and one base are still to be made."""
    scores = json.loads((place / "out/comparison.json").read_text("utf-8"))["scores"]
    for file in (place / "out").rglob("*.json"):
        record = json.loads(file.read_text("utf-8"))
        if isinstance(record, dict):
            record.pop("format", None)
            file.write_text(json.dumps(record), "utf-8")
    config = place / "out/config.yaml"
    config.write_text(config.read_text("utf-8").partition("\n")[2], "utf-8")
    for name in ("comparison.json", "repeats/seed-0.json", "bases/standard/seed-0/stage.json"):
        (place / "out" / name).unlink()
    result = call(*RESUME)
    assert result.exit_code == 0, result.output
    again = json.loads((place / "out/comparison.json").read_text("utf-8"))
    assert again["scores"] == scores
    assert all("format" not in base for base in again["bases"])
