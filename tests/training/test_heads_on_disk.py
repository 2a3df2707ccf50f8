"""Heads and labels as stock loaders find them, where tasks have not the base's number of labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import foretune
import tiny_models
from command_line import call, the_error
from foretune import PEFTML, Classification, Full, LoRA, Run, Standard, Task, TaskCollection
from foretune.recipes.model_card import model_card

WORDS = ["the", "cat", "dog", "house", "tree", "car", "red", "blue", "green", "runs"]
STEPS = Run(steps=4, batch_size=4, device="cpu")


def task(name: str, labels: Sequence[object]) -> Task:
    rows = [
        {"text": f"{name} {word} {i}", "label": label}
        for i, word in enumerate(WORDS[:4])
        for label in labels
    ]
    return Task(name, train=rows, validation=rows[:2], test=rows[2:])


def collection(**labels: Sequence[object]) -> TaskCollection:
    tasks = [task(name, task_labels) for name, task_labels in labels.items()]
    return TaskCollection(tasks, Classification(tiny_models.tokenizer()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> foretune.training.outcome.Outcome:
    """Retrained on tasks of five and of three labels, so its head has five outputs."""
    out = tmp_path_factory.mktemp("base")
    seen = collection(a="vwxyz", b="xyz")
    run = STEPS.replace(out=out, overwrite=True)
    return foretune.retrain(tiny_models.bert(num_labels=5), seen, PEFTML(lora={"r": 2}), run)


def stock(base: Path, adapter: Path, **changes: object) -> torch.nn.Module:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **changes)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def accuracy(model: torch.nn.Module, tasks: TaskCollection, name: str, labels: list[str]) -> float:
    """Of a task's test rows, by the labels that lie beside the adapter."""
    correct = []
    for row in tasks[name].test:
        inputs = tasks.objective.tokenizer(row["text"], return_tensors="pt")
        logits = model(**inputs).logits[0, : len(labels)]
        correct.append(labels[int(logits.argmax())] == row["label"])
    return sum(correct) / len(correct)


def test_fewer_labels_than_the_base(base, tmp_path):
    unseen = collection(new=["no", "yes"])
    run = STEPS.replace(steps=20, out=tmp_path)
    adapted = foretune.adapt(base.model, unseen, LoRA(lora={"r": 2}, learning_rate=1e-2), run)
    labels = json.loads((tmp_path / "new" / "labels.json").read_text())
    assert labels == ["no", "yes"] and adapted.num_labels is None
    loaded = stock(base.run.out / "base", tmp_path / "new")
    assert accuracy(loaded, unseen, "new", labels) == adapted.scores["new", 0]

    # The width of the base's head does not matter to what is learnt.
    narrow = tiny_models.bert(num_labels=2)
    same = {k: v for k, v in base.model.state_dict().items() if "classifier" not in k}
    narrow.load_state_dict(same, strict=False)
    for mine, its in zip(base.model.parameters(), narrow.parameters(), strict=True):
        its.requires_grad_(mine.requires_grad)
    local = unseen.with_objective(unseen.objective.fit(collection(a="vw", b="xy")))
    again = foretune.adapt(
        narrow, local, LoRA(lora={"r": 2}, learning_rate=1e-2), run.replace(out=None)
    )
    for key, value in again.tensors["new", 0].items():
        torch.testing.assert_close(adapted.tensors["new", 0][key][: len(value)], value)


def test_more_labels_than_the_base(base, tmp_path):
    unseen = collection(few=["no", "yes"], many="abcdefg")
    adapted = foretune.adapt(base.model, unseen, LoRA(lora={"r": 2}), STEPS.replace(out=tmp_path))
    assert adapted.num_labels == 7
    for name in unseen.names:
        labels = json.loads((tmp_path / name / "labels.json").read_text())
        wide = stock(
            base.run.out / "base", tmp_path / name, num_labels=7, ignore_mismatched_sizes=True
        )
        assert accuracy(wide, unseen, name, labels) == adapted.scores[name, 0]


def test_the_page_of_a_comparison_loads_the_wide_head(base, tmp_path, monkeypatch):
    shutil.copytree(base.run.out / "base", tmp_path / "base")
    unseen = collection(few=["no", "yes"], many="abcdefg")
    lora = LoRA(lora={"r": 2})
    run, keep = STEPS, tmp_path / "adapters"
    comparison = foretune.compare(
        {"base": base}, unseen, adapt=lora, run=run, shots=(1,), keep=keep
    ).to_dict()
    monkeypatch.chdir(tmp_path)
    comparison["bases"][0]["path"] = "base"
    exec(model_card(comparison).partition("```python\n")[2].partition("```")[0], shown := {})
    assert shown["model"].get_base_model().classifier.modules_to_save.default.out_features == 7


def test_adapt_says_how_to_load_a_wide_head(base, tmp_path):
    rows = [dict(row, task="new") for row in task("new", "abcdefg").train]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--tasks", str(tmp_path / "new.jsonl"), "--out", str(tmp_path / "out"), "steps=1"]
    result = call("adapt", str(base.run.out / "base"), *words)
    assert result.exit_code == 0
    code = result.stdout.partition("load them like this:\n")[2]
    exec(code, shown := {})
    assert shown["model"].get_base_model().classifier.modules_to_save.default.out_features == 7
    full = foretune.adapt(base.model, collection(new="abcdefg"), Full(), STEPS)
    assert full.num_labels is None, "a whole model brings its head"


def test_a_head_that_the_base_never_had_is_in_the_adapter(tmp_path):
    """One label set in all tasks, which would share the base's head; but that is wider."""
    model = tiny_models.bert(num_labels=4)
    model.save_pretrained(tmp_path / "base")
    unseen = collection(c=["no", "yes"], d=["no", "yes"])
    run = STEPS.replace(steps=20, out=tmp_path / "new")
    adapted = foretune.adapt(model, unseen, LoRA(lora={"r": 2}, learning_rate=1e-2), run)
    loaded = stock(tmp_path / "base", tmp_path / "new" / "c")
    assert accuracy(loaded, unseen, "c", ["no", "yes"]) == adapted.scores["c", 0]
    assert any("classifier" in key for key in adapted.tensors["c", 0])


def test_labels_stand_in_the_config_of_whole_models(tmp_path):
    seen = collection(a=["no", "yes", 3], b=["no", "yes", 3])
    run = STEPS.replace(out=tmp_path / "run")
    outcome = foretune.retrain(tiny_models.bert(num_labels=3), seen, Standard(), run)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "base")
    assert config.id2label == {0: "3", 1: "no", 2: "yes"} and config.label2id["yes"] == 2

    relabelled = collection(c=["no", "yes"]).with_objective(outcome.objective)
    adapted = foretune.adapt(outcome.model, relabelled, LoRA(lora={"r": 2}), STEPS)
    assert adapted.labels == {"c": (None, "no", "yes")}, "the base's head; 3 does not count"

    new = collection(c=["high", "low"])
    foretune.adapt(outcome.model, new, Full(), STEPS.replace(out=tmp_path / "full"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "full" / "c")
    assert config.id2label == {0: "high", 1: "low", 2: "LABEL_2"}
    assert json.loads((tmp_path / "full" / "c" / "labels.json").read_text()) == ["high", "low"]


def test_adapters_of_seen_tasks_have_labels_too(base):
    folder = base.run.out / "adapters"
    assert json.loads((folder / "b" / "labels.json").read_text()) == ["x", "y", "z"]
    config = transformers.AutoConfig.from_pretrained(base.run.out / "base")
    assert config.id2label[0] == "LABEL_0", "the tasks' labels are their own: the base has none"


def test_bases_with_other_tokens_or_labels_are_not_compared(tmp_path):
    """All bases are given the same token and label ids: those of the first."""
    folders = {}
    for name, labels in {
        "one": ["no", "yes"],
        "labels": ["high", "low"],
        "tokens": ["no", "yes"],
    }.items():
        seen = collection(a=labels, b=labels)
        if name == "tokens":
            seen.objective.tokenizer.add_tokens(["other"])
        folders[name] = tmp_path / name / "base"
        foretune.retrain(
            tiny_models.bert(num_labels=2), seen, Standard(), STEPS.replace(out=tmp_path / name)
        )
    (tmp_path / "x.jsonl").write_text(
        "".join(
            json.dumps({"task": "c", "text": f"{i} {word}", "label": "yes" if i % 2 else "no"})
            + "\n"
            for i, word in enumerate(WORDS * 3)
        )
    )
    words = ["--tasks", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--shots", "1", "steps=1"]
    for base_name, reason in (("labels", "for other labels"), ("tokens", "another tokenizer")):
        assert reason in the_error("compare", folders["one"], folders[base_name], *words)
        assert not (tmp_path / "out").exists()


def test_a_shared_head_of_unknown_width_stays_the_bases():
    """Of a head without `nn.Linear` nothing tells that it does not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 4), nn.ReLU(), Conv1D(2, 8))
    rows = [{"x": np.full(4, i, dtype=np.float32), "y": i % 2} for i in range(8)]
    tasks = [Task(name, train=rows, validation=rows[:2], test=rows[2:]) for name in "cd"]
    unseen = TaskCollection(tasks, Classification())
    adapted = foretune.adapt(model, unseen, LoRA(lora={"r": 2, "target_modules": ["0"]}), STEPS)
    assert {key.partition(".lora_")[0] for key in adapted.tensors["c", 0]} == {"base_model.model.0"}
