"""A tie for the best score is no right answer, and a score that is NaN is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from foretune.errors import DivergedError, UserError
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.objectives.accuracy import accuracies, picks
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import TaskData, slot_of
from foretune.training.scoring import score_slots

TOKENIZER = tiny_models.tokenizer()
WORDS = ("red", "blue", "green", "cat")


class Constant(nn.Module):
    """Gives all texts and all classes the same value."""

    def __init__(self, value: float, outputs: int | None = None) -> None:
        super().__init__()
        self.weight, self.value, self.outputs = nn.Parameter(torch.zeros(1)), value, outputs

    def forward(self, input_ids, **_):
        shape = (len(input_ids), self.outputs) if self.outputs else (*input_ids.shape, 7)
        return torch.full(shape, self.value) + self.weight


def choices(answer=0):
    row = {"context": "the dog", "candidates": list(WORDS), "answer": answer}
    return Task("t", [row], (), [row] * 3)


def scored(model, objective, task):
    objective = objective.fit(TaskCollection((task,)))
    return score_slots(model, TaskData([slot_of(task)], objective), "test")[0], objective.chance()


@pytest.mark.parametrize("scoring", ["bi-encoder", "cross-encoder"])
@pytest.mark.parametrize("answer", [0, 3])
def test_a_model_with_one_answer_for_all_candidates_is_at_chance(scoring, answer):
    model = Constant(1.0, 2 if scoring == "cross-encoder" else None)
    score, chance = scored(model, Choice(TOKENIZER, scoring=scoring), choices(answer))
    assert score == chance == 0.25


def test_a_classifier_with_equal_logits_is_at_chance_among_the_labels_of_the_task():
    rows = [{"text": "the cat", "label": name} for name in ("no", "yes")]
    score, chance = scored(
        Constant(0.5, 5), Classification(TOKENIZER), Task("t", rows, (), rows[:1] * 2)
    )
    assert score == chance == 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_nan_names_task_and_row(value):
    rows = [{"text": "the cat", "label": name} for name in ("no", "yes")]
    with pytest.raises(DivergedError, match=r'task "t", test row 1: the score is nan'):
        scored(Constant(torch.nan, 2), Classification(TOKENIZER), Task("t", rows, (), rows[:1]))
    with pytest.raises(DivergedError, match=r'task "t", test row 1: the score is nan'):
        scored(Constant(value), Choice(TOKENIZER), choices())


def test_source_free_scores_share_ties_too():
    source = Classification(labels={"s": (0, 1)}, space=(0, 1))
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    row = {"x": [1.0, 2.0], "y": 0}
    unlabelled = pytest.importorskip("foretune.source_free.unlabelled")
    score, chance = scored(model, unlabelled.Unlabelled(source=source), Task("t", [row], (), [row]))
    assert score == chance == 0.5


def test_a_tie_is_half_a_prediction_in_the_report_of_classes():
    shares = picks(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist()
    classes = pytest.importorskip("foretune.source_free.classes")
    report = classes.class_report([0, 1], shares, ["walk", "sit"])
    assert report["accuracy"] == 0.75
    assert [c["predicted"] for c in report["classes"]] == [0.5, 1.5]


def test_options_that_do_not_count_share_nothing():
    scores = torch.tensor([[2.0, 2.0, -torch.inf]])
    assert accuracies(scores, torch.tensor([1])).tolist() == [0.5]


# --- candidates that no model can tell apart


def test_candidates_that_are_cut_to_the_same_tokens_are_named():
    row = {"context": "a", "candidates": ["the cat sat on", "red", "the cat sat"], "answer": 0}
    objective = Choice(TOKENIZER, max_response_tokens=5)
    with pytest.raises(UserError, match=r"candidates 1 and 3 are the same to the model .*above 5"):
        objective.encode(row, "t")
    assert Choice(TOKENIZER, max_response_tokens=6).encode(row, "t")["answer"] == 0


@pytest.mark.parametrize("answer", [0, 2])
def test_a_right_answer_that_is_also_a_distractor_is_refused(answer):
    row = {"context": "a", "candidates": ["the cat", "red", "the cat"], "answer": answer}
    with pytest.raises(UserError, match=r'task "t", train row 1: candidates 1 and 3 are the same'):
        Choice(TOKENIZER).fit(TaskCollection((Task("t", [row]),)))


def test_drawn_candidates_that_are_cut_to_the_same_tokens_tie():
    rows = [{"context": "a", "response": f"the cat sat {word}"} for word in WORDS]
    tasks = draw_candidates(TaskCollection((Task("t", rows, (), rows),)), 4, own_task=True)
    objective = Choice(TOKENIZER, max_response_tokens=5)
    score, chance = scored(tiny_models.bert(), objective, tasks.tasks[0])
    assert score == chance == 0.25
