"""Choice examples that move to validation get distractors that no training example has."""

from __future__ import annotations

import pytest

import foretune
from foretune.evaluation.held_out import build_search_tasks
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.example import DrawnExample
from foretune.tasks.redrawn import redraw_validation
from foretune.tasks.task import Task, TaskCollection
from tiny_models import tokenizer

NUM_CANDIDATES = 4


def dialogues(own: bool, num_tasks: int = 4) -> TaskCollection:
    """Held-out tasks of 24 training examples in groups of six, with drawn candidates."""
    tasks = [
        Task(
            f"t{t}",
            [
                {"context": f"say {t} {i}", "response": f"reply {t} {i}", "group": i // 6}
                for i in range(24)
            ],
        )
        for t in range(num_tasks)
    ]
    drawn = draw_candidates(
        TaskCollection(tuple(tasks)), NUM_CANDIDATES, pool=None if own else 8, own_task=own
    )
    return drawn.with_objective(foretune.Choice(tokenizer()))


def distractors(examples) -> set[str]:
    return {
        text
        for example in examples
        for place, text in enumerate(example["candidates"])
        if place != example["answer"]
    }


@pytest.mark.parametrize("own", [False, True], ids=["pool", "own task"])
def test_no_distractor_of_a_scored_example_was_trained_on(own):
    for task in build_search_tasks(dialogues(own), (4,), 0):
        assert len(task.validation) == 12
        trained = distractors(task.train)
        scored = distractors(task.validation)
        assert scored.isdisjoint(trained)
        own_replies = {f"reply {task.name[1:]} {i}" for i in range(24)}
        assert scored <= own_replies if own else scored.isdisjoint(own_replies)
        for example in task.validation:
            texts, answer = example["candidates"], example["answer"]
            assert len(set(texts)) == NUM_CANDIDATES
            assert texts[answer] == example["context"].replace("say", "reply")
            assert isinstance(example, DrawnExample) and example["group"] >= 0


def test_training_examples_and_the_draw_of_a_seed_stay():
    first, second, other = (
        build_search_tasks(dialogues(False), (4,), 0),
        build_search_tasks(dialogues(False), (4,), 0),
        redraw_validation(build_search_tasks(dialogues(False), (4,), 0), 1),
    )
    for a, b, c in zip(first, second, other, strict=True):
        assert list(a.validation) == list(b.validation) != list(c.validation)
        assert list(a.train) == list(b.train) == list(c.train)


def test_given_candidates_and_too_few_responses_are_left_alone():
    [alone] = build_search_tasks(dialogues(False, num_tasks=1), (4,), 0)
    assert distractors(alone.validation)  # no other task has responses to draw
    rows = [{"context": "a", "candidates": ["b", "c", str(i)], "answer": 1} for i in range(24)]
    given = TaskCollection((Task("a", rows), Task("b", rows)), foretune.Choice(tokenizer()))
    for task in build_search_tasks(given, (4,), 0):
        assert all(row in rows for row in [*task.train, *task.validation])
