"""Which rows of `--samples` make a gate, and which are held out to measure."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from foretune.errors import UserError
from foretune.fusion.sample_rows import Samples, read_samples


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_drawn_at_random_over_labels(tmp_path: Path) -> None:
    """A file sorted by label, whose first rows have one label, and rare labels at its end."""
    counts = {"a": 60, "b": 12, "c": 4}
    rows = [
        {"task": "t", "text": f"{k} {i}", "label": k} for k, n in counts.items() for i in range(n)
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    drawn = read_samples(file, ["t"], 12)
    assert Counter(text[0] for text in drawn.gate["t"]) == {"a": 4, "b": 4, "c": 4}
    held_out = [row.text for row in drawn.held_out["t"]]
    assert not set(held_out) & set(drawn.gate["t"]) and len(held_out) == 76 - 12
    assert read_samples(file, ["t"], 12) == drawn
    other = read_samples(file, ["t"], 12, seed=1)
    assert other.gate["t"] != drawn.gate["t"]
    # whatever the order of the labels in the file
    back = read_samples(write(tmp_path / "back.jsonl", rows[::-1]), ["t"], 12)
    assert Counter(text[0] for text in back.gate["t"]) == {"a": 4, "b": 4, "c": 4}


def test_half_of_few_rows_are_held_out(tmp_path: Path) -> None:
    rows = [{"task": "t", "text": f"word {i}"} for i in range(5)]
    drawn = read_samples(write(tmp_path / "rows.jsonl", rows), ["t"], 64)
    assert (len(drawn.gate["t"]), len(drawn.held_out["t"])) == (2, 3)


def test_test_rows_are_left_alone_and_validation_rows_measure(tmp_path: Path) -> None:
    rows = [
        {"task": "t", "split": split, "text": f"{split} {i}", "label": str(i % 2)}
        for split in ("train", "dev", "test")
        for i in range(8)
    ]
    # a text of the test split that is in the training split too
    rows.append({"task": "t", "split": "train", "text": "test 3", "label": "1"})
    rows.append({"task": "t", "split": "train", "text": "dev 3", "label": "1"})
    drawn = read_samples(write(tmp_path / "rows.jsonl", rows), ["t"], 64)
    assert sorted(drawn.gate["t"]) == [f"train {i}" for i in range(8)]
    assert sorted(row.text for row in drawn.held_out["t"]) == [f"dev {i}" for i in range(8)]
    assert drawn.notes == []
    unvalidated = [row for row in rows if row["split"] != "dev"]
    drawn = read_samples(write(tmp_path / "rows.jsonl", unvalidated), ["t"], 64)
    assert not any("test" in row.text for row in drawn.held_out["t"])
    assert "the held-out rows of t are of the split train" in drawn.notes[0]


def test_prompts_and_completions_are_rows_too(tmp_path: Path) -> None:
    rows = [{"task": "t", "prompt": f"{i} ", "completion": "yes"} for i in range(4)]
    drawn = read_samples(write(tmp_path / "rows.jsonl", rows), ["t"], 1)
    assert all((row.text, row.prompt)[0].endswith(" yes") for row in drawn.held_out["t"])
    assert {row.prompt for row in drawn.held_out["t"]} < {"0 ", "1 ", "2 ", "3 "}
    assert isinstance(drawn, Samples)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "t", "text": "x"}] * 3, "has 1 texts of task t; two or more are needed"),
        (
            [{"task": "t", "text": str(i), "split": "test"} for i in range(3)],
            "has 0 texts of task t and 3 of the split test; two or more",
        ),
        ([{"task": "u", "text": "x"}], "has no rows of task t; its tasks: u"),
        (
            [{"task": "t", "words": "x"}],
            'line 1: samples need "task" and "text" .* got task, words',
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_samples(write(tmp_path / "rows.jsonl", rows), ["t"], 4)
