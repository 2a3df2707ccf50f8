"""Tasks with few rows and many labels: what can be held out is, and what cannot is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foretune.errors import UserError
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.splits import cut_train, label_of
from foretune.tasks.task import Task


def rows(labels, task="a"):
    return [
        {"task": task, "text": f"{task} {i}", "label": x, "shop": 1} for i, x in enumerate(labels)
    ]


def unseen_of(folder: Path, labels, **fields):
    path = folder / "rows.jsonl"
    lines = rows("xyxyxyxyxy", "seen") + rows(labels)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return load_tasks(Source(source=str(path), unseen=["a"], **fields), "classification")[1]["a"]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("twin", range(1, 5))
@pytest.mark.parametrize("seed", range(3))
def test_five_rows_with_four_labels_leave_one_for_test(tmp_path, place, twin, seed):
    labels = list("drpa")
    labels.insert(place, labels[twin - 1])
    task = unseen_of(tmp_path, labels, seed=seed)
    assert [len(task.train), len(task.validation), len(task.test)] == [4, 0, 1]
    assert label_of(task.test[0]) == labels[place]
    assert {label_of(row) for row in task.train} == set(labels)


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        ("drpa", {}, "has 4 rows with 4 labels, so none can be held out .* with min_rows=5$"),
        ("d", {}, "has 1 training row, too few to hold one .* with min_rows=2$"),
        ("dddd", {"group_column": "shop"}, "has 4 rows of one group, .* with min_rows=5$"),
        (
            "dddd",
            {"test": 0},
            "has no rows of split test and test=0 moves none there: set test to a share",
        ),
    ],
)
def test_a_task_without_test_rows_says_why_and_what_would_do(tmp_path, labels, fields, message):
    with pytest.raises(UserError, match=f'unseen task "a" {message}'):
        unseen_of(tmp_path, labels, **fields)


def test_the_way_on_works(tmp_path):
    with pytest.raises(UserError, match=r"not a task of .* with min_rows=5"):
        unseen_of(tmp_path, "drpa", min_rows=5)


@pytest.mark.parametrize("seed", range(5))
def test_fewer_train_rows_keep_one_of_each_label(seed):
    task = Task("a", rows("x" * 20 + "y" + "x" * 20 + "z"))
    cut = cut_train(task, 4, seed, labelled=True)
    assert len(cut.train) == 4
    assert {label_of(row) for row in cut.train} == set("xyz")
    assert [row["text"] for row in cut.train] == [
        row["text"] for row in task.train if row in cut.train
    ]


def test_a_cut_that_loses_no_label_is_drawn_as_without_labels():
    task = Task("a", rows("xy" * 20))
    assert cut_train(task, 12, labelled=True) == cut_train(task, 12)


def test_more_labels_than_rows_are_refused():
    with pytest.raises(UserError, match=r"has 5 labels, .* set max_rows to 5 or more"):
        cut_train(Task("a", rows("vwxyz" * 3)), 4, labelled=True)
