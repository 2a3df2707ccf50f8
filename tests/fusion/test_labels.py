"""Adapters that foretune made are fused with the labels of their tasks."""

from __future__ import annotations

import foretune
import tiny_models
from foretune import PEFTML, SMILE, Classification, LoRA, Run, Task, TaskCollection

STEPS = Run(steps=4, batch_size=4, device="cpu")


def collection(**labels):
    """Tasks with these labels, four examples of each."""
    tasks = []
    for name, task_labels in labels.items():
        examples = [
            {"text": f"{name} {word}", "label": label}
            for word in ("the", "cat", "dog", "house")
            for label in task_labels
        ]
        tasks.append(Task(name, train=examples, validation=examples[:2], test=examples[2:]))
    return TaskCollection(tasks, Classification(tiny_models.tokenizer()))


def test_fusing_knows_the_labels(tmp_path):
    """The base was retrained on tasks of five and of three labels, so its head has five outputs."""
    run = STEPS.replace(out=tmp_path / "base")
    seen = collection(a="vwxyz", b="xyz")
    base = foretune.retrain(tiny_models.bert(num_labels=5), seen, PEFTML(lora={"r": 2}), run)
    unseen = collection(c=["no", "yes"], d=["high", "low", "middle"])
    foretune.adapt(base.model, unseen, LoRA(lora={"r": 2}), STEPS.replace(out=tmp_path / "new"))
    folders = {name: tmp_path / "new" / name for name in unseen.names}
    fused = foretune.fuse(base.run.out / "base", folders, SMILE())
    spare = {i: f"LABEL_{i}" for i in range(5)}
    assert fused.labels["c"] == spare | {0: "no", 1: "yes"}
    assert fused.labels["d"] == spare | {0: "high", 1: "low", 2: "middle"}
