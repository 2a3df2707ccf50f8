"""Labels are identified by their text: 1 and "1" are one label, and so are NFC and NFD."""

from __future__ import annotations

import json
import unicodedata

import pytest

import foretune
import tiny_models
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.prompts import PromptClassification
from foretune.tasks.splits import carve
from foretune.tasks.task import Task, TaskCollection
from foretune.training.shots import draw_shots

TOKENIZER = tiny_models.tokenizer()
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def rows(*labels):
    return [{"text": "the cat", "label": label} for label in labels]


def fitted(**labels):
    tasks = tuple(Task(name, rows(*of_task)) for name, of_task in labels.items())
    return Classification(TOKENIZER).fit(TaskCollection(tasks))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((0, 1, "0", "1"), (0, 1)),
        ((True, False, 1, "0"), (0, 1)),
        ((1.0, 2, "2"), (1, 2)),
        ((NFD, NFC, "tea"), (NFC, "tea")),
        (("tea ", "tea", " 1", 1), (1, "tea")),
        (("007", 7), (7, "007")),
        (("10", "9", "1"), ("1", "10", "9")),
    ],
)
def test_forms_of_one_label_are_one_output(labels, expected):
    objective = fitted(a=labels)
    assert objective.labels["a"] == expected
    encoded = [objective.encode(row, "a") for row in rows(*labels)]
    assert {row["label"] for row in encoded} == set(range(len(expected)))
    assert json.dumps(objective.output_labels("a")) == json.dumps(expected)


def test_forms_of_one_label_are_one_output_across_tasks():
    objective = fitted(a=(0, 1), b=("0", "1"), c=(1, "0"))
    assert objective.space == (0, 1)
    assert set(objective.labels.values()) == {(0, 1)}
    assert objective.encode({"text": "the", "label": "1"}, "b")["label"] == 1


def test_unseen_tasks_keep_the_form_that_the_head_was_trained_with():
    seen = fitted(a=("0", "1"))
    unseen = seen.fit(TaskCollection((Task("b", rows(1, 0)),)))
    assert unseen.space == ("0", "1")
    assert unseen.output_labels("b") == ("0", "1")
    assert unseen.encode(rows(1)[0], "b")["label"] == 1


def test_local_and_shared_ids_of_mixed_forms_agree():
    objective = fitted(a=(1, "2"), b=(2, 3))
    assert objective.space is None
    shared = objective.shared()
    assert shared.space == (1, 2, 3)
    assert [shared.encode(row, "b")["label"] for row in rows(2, "2", "3")] == [1, 1, 2]
    assert [objective.encode(row, "b")["label"] for row in rows(2, "2", "3")] == [0, 0, 1]


def test_shots_and_held_out_rows_count_both_forms_as_one_class():
    task = Task("a", rows(*[0, "0", 1, "1"] * 5), (), rows(0))
    tasks = TaskCollection((task,), Classification(TOKENIZER))
    [slot] = draw_shots(tasks, "classification", 2, 1, 0)
    assert len(slot.train) == 4
    carved = carve(Task("a", rows(0, "0", 1, "1")), validation=0, test=0.5, labelled=True)
    assert carved.test


def test_prompts_and_source_free_labels_have_the_same_rule():
    tasks = TaskCollection((Task("a", rows(NFC, NFD)),))
    objective = PromptClassification(TOKENIZER).fit(tasks)
    assert objective.labels["a"] == (NFC,)
    assert objective.encode(rows(NFD)[0], "a")["label"] == 0


def test_windows_without_training_labels_know_them_by_their_text():
    unlabelled = pytest.importorskip("foretune.source_free.unlabelled")
    source = Classification(labels={"s": (0, 1)}, space=(0, 1))
    target = unlabelled.Unlabelled(source=source)
    row = {"x": [1.0], "y": "1"}
    target.fit(TaskCollection((Task("t", [row], (), [row]),)))
    assert target.encode(row, "t")["label"] == 1


def test_a_saved_adapter_names_each_label_once(tmp_path):
    mixed = rows(0, "0", 1, "1")
    tasks = TaskCollection((Task("a", mixed, (), mixed),), Classification(TOKENIZER))
    run = foretune.Run(steps=1, batch_size=2, device="cpu", out=tmp_path / "out")
    foretune.adapt(tiny_models.bert(num_labels=2), tasks, foretune.LoRA(lora={"r": 1}), run)
    assert json.loads((tmp_path / "out" / "a" / "labels.json").read_text()) == [0, 1]
