"""The held-out seen tasks on which ways to adapt are scored."""

from __future__ import annotations

import pytest

import foretune
from foretune.evaluation.held_out import build_search_tasks
from linear_tasks import family


@pytest.mark.parametrize(
    ("shots", "scored"), [((4, 12), 12), ((4, None), 12), ((None,), 12), ((13,), 7), ((23,), 0)]
)
def test_as_many_training_rows_are_scored_as_the_shots_leave(shots, scored):
    tasks = family(2, rows=24, validation=8, test=8)
    for task in build_search_tasks(tasks, shots, 0):
        assert (len(task.train), len(task.validation)) == (24 - scored, 8 + scored)
        remaining = {row["x"].tobytes() for part in (task.train, task.validation) for row in part}
        assert remaining.isdisjoint(row["x"].tobytes() for row in tasks[task.name].test)


def test_no_label_is_lost_where_all_rows_are_adapted_on():
    rows = [{"x": [float(i)], "label": "rare" if i == 3 else "common"} for i in range(20)]
    tasks = [foretune.Task(f"t{i}", rows, rows[:2]) for i in range(8)]
    collection = foretune.TaskCollection(tuple(tasks), foretune.Classification())
    for task in build_search_tasks(collection, (None,), 0):
        assert {row["label"] for row in task.train} == {"rare", "common"}
        assert len(task.train) < 20 or len(task.validation) == 2


def test_groups_of_rows_are_not_cut_in_two():
    rows = [{"x": [float(i)], "y": [0.0], "dialogue": i // 6} for i in range(24)]
    tasks = foretune.TaskCollection((foretune.Task("a", rows),), family(1).objective)
    [task] = build_search_tasks(tasks, (4,), 0, "dialogue")
    sides = [{row["dialogue"] for row in part} for part in (task.train, task.validation)]
    assert all(sides) and sides[0].isdisjoint(sides[1])
