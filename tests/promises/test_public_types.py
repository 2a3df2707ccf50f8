"""The public names have static types, although they are imported on first use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import foretune

ROOT = Path(__file__).parents[2]
USER_FILE = """
import foretune

foretune.PEFTML(learning_rat=3)
foretune.Run(steps="many")
reveal_type(foretune.Run().steps)
reveal_type(foretune.PEFTML())
reveal_type(foretune.retrain)
model, _ = foretune.load_model("minilm")
tasks, _ = foretune.load_tasks(foretune.Source(source="tasks.jsonl"), "choice")
reveal_type(foretune.retrain(model, tasks, foretune.PEFTML()))
reveal_type(foretune.adapt(model, tasks, foretune.LoRA()).scores)
foretune.retrain(model, tasks, foretune.LoRA())
foretune.adapt(model, tasks, foretune.PEFTML())
reveal_type(foretune.fuse(model, {}, foretune.SMILE()))
reveal_type(foretune.prune(model, [], foretune.UNCURL()))
"""
EXPECTED = (
    (4, 'Unexpected keyword argument "learning_rat" for "PEFTML"'),
    (5, 'Argument "steps" to "Run" has incompatible type "str"; expected "int"'),
    (6, 'Revealed type is "int"'),
    (7, "foretune.methods.peft_ml.PEFTML"),
    (8, "foretune.training.methods.RetrainMethod"),
    (11, "foretune.training.outcome.Outcome"),
    (12, "dict[tuple[str, int], float]"),
    (13, 'Argument 3 to "retrain" has incompatible type "LoRA"; expected "RetrainMethod"'),
    (14, 'Argument 3 to "adapt" has incompatible type "PEFTML"; expected "AdaptMethod'),
    (15, "foretune.fusion.fused.Fused"),
    (16, "foretune.pruning.pruned.Pruned"),
)


def test_the_stub_lists_the_public_names_and_where_they_are():
    stub = (ROOT / "src/foretune/__init__.pyi").read_text("utf-8")
    imports = re.findall(r"^from (\S+) import (\w+) as (\w+)$", stub, re.MULTILINE)
    assert {name: module for module, name, alias in imports if name == alias} == foretune._PUBLIC
    assert len(imports) == len(foretune._PUBLIC)


@pytest.fixture(scope="module")
def lines_of_mypy(tmp_path_factory):
    file = tmp_path_factory.mktemp("user") / "user.py"
    file.write_text(USER_FILE)
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = re.findall(r"user\.py:(\d+): (?:error|note): (.*)", done.stdout)
    return [(int(number), message) for number, message in found]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "message"), EXPECTED)
def test_mypy_sees_types_through_the_package(lines_of_mypy, number, message):
    said = [text for line, text in lines_of_mypy if line == number]
    assert any(message in text for text in said), said


@pytest.mark.slow
def test_mypy_refuses_nothing_else(lines_of_mypy):
    assert {line for line, _ in lines_of_mypy} == {line for line, _ in EXPECTED}
