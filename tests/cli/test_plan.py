"""`foretune plan` says first whether retraining is likely to pay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from command_line import call, the_json
from foretune.evaluation.conflict import REALISED

RECIPE = """\
name: votes
model: {tower: [8]}
tasks: {source: votes.npz, unseen: 6}
objective: {kind: classification}
retrain: {methods: [none, standard], steps: 4, learning_rate: 1e-3}
adapt: {method: head, learning_rate: 1e-3, steps: 2, shots: [2, all]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    items, directions = rng.normal(size=(30, 5)), rng.normal(size=(2, 30))
    task, item = np.repeat(np.arange(40), 30), np.tile(np.arange(30), 40)
    votes = directions[0][item] + 2 * directions[1][item] * rng.normal(size=40)[task] > 0
    split = np.where(rng.random(len(task)) < 0.2, "test", "train")
    x = items[item].astype(np.float32)
    np.savez("votes.npz", task=task.astype(str), x=x, y=votes.astype(int), split=split)
    Path("votes.yaml").write_text(RECIPE)
    return "votes.yaml"


def test_the_expected_gain_and_the_advice_come_first_and_fit_eighty_columns(recipe: str) -> None:
    shown = call("plan", recipe)
    assert shown.exit_code == 0, shown.output
    first = shown.stdout[: shown.stdout.index("34 seen tasks\n")]
    assert first.startswith("Does retraining with adapters pay?\n  34 seen tasks, ")
    assert "Expected gain of PEFT-ML over pooling: +" in first and "Advice: PEFT-ML." in first
    assert max(map(len, first.splitlines())) <= 80
    shared = shown.stdout[shown.stdout.index("shared inputs: ") :].splitlines()[0]
    assert "leaks: none found" in shown.stdout and len(shared) <= 80


def test_json_has_all_numbers(recipe: str) -> None:
    conflict = the_json("plan", recipe)["conflict"]
    assert conflict["advice"] == "PEFT-ML" and conflict["shared_inputs"] == 1
    assert [step["shots"] for step in conflict["by_shots"]] == [2, None]
    assert conflict["expected_gain"][1] > 0.05
    expected = [REALISED * bound for bound in conflict["low_rank_gain"]]
    assert conflict["expected_gain"] == pytest.approx(expected)


def test_what_cannot_be_measured_is_one_line(recipe: str) -> None:
    shown = call("plan", recipe, "tasks.unseen=38")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.split("\n\n")[0].split()
    assert " ".join(lines).startswith(
        "Does retraining with adapters pay? It cannot be measured: it takes 4 seen tasks"
    )


def notes(*args: object) -> list[str]:
    shown = call("plan", *args)
    assert shown.exit_code == 0, shown.output
    [part] = [part for part in shown.stdout.split("\n\n") if part.startswith("before you run")] or [
        ""
    ]
    assert max(map(len, part.splitlines()), default=0) <= 80
    joined = " ".join(line.strip() for line in part.splitlines()[1:])
    assert the_json("plan", *args)["notes"] == [] or joined
    return joined.split(". ") if joined else []


def test_what_would_make_a_run_worthless_is_said_before_it(recipe: str) -> None:
    few = " ".join(notes(recipe, "tasks.unseen=1"))
    assert "1 unseen task: too few for a verdict" in few and "6 are the least" in few
    assert "to retrain on" not in few
    most = " ".join(notes(recipe, "tasks.unseen=38"))
    assert "2 tasks to retrain on, 38 unseen ones" in most and "too few" not in most
    assert "1 seen task: there is nothing to learn across tasks" in " ".join(
        notes(recipe, "tasks.unseen=39")
    )
    assert notes(recipe, "tasks.unseen=20") == []
    chosen = " ".join(
        notes(
            recipe,
            "tasks.unseen=20",
            "adapt.learning_rates=[1e-3,1e-2]",
            "adapt.learning_rate=null",
            "adapt.search_tasks=3",
        )
    )
    assert "are chosen by " in chosen and chosen.count(",") >= 3


def test_tasks_with_one_label_are_named(recipe: str) -> None:
    data = dict(np.load("votes.npz"))
    data["y"][data["task"] == "3"] = 1
    np.savez("one.npz", **data)
    assert "3: one label only" in " ".join(notes(recipe, "tasks.source=one.npz", "tasks.unseen=20"))
    data["y"][:] = 1
    np.savez("one.npz", **data)
    all_of_them = " ".join(notes(recipe, "tasks.source=one.npz", "tasks.unseen=20"))
    assert "All tasks have one label each, so every prediction is right" in all_of_them
