"""The held-out seen tasks on which ways to adapt are scored."""

from __future__ import annotations

import pytest

import foretune
from foretune.evaluation.held_out import build_search_tasks
from linear_tasks import family


@pytest.mark.parametrize(("shots", "halved"), [((4, 12), True), ((4, 13), False), ((None,), False)])
def test_half_of_the_training_rows_are_scored_where_the_rest_is_enough(shots, halved):
    tasks = family(2, rows=24, validation=8, test=8)
    for task in build_search_tasks(tasks, shots, 0):
        assert (len(task.train), len(task.validation)) == ((12, 20) if halved else (24, 8))
        remaining = {row["x"].tobytes() for part in (task.train, task.validation) for row in part}
        assert remaining.isdisjoint(row["x"].tobytes() for row in tasks[task.name].test)


def test_groups_of_rows_are_not_cut_in_two():
    rows = [{"x": [float(i)], "y": [0.0], "dialogue": i // 6} for i in range(24)]
    tasks = foretune.TaskCollection((foretune.Task("a", rows),), family(1).objective)
    [task] = build_search_tasks(tasks, (4,), 0, "dialogue")
    sides = [{row["dialogue"] for row in part} for part in (task.train, task.validation)]
    assert all(sides) and sides[0].isdisjoint(sides[1])
