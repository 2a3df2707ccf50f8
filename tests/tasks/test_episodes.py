"""N-way K-shot episodes: what is drawn, and what cannot be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import command_line
import foretune
import tiny_models
from foretune import Source, Task, TaskCollection
from foretune.errors import UserError
from foretune.tasks.episodes import Episodes, draw_episodes


def rows(classes: int, each: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"row {start + i} of {c}", "label": f"class {c}"}
        for c in range(classes)
        for i in range(each)
    ]


HOW = Episodes(number=20, ways=3, shots=2, queries=4)


def test_an_episode_has_so_many_ways_shots_and_queries() -> None:
    tasks = TaskCollection((Task("all", rows(7, 6)),))
    drawn = draw_episodes(tasks, HOW)
    assert drawn.names[:2] == ["episode 1", "episode 2"] and len(drawn) == 20
    classes = set()
    for task in drawn:
        assert set(Counter(r["label"] for r in task.train).values()) == {2}
        assert set(Counter(r["label"] for r in task.test).values()) == {4}
        assert {r["label"] for r in task.train} == {r["label"] for r in task.test}
        texts = [r["text"] for r in (*task.train, *task.test)]
        assert len(set(texts)) == len(texts) == 3 * 6
        classes.add(frozenset(r["label"] for r in task.train))
    assert len(classes) > 5
    again = draw_episodes(tasks, Episodes(number=25, ways=3, shots=2, queries=4))
    assert [t.digest for t in again][:20] == [t.digest for t in drawn]
    other = draw_episodes(tasks, HOW, seed=1)
    assert [t.digest for t in other] != [t.digest for t in drawn]


def test_queries_are_test_examples_where_there_are_any() -> None:
    task = Task("all", rows(4, 3), (), rows(4, 5, start=100))
    for episode in draw_episodes(TaskCollection((task,)), HOW):
        assert all(r in task.train for r in episode.train)
        assert all(r in task.test for r in episode.test)


def test_classes_that_are_too_small_are_not_drawn() -> None:
    few = [*rows(3, 6), {"text": "rare", "label": "rare"}]
    drawn = draw_episodes(TaskCollection((Task("all", few),)), HOW)
    assert all(r["label"] != "rare" for t in drawn for r in t.train)
    message = 'episodes of 3 ways need 3 classes .* task "all" has 2 of 4'
    with pytest.raises(UserError, match=message):
        draw_episodes(TaskCollection((Task("all", few[6:] + rows(4, 1)[3:]),)), HOW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"way": 5}, 'episodes have no "way". Did you mean "ways"'),
        ({"ways": 1}, "episodes.ways must be a whole number not below 2"),
        ({"shots": 0}, "episodes.shots must be a whole number not below 1"),
        (5, "episodes must map number, ways, shots, queries to numbers"),
    ],
)
def test_bad_settings(fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Source(source="x.jsonl", episodes=fields)


def test_episodes_need_classes(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"task": "a", "text": "b"}\n' * 3)
    source = Source(source=str(tmp_path / "t.jsonl"), episodes={})
    with pytest.raises(UserError, match="drawn from classes, which causal-lm does not have"):
        foretune.load_tasks(source, "causal-lm")


def test_episodes_of_unseen_classes_on_the_command_line(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_models.bert(num_hidden_layers=1).save_pretrained(base)
    tiny_models.tokenizer().save_pretrained(base)
    lines = [{"task": "all", "split": "train", **row} for row in rows(4, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    command = (
        *("compare", base, "--tasks", tmp_path / "rows.jsonl", "--objective", "prompts"),
        *("--shots", "all", "--out", tmp_path / "out", "method=fd-align", "steps=1"),
        "tasks.episodes={number: 3, ways: 2, shots: 1, queries: 2}",
    )
    result = command_line.call(*command)
    assert result.exit_code == 0, result.output
    assert "(95 % interval" in result.stdout
    scores = json.loads((tmp_path / "out" / "comparison.json").read_text())["scores"]
    assert {row["task"] for row in scores} == {"episode 1", "episode 2", "episode 3"}
