"""The page of the evidence says what the results say, failures included."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from foretune.evaluation.conflict import REALISED
from foretune.evaluation.statistics import pairs_and_means
from foretune.recipes.schema import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BASES = ("none", "standard", "peft-ml-last-layer", "peft-ml-lora", "reptile", "fomaml")
NUM_TASKS, NUM_REPEATS = 30, 4


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence.summary")


def result(
    levels: dict[str, float], before: float = 0.5, bases: Sequence[str] = BASES
) -> dict[str, Any]:
    """A comparison at 4 rows per class, whose bases differ by what `levels` says."""
    rng = np.random.default_rng(0)
    scores = [
        {"base": base, "task": f"t{task}", "shots": shots, "seed": seed, "repeat": seed}
        | {"score": (levels.get(base, 0.6) if shots else before) + float(noise)}
        for base in bases
        for shots in (0, 4)
        for (task, seed), noise in np.ndenumerate(rng.normal(0, 0.01, (NUM_TASKS, NUM_REPEATS)))
    ]
    records = [
        {"name": b, "method": "peft-ml" if b.startswith("peft") else b, "label": b} for b in bases
    ]
    pairs, means = pairs_and_means(scores, records)
    return {
        "metric": {"name": "accuracy"},
        "adapt": {"shots_unit": "rows per class"},
        "collection": {"num_seen": 60, "num_unseen": NUM_TASKS},
        **{"bases": records, "scores": scores, "pairs": pairs, "means": means},
    }


def write(folder: Path, results: dict[str, dict[str, Any]], expected: dict[str, float]) -> None:
    for name, content in results.items():
        conflict: dict[str, Any] = {"unmeasured": "labels of its own"}
        if gain := expected.get(name.removeprefix("evidence-")):
            low_and_high = [gain - 0.01, gain + 0.01]
            conflict = {"low_rank_gain": [gain, *low_and_high], "advice": "PEFT-ML"}
        (folder / f"{name}.json").write_text(json.dumps({**content, "conflict": conflict}))


def test_every_collection_has_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    catalogue = importlib.import_module("catalogue")
    for name in catalogue.COLLECTIONS:
        path, settings = catalogue.recipe_of(name, Path("data"), Path("made"))
        recipe = load_recipe(BENCHMARKS.parent / path, settings)
        assert (recipe.name, recipe.seeds) == (name, 5)
        if name in catalogue.AUTO:
            auto = catalogue.auto_of(str(BENCHMARKS.parent / path))
            [entry] = load_recipe(BENCHMARKS.parent / path, [*settings, auto]).entries
            names = [
                candidate.get("as", candidate["name"]) for candidate in entry.fields["candidates"]
            ]
            assert names == [entry.name for entry in recipe.entries]


def test_gains_and_their_order_are_those_of_the_results(
    summary: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {"calm": 0.0, "split": 0.1, "torn": 0.2}
    results = {f"evidence-{n}": result({"peft-ml-last-layer": 0.6 + g}) for n, g in gains.items()}
    write(tmp_path, results, {"calm": 0.01, "split": 0.05, "torn": 0.3})
    made = summary.summarise(tmp_path)
    for name, gain in gains.items():
        pair = made["collections"][name]["gains"]["standard"]
        assert pair["difference"] == pytest.approx(gain, abs=0.01)
        assert summary.is_above(pair) == (gain > 0)
        assert pair["p_holm"] >= pair["p_value"]
    assert summary.spearman(made) == pytest.approx(1)
    assert list(summary.with_conflict(made)) == ["torn", "split", "calm"]
    goals = summary.goals_table(made)
    assert "| **no** | 2 of 3: split, torn |" in goals and "Spearman" not in goals
    monkeypatch.setattr(summary, "FEWEST_RANKED", 3)
    assert "1.00 over 3 collections" in summary.goals_table(made)
    assert "On 2 of 3 collections" in summary.pays_sentence(made)
    assert "torn" in summary.figure(made)


def test_adapting_that_harms_is_named(summary: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, {"evidence-one": result({"reptile": 0.3}, before=0.6)}, {})
    goals = summary.goals_table(summary.summarise(tmp_path))
    assert "not adapting | **no** | clearly below in 1 of 6 cells" in goals
    assert "one, reptile, 4 rows: " in goals


def test_basis_is_compared_with_plain_adapting_of_the_same_base(
    summary: ModuleType, tmp_path: Path
) -> None:
    results = {"evidence-one": result({}), "plain-one": result({"peft-ml-last-layer": 0.5})}
    write(tmp_path, results, {})
    made = summary.summarise(tmp_path)
    by_base = {row["base"]: row for row in made["collections"]["one"]["basis"]}
    assert by_base["peft-ml-last-layer"]["difference"] == pytest.approx(0.1, abs=0.01)
    assert by_base["standard"]["difference"] == pytest.approx(0, abs=0.01)
    assert "better on 1 of 1; clearly below in 0 of 6 cells" in summary.goals_table(made)


def test_regret_is_the_way_to_the_best_in_hindsight(
    summary: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {"standard": 0.7, "peft-ml-last-layer": 0.9, "auto": 0.7}
    write(tmp_path, {"evidence-one": result(levels, bases=(*BASES, "auto"))}, {})
    made = summary.summarise(tmp_path)
    [auto] = made["collections"]["one"]["auto"]
    assert auto["best"] == "peft-ml-last-layer"
    assert auto["regret"] == pytest.approx(0.2, abs=0.01)
    # the best whichever task is left out, and nobody is near it
    assert (auto["regret_elsewhere"], auto["regret_by_luck"]) == (pytest.approx(auto["regret"]), 0)
    assert summary.is_above(auto["over"]["none"]) and not summary.is_below(auto["over"]["standard"])
    numbers = "20.0 points over 1 cell of 1 collection; clearly below in none |"
    assert f"| open | {numbers}" in summary.goals_table(made)  # one collection says little
    monkeypatch.setattr(summary, "LEAST", 1)
    assert f"| **no** | {numbers}" in summary.goals_table(made)
    write(tmp_path, {"evidence-one": result({**levels, "auto": 0.5}, bases=(*BASES, "auto"))}, {})
    assert "clearly below in 2 |" in summary.goals_table(summary.summarise(tmp_path))


def test_a_best_method_by_luck_on_one_task_is_not_the_best_on_the_others(
    summary: ModuleType,
) -> None:
    steady, lucky = np.full((4, 1), 0.5), np.array([[0.4], [0.4], [0.4], [1.0]])
    assert lucky.mean() > steady.mean()
    # Without the lucky task `steady` is picked for it; `lucky` is picked for each of the others.
    assert summary.best_elsewhere({"steady": steady, "lucky": lucky}) == pytest.approx(
        (0.5 + 3 * 0.4) / 4
    )


def test_the_lead_of_the_best_of_many_equal_methods_is_luck(summary: ModuleType) -> None:
    rng = np.random.default_rng(1)
    equal = {f"m{i}": rng.normal(0, 0.05, (25, 1)) for i in range(10)}
    # E[max] of 10 standard normals is 1.54; a mean of 25 has a fifth of the spread.
    assert summary.lead_by_luck(equal) == pytest.approx(1.54 * 0.05 / 5, rel=0.35)


def test_plan_expects_the_share_that_was_realised(summary: ModuleType) -> None:
    made = json.loads((summary.RESULTS / "evidence.json").read_text("utf-8"))
    assert pytest.approx(summary.realised(made), abs=0.03) == REALISED


def test_committed_picture_is_that_of_the_committed_result(summary: ModuleType) -> None:
    made = json.loads((summary.RESULTS / "evidence.json").read_text("utf-8"))
    if summary.with_conflict(made):
        assert summary.FIGURE.read_text("utf-8") == summary.figure(made)
    assert made == json.loads(json.dumps(summary.summarise(summary.RESULTS)))
