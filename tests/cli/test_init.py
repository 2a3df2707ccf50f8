"""`foretune init --data`: a recipe that fits the rows at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import call, the_error, the_json
from foretune.recipes.schema import load_recipe

ROWS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "choice": {"context": "a", "candidates": ["b", "c"], "answer": 0},
    "classification": {"text": "a", "label": "b"},
    "causal-lm": {"prompt": "a", "completion": "b"},
}


def write(file: Path, row: dict[str, Any], num_tasks: int = 12, per_task: int = 30) -> Path:
    rows = [{"task": f"t{t}", **row} for t in range(num_tasks) for _ in range(per_task)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("template", ROWS)
def test_the_template_and_the_numbers_fit_the_rows(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), ROWS[template])
    result = the_json("init", "mine.yaml", "--data", "rows.jsonl")
    assert result["template"] == template and result["num_tasks"] == 12
    recipe = load_recipe("mine.yaml")
    assert recipe.tasks.source == "rows.jsonl" and recipe.tasks.unseen == 6
    assert recipe.adapt.shots == [4, 16] and recipe.name == "mine"
    shown = call("init", "again.yaml", "--data", "rows.jsonl").stdout
    assert "12 tasks by task, 30 rows each" in shown and "foretune plan again.yaml" in shown


def test_arrays_and_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = np.repeat([f"d{i}" for i in range(40)], 8)
    np.savez("data.npz", task=task, x=np.zeros((320, 3), "f4"), y=np.tile([0, 1], 160))
    assert the_json("init", "a.yaml", "--data", "data.npz")["template"] == "arrays"
    recipe = load_recipe("a.yaml")
    assert recipe.tasks.unseen == 10 and recipe.adapt.shots == [2]  # per class
    write(Path("few.jsonl"), ROWS["classification"], num_tasks=2, per_task=1)
    assert the_json("init", "b.yaml", "--data", "few.jsonl")["shots"] == ["all"]
    assert load_recipe("b.yaml").tasks.unseen == 1


def test_columns_of_other_names_are_found_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{customer},hello,{'xy'[i % 2]}" for customer in "ab" for i in range(9)]
    Path("tickets.csv").write_text("Customer,body,category\n" + "\n".join(lines))
    shown = call("init", "t.yaml", "--data", "tickets.csv")
    assert "body as text, category as label" in shown.stdout, shown.output
    tasks = load_recipe("t.yaml").tasks
    assert tasks.task_column == "Customer"
    assert tasks.columns == {"body": "text", "category": "label"}
    Path("half.csv").write_text("customer,text,category\n" + "\n".join(lines))
    half = the_json("init", "h.yaml", "--data", "half.csv")
    assert half["template"] == "classification" and half["columns"] == {"category": "label"}
    Path("texts.csv").write_text("customer,text\na,hello\nb,hi\n")
    assert the_json("init", "x.yaml", "--data", "texts.csv")["template"] == "causal-lm"


def test_what_cannot_be_told_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def mistake(text: str, *more: object) -> str:
        Path("rows.csv").write_text(text)
        line = the_error("init", "x.yaml", "--data", "rows.csv", *more)
        assert not Path("x.yaml").exists()
        return line

    two = mistake("user,customer,text,label\n1,2,3,4\n")
    assert "user and customer may name a row's task" in two
    assert "no column seems to name a row's task" in mistake("text,label\na,b\n")
    assert "fit none of chat: messages" in mistake("task,foo\na,b\n")
    assert "fit none of choice:" in mistake("task,text,label\na,b,c\n", "--template", "choice")
    assert "has a single task" in mistake("task,text,label\na,b,c\n")
    assert "no such file" in the_error("init", "x.yaml", "--data", "absent.csv")
    assert "no template" in the_error(
        "init", "x.yaml", "--data", "rows.csv", "--template", "choise"
    )
