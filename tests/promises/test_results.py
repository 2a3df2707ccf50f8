"""Tables in the docs are made from the committed results, and what they say follows from these."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RNG = np.random.default_rng(0)


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("claims", "claims.variants", "publish"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("publish")


def test_tables_are_those_of_the_results(publish: ModuleType) -> None:
    for page in publish.PAGES:
        assert publish.with_tables(page.read_text("utf-8")) == page.read_text("utf-8")


def test_pairs_and_means_are_those_of_the_committed_scores(publish: ModuleType) -> None:
    for path in publish.RESULTS.glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        if {"scores", "pairs"} <= result.keys():
            pairs, means = publish.pairs_and_means(result["scores"], result["bases"])
            assert (result["pairs"], result["means"]) == (pairs, means), path.name


@pytest.mark.parametrize(
    ("name", "mark"),
    [("quickstart", "results quickstart"), ("theory-linear", "theory theory-linear rank-at-test")],
)
def test_a_table_older_than_its_result_is_noticed(
    publish: ModuleType, name: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (publish.RESULTS / f"{name}.json").read_text("utf-8")
    result = json.loads(text)
    if "means" in result:
        result["means"][0]["mean"] += 0.01
    else:
        for row in result["panels"]["rank-at-test"]["rows"]:
            row.update({k: [2 * x for x in v] for k, v in row.items() if isinstance(v, list)})
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    pages = "".join(page.read_text("utf-8") for page in publish.PAGES)
    shown = pages[pages.index(f"<!-- {mark} -->") :].partition("<!-- end -->")
    assert publish.with_tables(shown[0] + shown[1]) != shown[0] + shown[1]


@pytest.mark.parametrize(
    "page",
    [
        "<!-- results no-such-run -->\n<!-- end -->\n",
        "<!-- results quickstart -->\nText that would be lost.\n",
        "<!-- results quickstart -->\n<!-- results claims-mnist-pairs -->\n<!-- end -->\n",
        "<!-- end -->\n",
    ],
)
def test_a_mark_that_makes_no_table_is_refused(publish: ModuleType, page: str) -> None:
    with pytest.raises(SystemExit, match=r"names no table|has no mark of its end"):
        publish.with_tables(page)


def result(scores: dict[str, float], spread: float = 0.01) -> dict[str, Any]:
    """Twelve tasks under one seed; each base is as far from the others as `scores` says."""
    level = RNG.uniform(0.3, 0.7, 12)
    rows = [
        {"base": base, "task": f"t{i}", "shots": 8, "seed": 0, "score": task + score + noise}
        for base, score in scores.items()
        for i, (task, noise) in enumerate(zip(level, RNG.normal(0, spread, 12), strict=True))
    ]
    return {"bases": [{"name": base} for base in scores], "scores": rows}


@pytest.mark.parametrize(("rival", "beats"), [(0.1, True), (0.3, False), (0.2, False)])
def test_a_variant_must_beat_every_rival(publish: ModuleType, rival: float, beats: bool) -> None:
    variants = importlib.import_module("claims.variants")
    found = result(
        {"none": 0.5, "standard": 0, "peft-ml": rival, "reptile": 0, "fomaml": 0, "episodes": 0.2}
    )
    row = variants.variant_row("one", 8, variants.matrices(found, 8))
    assert row["variant"] == "episodes"
    assert row["beats_all"] == beats  # none is a control, no rival


def test_runs_apart_are_joined_as_if_they_were_one(publish: ModuleType) -> None:
    whole = json.loads((publish.RESULTS / "claims-convai2.json").read_text("utf-8"))
    names = [base["name"] for base in whole["bases"]]
    parts = [
        {
            **whole,
            "bases": [base for base in whole["bases"] if base["name"] in some],
            "scores": [score for score in whole["scores"] if score["base"] in some],
        }
        for some in (names[:5], names[5:])
    ]
    for part in parts:
        part["pairs"] = part["means"] = []
    joined = publish.joined(parts)
    assert [base["name"] for base in joined["bases"]] == names
    pairs, means = publish.pairs_and_means(whole["scores"], whole["bases"])
    assert joined["means"] == means
    assert joined["pairs"] == pairs
    metric = whole["metric"]["name"]
    said = publish.verdict(pairs, means, whole["bases"], metric=metric, shots_unit="rows")
    assert joined["verdict"] == said


def test_a_run_adds_its_bases_to_a_result(
    publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((publish.RESULTS / "claims-mnist-pairs.json").read_text("utf-8"))
    first, *others = [base["name"] for base in whole["bases"]]
    for names, file in ((others, "some.json"), ([first], "run/comparison.json")):
        part = {
            **whole,
            "bases": [base for base in whole["bases"] if base["name"] in names],
            "scores": [score for score in whole["scores"] if score["base"] in names],
        }
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(part))
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    made = json.loads(
        publish.publish([tmp_path / "some.json", tmp_path / "run"], "all").read_text()
    )
    assert [base["name"] for base in made["bases"]] == [*others, first]
    assert len(made["scores"]) == len(whole["scores"])
    assert made["environment"] == whole["environment"]


def test_runs_of_unlike_tasks_are_not_joined(publish: ModuleType) -> None:
    first, second = result({"none": 0}), result({"standard": 0.1})
    second["scores"] = second["scores"][:-1]
    with pytest.raises(SystemExit, match="not of the same unseen tasks"):
        publish.joined([first, second])
