"""Leaks between train and test, and between seen and unseen tasks."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from foretune.cli.plan import plan_text
from foretune.tasks.leakage import Leak, Overlaps, SharedInputs, find_leaks, find_overlaps
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task, TaskCollection


def texts(*values: str) -> tuple[dict[str, Any], ...]:
    return tuple({"text": value, "label": "x"} for value in values)


def test_a_clean_collection_has_no_leaks() -> None:
    seen = TaskCollection((Task("a", train=texts("1", "2"), test=texts("3")),))
    unseen = TaskCollection((Task("b", train=texts("1"), test=texts("4")),))
    assert find_leaks(seen, unseen) == []


def test_rows_in_train_and_test_are_counted_whatever_their_case_and_spaces() -> None:
    task = Task(
        "a", train=texts("Hello  there", "x"), validation=texts("X"), test=texts("hello there")
    )
    assert find_leaks(TaskCollection((task,))) == [
        Leak("train and validation", "a", "a", 1, "X", ("train", "validation")),
        Leak("train and test", "a", "a", 1, "hello there"),
    ]


def test_what_chooses_a_checkpoint_and_is_scored_is_a_leak() -> None:
    task = Task("a", train=texts("1"), validation=texts("2", "3"), test=texts("3", "4"))
    splits = ("validation", "test")
    assert find_leaks(TaskCollection((task,))) == [
        Leak("validation and test", "a", "a", 1, "3", splits)
    ]
    other = Task("b", train=texts("9"), test=texts("2", "5", "1"))
    leaks = find_leaks(TaskCollection((task,)), TaskCollection((other,)))
    assert leaks[1:] == [
        Leak("seen and unseen", "a", "b", 1, "2", splits),
        Leak("seen and unseen", "a", "b", 1, "1"),
    ]


def test_seen_train_rows_in_an_unseen_test_are_found() -> None:
    seen = TaskCollection((Task("a", train=texts("1")), Task("b", train=texts("2", "3"))))
    unseen = TaskCollection((Task("c", test=texts("3", "2", "9")),))
    assert find_leaks(seen, unseen) == [Leak("seen and unseen", "b", "c", 2, "3")]


def test_a_row_with_another_label_is_no_leak() -> None:
    task = Task("a", train=texts("1"), test=({"text": "1", "label": "y"},))
    assert find_leaks(TaskCollection((task,))) == []


def test_choice_rows_are_compared_by_context_and_true_response() -> None:
    def row(candidates: list[str], answer: int) -> dict[str, Any]:
        return {"context": ["hi", "you"], "candidates": candidates, "answer": answer}

    train = (row(["yes", "no"], 0),)
    leaked = Task("a", train=train, test=(row(["maybe", "Yes"], 1),))
    clean = Task("b", train=train, test=(row(["yes", "no"], 1),))
    leaks = find_leaks(TaskCollection((leaked, clean)))
    assert leaks == [Leak("train and test", "a", "a", 1, "you")]


def votes(task: str, answers: str) -> Task:
    """The answers of one person, to texts that everybody has answered."""
    rows = tuple({"text": f"text {i}", "label": answer} for i, answer in enumerate(answers))
    return Task(task, train=rows[:20], validation=rows[20:25], test=rows[25:])


def test_texts_that_every_task_answers_in_its_own_way_are_no_leaks() -> None:
    rng = random.Random(0)
    people = [votes(f"p{n}", "".join(rng.choices("yn", k=50))) for n in range(6)]
    # the same texts, in train of some and in test of others
    seen = [Task(t.name, train=(*t.test, *t.train), validation=t.validation) for t in people[:4]]
    overlaps = find_overlaps(TaskCollection(tuple(seen)), TaskCollection(tuple(people[4:])))
    assert overlaps.leaks == []
    assert [(s.task, s.count, s.total) for s in overlaps.shared_inputs] == [
        ("p4", 25, 25),
        ("p5", 25, 25),
    ]
    answers = {(row["text"], row["label"]) for task in seen for row in task.train}
    assert overlaps.shared_inputs[0].same_answer == sum(
        (row["text"], row["label"]) in answers for row in people[4].test
    )


def test_two_people_who_often_agree_share_their_texts() -> None:
    first, second = votes("a", "y" * 50), votes("b", "y" * 45 + "nnnnn")
    learnt = Task("a", train=(*first.test, *first.train))
    overlaps = find_overlaps(TaskCollection((learnt,)), TaskCollection((second,)))
    assert overlaps == Overlaps([], [SharedInputs("b", 25, 20, 25, "text 25")])


def test_a_copied_task_leaks_though_a_few_labels_were_corrected() -> None:
    task = votes("a", "y" * 25 + "yyyyn" * 5)
    copied = Task("a", train=(*task.test, *task.train))
    corrected = ({**task.test[0], "label": "n"}, *task.test[1:])
    seen, unseen = TaskCollection((copied,)), TaskCollection((Task("b", test=corrected),))
    assert find_overlaps(seen, unseen).shared_inputs == []
    assert [leak.count for leak in find_leaks(seen, unseen)] == [24]


def test_one_answer_has_several_spellings() -> None:
    def row(text: str, label: Any) -> dict[str, Any]:
        return {"text": text, "label": label}

    train = (row("caf\u00e9", 1), row("b", "e\u0301"))
    test = (row("CAFE\u0301", "1"), row("b", "\u00e9"))
    assert find_leaks(TaskCollection((Task("a", train, test=test),)))[0].count == 2


def test_a_leak_says_where_both_rows_were_read(tmp_path: Path) -> None:
    rows = [{"task": "a", "text": f"{i % 3}", "label": "x"} for i in range(4)]
    rows[3]["split"] = "test"
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks, _ = load_tasks(Source(source=str(file), validation=0.0), "classification")
    assert find_leaks(tasks)[0].places == (f"{file} line 1", f"{file} line 4")


def test_a_plan_tells_leaks_from_shared_inputs() -> None:
    leaks = [dataclasses.asdict(Leak("train and test", "a", "a", 3, "hi", places=("d line 1",)))]
    shared = [dataclasses.asdict(SharedInputs("b", 25, 20, 25, "text 0"))]
    plan: dict[str, Any] = {
        "conflict": {"unmeasured": "it takes 4 tasks"},
        "notes": [],
        "seen": {"a": {"train": 1}},
        "unseen": None,
        "retrain": [],
        "adapt": None,
        "labels": {},
        "drawn": [],
    }
    plan |= {"seconds": 0, "peak_memory_mb": None}
    text = plan_text(plan | {"leaks": leaks, "shared_inputs": []})
    assert "leaks: scores will be too high\n  a: 3 test examples are also train examples" in text
    assert "of the task, such as 'hi' (d line 1)" in text
    text = plan_text(plan | {"leaks": [], "shared_inputs": shared})
    assert "leaks: none found" in text
    shared_lines = " ".join(text[text.index("shared inputs:") :].split())
    assert "25 of 25 test inputs of unseen tasks are also in seen tasks" in shared_lines
    assert "20 of them with the same answer" in shared_lines


def test_finding_leaks_takes_time_linear_in_rows_that_all_tasks_share() -> None:
    people = TaskCollection(tuple(votes(f"p{n}", "y" * 50) for n in range(600)))
    seen, unseen = people.subset(people.names[:300]), people.subset(people.names[300:])
    learnt = [Task(t.name, train=t.test) for t in seen]
    began = time.perf_counter()
    leaks = find_leaks(TaskCollection(tuple(learnt)), unseen)
    assert len(leaks) == 300  # each counted for the first seen task that has it
    assert time.perf_counter() - began < 10


def test_arrays_are_compared_by_their_content() -> None:
    def row(value: float) -> dict[str, Any]:
        return {"x": np.full((2, 3), value), "y": 1}

    task = Task("a", train=(row(1.0), row(2.0)), test=(row(2.0), row(3.0)))
    leaks = find_leaks(TaskCollection((task,)))
    assert leaks == [Leak("train and test", "a", "a", 1, "array of shape (2, 3)")]
    half = ({"x": np.full((2, 3), 2.0, dtype="f2"), "y": np.int64(1)},)  # as an .npz may hold it
    assert len(find_leaks(TaskCollection((Task("a", task.train, test=half),)))) == 1
