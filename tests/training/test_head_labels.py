"""The labels of a head decide whether tasks use it; its width does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import foretune
import tiny_models
from foretune import Classification, Full, LoRA, NoRetraining, Run, Standard, Task, TaskCollection
from foretune.errors import UserError
from foretune.models.loading import load_base, load_model, load_module, save_base
from foretune.models.surgery import head_labels, head_modules

WORDS = {"sad": ["red", "blue"], "happy": ["cat", "dog"], "plain": ["one", "two"]}
ORDER = ["sad", "plain", "happy"]  # of the fine-tuned classifier's outputs; not alphabetical
STEPS = Run(steps=3, batch_size=6, device="cpu")
TUNED = {"learning_rate": 1e-2, "lora": {"r": 2}}


def tasks(labels: Sequence[str], names: str = "ab", meaning: Sequence[str] = ()) -> TaskCollection:
    """Tasks of texts whose words tell the label, which is the word's `meaning` by default."""

    def rows(count: int, start: int) -> list[dict[str, Any]]:
        return [
            {"text": f"the {WORDS[m][(i + start) % 2]} sat on {WORDS[m][i % 2]}", "label": label}
            for i in range(count)
            for label, m in zip(labels, meaning or labels, strict=True)
        ]

    made = [Task(n, train=rows(4, 0), validation=rows(1, 1), test=rows(4, 1)) for n in names]
    return TaskCollection(made, Classification(tiny_models.tokenizer()))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier that a user fine-tuned, with an `id2label` of its own."""
    folder = tmp_path_factory.mktemp("classifier")
    names = {"id2label": dict(enumerate(ORDER)), "label2id": {v: i for i, v in enumerate(ORDER)}}
    model = tiny_models.bert(num_labels=3, initializer_range=0.2, **names)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rows = tasks(ORDER)["a"]
    tokenizer = tiny_models.tokenizer()
    inputs = tokenizer([row["text"] for row in (*rows.train, *rows.test)], return_tensors="pt")
    target = torch.tensor([ORDER.index(row["label"]) for row in (*rows.train, *rows.test)])
    for _ in range(30):
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_base(model, tokenizer, folder)
    return folder


def stock(base: Path, adapter: Path, seed: int, num_labels: int = 2) -> Any:
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(base, num_labels=num_labels)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def accuracy(model: Any, task: Task, labels: Sequence[str]) -> float:
    inputs = tiny_models.tokenizer()([row["text"] for row in task.test], return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    predicted = [labels[i] for i in logits.argmax(1).tolist()]
    return float(np.mean([p == row["label"] for p, row in zip(predicted, task.test, strict=True)]))


@pytest.mark.parametrize("labels", [ORDER, sorted(ORDER), ["happy", "sad"]])
def test_a_classifier_that_is_right_stays_right_under_its_names(classifier, labels, tmp_path):
    unseen = tasks(labels)
    model, _ = load_model(classifier, head="classification", num_labels=len(labels), labels=labels)
    record = foretune.compare(
        {"own": model}, unseen, adapt=LoRA(**TUNED), run=STEPS, shots=(1,)
    ).to_dict()
    assert {row["score"] for row in record["scores"] if row["shots"] == 0} == {1.0}
    outcome = foretune.retrain(model, unseen, NoRetraining(), STEPS.replace(out=tmp_path))
    assert outcome.validation_score == 1.0
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    assert saved.id2label == dict(enumerate(ORDER))
    adapted = foretune.adapt(model, unseen, LoRA(**TUNED), STEPS)
    assert adapted.labels["a"] == tuple(n if n in labels else None for n in ORDER)
    assert not any(k.endswith("classifier.weight") for k in adapted.tensors["a", 0])


def test_a_retrained_classifier_keeps_its_order(classifier, tmp_path):
    model, _ = load_base(classifier)
    foretune.retrain(model, tasks(sorted(ORDER)), Standard(), STEPS.replace(out=tmp_path))
    again, _ = load_base(tmp_path / "base")
    assert again.config.id2label == dict(enumerate(ORDER)) and head_labels(again) == tuple(ORDER)


def test_two_unseen_tasks_that_share_the_labels_of_a_retrained_base_use_its_head(tmp_path):
    seen = tasks(["sad", "happy"])
    outcome = foretune.retrain(
        tiny_models.bert(num_labels=2), seen, Standard(), STEPS.replace(out=tmp_path)
    )
    unseen = tasks(["sad", "happy"], "cd")
    for model in (outcome.model, load_base(tmp_path / "base")[0]):
        assert head_labels(model) == ("happy", "sad")
        adapted = foretune.adapt(model, unseen, LoRA(**TUNED), STEPS)
        assert not any(k.endswith("classifier.weight") for k in adapted.tensors["c", 0])


@pytest.mark.parametrize("method", [LoRA(**TUNED), Full()])
def test_other_labels_get_a_fresh_head_although_it_has_their_number(classifier, method):
    model, _ = load_base(classifier)
    other = tasks(["x", "y", "z"], meaning=["plain", "happy", "sad"])
    adapted = foretune.adapt(model, other, method, STEPS.replace(steps=1))
    if isinstance(method, LoRA):
        fresh = adapted.tensors["a", 0]["base_model.model.classifier.weight"]
    else:
        fresh = adapted.models["a", 0].classifier.weight
    assert torch.cosine_similarity(fresh, model.classifier.weight).abs().max() < 0.95
    assert adapted.labels["a"] == ("x", "y", "z")
    record = foretune.compare({"own": model}, other, adapt=method, run=STEPS, shots=(1,)).to_dict()
    assert not [row for row in record["scores"] if row["shots"] == 0], "it knows none of them"


def test_retraining_on_other_labels_starts_from_a_fresh_head(classifier):
    model, _ = load_base(classifier)
    other = tasks(["x", "y", "z"], meaning=["plain", "happy", "sad"])
    outcome = foretune.retrain(model, other, NoRetraining(), STEPS)
    assert not torch.equal(outcome.model.classifier.weight, model.classifier.weight)
    assert head_labels(outcome.model) is None, "nothing has learnt them"


@pytest.mark.parametrize("drawn", [True, False])
def test_an_untrained_head_stands_for_the_labels_only_if_it_was_drawn_for_them(drawn, tmp_path):
    """One that was stored under default names has learnt something, but nobody knows what."""
    save_base(tiny_models.bert(num_labels=None if drawn else 2), None, tmp_path)
    model, _ = load_model(tmp_path, head="classification", num_labels=2)
    outcome = foretune.retrain(model, tasks(["sad", "happy"]), NoRetraining(), STEPS)
    assert head_labels(outcome.model) == (("happy", "sad") if drawn else None)


@pytest.mark.parametrize("name_them", [False, True])
@pytest.mark.parametrize("pooler", [True, False])
def test_a_head_that_no_checkpoint_holds_travels_with_the_adapter(name_them, pooler, tmp_path):
    """Loaded by stock PEFT over the encoder, whatever head and pooler transformers draws."""
    encoder = tiny_models.bert(initializer_range=0.2)
    if not pooler:  # as pretrained with masked words
        encoder = transformers.BertForMaskedLM(encoder.config)
    encoder.save_pretrained(tmp_path / "encoder")
    names = {"id2label": {0: "sad", 1: "happy"}} if name_them else {}
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "encoder", **names
    ).eval()
    adapted = foretune.adapt(model, tasks(["happy", "sad"]), LoRA(**TUNED), STEPS.replace(steps=30))
    adapted.save(tmp_path / "adapters")
    labels = json.loads((tmp_path / "adapters" / "a" / "labels.json").read_text())
    assert labels == (["sad", "happy"] if name_them else ["happy", "sad"])
    for seed in range(3):
        loaded = stock(tmp_path / "encoder", tmp_path / "adapters" / "a", seed)
        score = accuracy(loaded, tasks(["happy", "sad"])["a"], labels)
        assert score == adapted.scores["a", 0] > 0.6


def test_the_head_of_a_cross_encoder_travels_too(tmp_path):
    """It has no labels: its two outputs say whether a candidate is right."""
    save_base(tiny_models.bert(initializer_range=0.2), tiny_models.tokenizer(), tmp_path / "x")
    names = {"id2label": {0: "wrong", 1: "right"}}
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "x", **names).eval()
    rows = [
        {"context": f"the {word}", "candidates": ["a cat", "a dog"], "answer": i}
        for i, word in enumerate(("cat", "dog"))
    ] * 4
    objective = foretune.Choice(tiny_models.tokenizer(), scoring="cross-encoder")
    pairs = TaskCollection([Task("a", train=rows, test=rows)], objective)
    adapted = foretune.adapt(model, pairs, LoRA(**TUNED), STEPS)
    head = adapted.tensors["a", 0]["base_model.model.classifier.weight"]
    assert head.shape == model.classifier.weight.shape
    kept = foretune.retrain(model, pairs, Standard(), STEPS).model
    assert kept.config.id2label == names["id2label"]


@pytest.mark.parametrize(
    ("config_class", "model_class", "heads"),
    [
        (transformers.EuroBertConfig, transformers.EuroBertModel, ["dense", "classifier"]),
        (transformers.ModernBertConfig, transformers.ModernBertModel, ["head", "classifier"]),
        (transformers.XLMConfig, transformers.XLMModel, ["sequence_summary"]),
    ],
)
def test_all_layers_of_a_head_are_drawn_and_travel(config_class, model_class, heads, tmp_path):
    sizes = {**tiny_models.SIZES, "num_hidden_layers": 2}
    if config_class is transformers.XLMConfig:
        sizes = {"vocab_size": 24, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0}
    save_base(model_class(config_class(**sizes)), tiny_models.tokenizer(), tmp_path / "encoder")
    model, _ = load_model(tmp_path / "encoder", head="classification", num_labels=3)
    assert head_modules(model) == heads
    adapted = foretune.adapt(model, tasks(ORDER), LoRA(**TUNED), STEPS.replace(steps=20))
    adapted.save(tmp_path / "adapters")
    labels = json.loads((tmp_path / "adapters" / "a" / "labels.json").read_text())
    loaded = stock(tmp_path / "encoder", tmp_path / "adapters" / "a", 1, num_labels=3)
    assert accuracy(loaded, tasks(ORDER)["a"], labels) == pytest.approx(adapted.scores["a", 0])


def test_an_encoder_without_a_head_is_refused_at_once():
    for verb, method in ((foretune.adapt, LoRA()), (foretune.retrain, Standard())):
        with pytest.raises(UserError, match="BertModel has no classification head: load the model"):
            verb(tiny_models.bert(), tasks(ORDER), method, STEPS)


MODULE = """
import torch
from torch import nn

class Own(nn.Module):
    head_modules = ["out"]

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)))

def build():
    return Own()
"""


def arrays(labels: Sequence[object]) -> TaskCollection:
    rows = [
        {"x": np.full(4, i % 3, dtype=np.float32), "y": labels[i % len(labels)]} for i in range(12)
    ]
    made = [Task(name, train=rows, validation=rows[:3], test=rows[:6]) for name in "ab"]
    return TaskCollection(made, Classification())


@pytest.mark.parametrize("labels", [(7, 3), tuple("stuvwxyz")])
def test_a_module_whose_head_was_resized_is_saved_and_loaded_with_its_labels(labels, tmp_path):
    """Its Python file builds five outputs; the tasks have fewer, or more."""
    (tmp_path / "own.py").write_text(MODULE)
    model = load_module(tmp_path / "own.py")
    outcome = foretune.retrain(model, arrays(labels), Standard(), STEPS.replace(out=tmp_path / "r"))
    again, _ = load_base(tmp_path / "r" / "base")
    assert again.out.out_features == len(labels)
    assert head_labels(again) == tuple(map(str, sorted(labels)))
    x = torch.ones(2, 4)
    assert torch.equal(again(x), outcome.model.cpu()(x))
    adapted = foretune.adapt(again, arrays(labels), LoRA(lora={"r": 2}), STEPS)
    assert not any("out.weight" in key for key in adapted.tensors["a", 0])


def test_rows_of_arrays_are_images_whatever_the_tokenizer(tmp_path):
    """CLIP's folder has a tokenizer, and its images are classified all the same."""
    save_base(tiny_models.clip(), tiny_models.tokenizer(), tmp_path)
    model, tokenizer = load_model(tmp_path, head="image-classification", num_labels=2)
    rows = [{"x": np.full((3, 8, 8), i % 2, dtype=np.float32), "y": i % 2} for i in range(8)]
    made = [Task(name, train=rows, test=rows) for name in "ab"]
    images = TaskCollection(made, Classification(tokenizer))
    adapted = foretune.adapt(model, images, LoRA(lora={"r": 2}), STEPS)
    assert set(adapted.scores) == {("a", 0), ("b", 0)}
