"""Leaks between train and test, and between seen and unseen tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from foretune.tasks.leakage import Leak, find_leaks
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
    assert find_leaks(TaskCollection((task,))) == [Leak("train and test", "a", "a", 2, "X")]


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


def test_arrays_are_compared_by_their_content() -> None:
    def row(value: float) -> dict[str, Any]:
        return {"x": np.full((2, 3), value), "y": 1}

    task = Task("a", train=(row(1.0), row(2.0)), test=(row(2.0), row(3.0)))
    leaks = find_leaks(TaskCollection((task,)))
    assert leaks == [Leak("train and test", "a", "a", 1, "array of shape (2, 3)")]
