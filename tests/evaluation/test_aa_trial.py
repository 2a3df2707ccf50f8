"""The trial of standard retraining against itself, at small size; what its result promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from foretune.recipes.console import SILENT
from foretune.recipes.schema import load_recipe

EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "evidence"
SMALL = [
    *("model.tower=[4]", "tasks.unseen=3", "retrain.steps=4", "retrain.eval_every=2"),
    *("adapt.methods=[head]", "adapt.steps=2", "adapt.search_tasks=2"),
]


@pytest.fixture(scope="module")
def trial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aa_trial", EVIDENCE / "aa_trial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def votes(path: Path) -> Path:
    """Eleven people who agree on 24 items, but for a few votes."""
    rng = np.random.default_rng(0)
    items, common = rng.normal(size=(24, 3)).astype(np.float32), rng.integers(0, 2, 24)
    votes = np.where(rng.random((11, 24)) < 0.2, 1 - common, common)
    task = np.repeat([f"p{i:02d}" for i in range(11)], 24)
    np.savez(path, task=task, x=np.tile(items, (11, 1)), y=votes.reshape(-1))
    return path


def test_a_small_trial_runs_and_continues(trial, tmp_path, monkeypatch):
    source = votes(tmp_path / "votes.npz")
    settings = [f"tasks.source={source}", *trial.SETTINGS, *SMALL]
    recipe = load_recipe(EVIDENCE / "tower.yaml", settings)
    measured = trial.measure(recipe, tmp_path / "run", 3, SILENT)
    assert {*measured["scores"]} == {"none", "standard"}
    table = np.array(measured["scores"]["standard"]["2"])
    assert table.shape == (3, trial.REPEATS)
    assert sum(measured["chose"]["retraining"].values()) == 3

    def fail(*args: Any, **fields: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("foretune.recipes.stages.make_base", fail)
    monkeypatch.setattr("foretune.compare", fail)
    assert trial.measure(recipe, tmp_path / "run", 3, SILENT) == measured


def drawn(luck: float, num_seeds: int = 16, num_tasks: int = 30) -> dict[str, Any]:
    """Scores of retrainings that differ by luck alone."""
    rng = np.random.default_rng(0)
    level = rng.normal(0.7, 0.1, (num_tasks, 1))
    return {
        name: {
            str(seed): (
                level - behind + luck * rng.normal() + rng.normal(0, 0.02, (num_tasks, 3))
            ).tolist()
            for seed in range(num_seeds)
        }
        for name, behind in {"none": 0.2, "standard": 0.0}.items()
    }


def test_luck_is_found_and_three_repeats_forgive_it(trial):
    scores = drawn(luck=0.02)
    assert trial.luck(scores) == pytest.approx(0.02, rel=0.4)
    judged = trial.judgements(scores, 16)
    clear = {number: np.mean([side["clear"] for side in judged[number]]) for number in judged}
    assert clear["1"] > 0.5 and clear["3"] < 0.2


@pytest.mark.parametrize("repeats", [1, 3])
def test_sides_are_disjoint_and_balanced(trial, repeats):
    pairs = trial.sides(16, repeats)
    assert len({(tuple(a), tuple(b)) for a, b in pairs}) == 40
    assert all(len(a) == len(b) == repeats and not {*a} & {*b} for a, b in pairs)
    often = np.bincount([seed for a, b in pairs for seed in (*a, *b)], minlength=16)
    assert often.max() - often.min() <= (0 if repeats == 1 else 8)


def test_a_collection_that_is_not_at_hand_is_left_out_by_name(trial, tmp_path, capsys):
    result = trial.run(tmp_path, tmp_path / "runs", tmp_path / "result.json", SILENT)
    assert result["collections"] == {}
    assert capsys.readouterr().err.count("left out") == 2


def test_the_committed_trial_is_what_its_scores_say_and_rarely_takes_a_side(trial):
    result = json.loads(trial.RESULT.read_text("utf-8"))
    assert {*result["collections"]} == {*trial.COLLECTIONS}
    for collection in result["collections"].values():
        assert trial.judgements(collection["scores"], trial.SEEDS) == collection["judged"]
        assert len(collection["judged"]["3"]) == 2 * trial.PAIRS
        assert np.mean([side["taken"] for side in collection["judged"]["3"]]) <= 0.05
