"""Classification by label names: scores from prompts, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foretune
import tiny_models
from foretune import PromptClassification, Run, Task, TaskCollection
from foretune.errors import UserError
from foretune.tasks.objectives import make_objective
from foretune.tasks.objectives.prompt_templates import IMAGES, TEXTS

ROWS = [
    {"text": "the red_cat sat", "label": "cat"},
    {"text": "a dog", "label": "dog"},
    {"text": "one two three", "label": "green_mat"},
]
FEW = [{"text": "the cat", "label": "cat"}, {"text": "a b c d e", "label": "dog"}]
TASKS = TaskCollection((Task("many", ROWS, (), ROWS), Task("few", FEW, (), FEW)))


def objective(**fields: Any) -> PromptClassification:
    return PromptClassification(tiny_models.tokenizer(), **fields)


def test_scores_are_those_of_mean_pooled_cosines_written_out() -> None:
    model, tokenizer = tiny_models.bert(initializer_range=0.4), tiny_models.tokenizer()
    fitted = objective(templates=("a {}", "the {} sat")).fit(TASKS).bind(model)

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return F.normalize(model(ids).last_hidden_state.mean(1)[0], dim=-1)

    rows = [fitted.encode(r, "many") for r in ROWS] + [fitted.encode(r, "few") for r in FEW]
    batch = fitted.collate(rows, [0, 0, 0, 1, 1])
    losses = fitted.losses(model, batch)
    torch.testing.assert_close(fitted.scores_and_losses(model, batch)[1], losses)
    for i, row in enumerate([*ROWS, *FEW]):
        names = ["cat", "dog", "green mat"][: 3 if i < 3 else 2]
        classes = [F.normalize(embed(f"a {n}") + embed(f"the {n} sat"), dim=-1) for n in names]
        logits = torch.stack(classes) @ embed(row["text"]) / 0.05
        label = names.index(row["label"].replace("_", " "))
        torch.testing.assert_close(losses[i], -logits.log_softmax(0)[label], rtol=1e-4, atol=1e-5)
        assert fitted.scores(model, batch)[i] == float(logits.argmax() == label)


def test_the_model_s_own_scale_is_the_temperature_unless_one_is_given() -> None:
    model = tiny_models.clip()
    rows = [{"x": np.zeros((3, 8, 8), "f4"), "y": "cat"}, {"x": np.ones((3, 8, 8), "f4"), "y": "a"}]
    tasks = TaskCollection((Task("one", rows, (), rows),))
    fitted = objective().fit(tasks).bind(model)
    assert fitted.temperature == pytest.approx(1 / model.logit_scale.exp().item())
    assert fitted.templates == IMAGES
    assert objective(temperature=0.5).fit(tasks).bind(model).temperature == 0.5
    assert objective().fit(TASKS).bind(tiny_models.bert()).templates == TEXTS


def test_binding_does_not_change_the_model() -> None:
    model = tiny_models.bert().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective().fit(TASKS).bind(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_default_sets_are_distinct_and_hold_one_blank_each() -> None:
    assert (len(set(IMAGES)), len(set(TEXTS))) == (80, 80)
    assert all(template.count("{}") == 1 for template in (*IMAGES, *TEXTS))


def test_the_record_survives_json() -> None:
    fitted = objective(templates=["a {}"], temperature=0.1).fit(TASKS)
    again = make_objective(tokenizer=fitted.tokenizer, **fitted.to_dict())
    assert again == fitted and again.labels == fitted.labels


def test_compare_scores_the_untouched_model_and_every_method() -> None:
    tasks = TASKS.with_objective(objective(templates=("a {}",)))
    run = foretune.Run(steps=2, batch_size=2, device="cpu")
    model = tiny_models.bert(num_hidden_layers=1)
    comparison = foretune.compare(
        {"none": model}, tasks, adapt=foretune.FDAlign(), run=run, shots=(1,)
    ).to_dict()
    assert {(s["task"], s["shots"]) for s in comparison["scores"]} == {
        (task, shots) for task in ("many", "few") for shots in (0, 1)
    }


@pytest.mark.parametrize("name", ["full", "head", "lora"])
def test_other_methods_adapt_by_label_names_too(name: str) -> None:
    rows = [
        {"x": np.full((3, 8, 8), i % 2 * 2 - 1, "f4"), "y": ("cat", "dog")[i % 2]} for i in range(4)
    ]
    tasks = TaskCollection((Task("one", rows, (), rows),), objective(templates=("a {}",)))
    run = foretune.Run(steps=2, batch_size=2, device="cpu")
    method = foretune.methods.make(name)
    adapted = foretune.adapt(tiny_models.clip(), tasks, method, run)
    assert set(adapted.scores) == {("one", 0)}
    if name == "head":
        assert list(adapted.tensors["one", 0]) == ["base_model.model.visual_projection.weight"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": "a {}"}, "templates must be a list of texts"),
        ({"templates": []}, "templates must be a list of texts"),
        ({"templates": ["a photo"]}, "a template must contain {} once, got 'a photo'"),
        ({"templates": ["{} {}"]}, "a template must contain {} once"),
        ({"temperature": 0}, "temperature must be a number not below 1e-06, got 0"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective(**fields)


def test_a_label_without_a_name_is_refused_by_its_place() -> None:
    rows = [{"x": np.zeros((3, 8, 8), "f4"), "y": 3}]
    with pytest.raises(
        UserError, match=r'task "one", train row 1: "y" must be the name of a class'
    ):
        objective().fit(TaskCollection((Task("one", rows),)))


def test_a_missing_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="need its tokenizer, got None"):
        PromptClassification().fit(TASKS).bind(tiny_models.bert())


def test_inputs_that_the_model_does_not_read_are_refused() -> None:
    fitted = objective(templates=("a {}",)).fit(TASKS)
    clip = fitted.bind(tiny_models.clip())
    batch = clip.collate([clip.encode(ROWS[0], "many")], [0])
    with pytest.raises(UserError, match="text examples need a sentence encoder such as minilm"):
        clip.losses(tiny_models.clip(), batch)
    rows = [{"x": np.zeros((3, 8, 8), "f4"), "y": "cat"}]
    tasks = TaskCollection((Task("one", rows, (), rows),))
    arrays = objective(templates=("a {}",)).fit(tasks).bind(tiny_models.bert())
    with pytest.raises(UserError, match="arrays need a model with an image and a text tower"):
        arrays.losses(tiny_models.bert(), arrays.collate([arrays.encode(rows[0], "one")], [0]))
    with pytest.raises(UserError, match=r"hidden states \(AutoModel\), got BertForSequence"):
        fitted.bind(tiny_models.bert(num_labels=2))


def test_an_unbound_objective_is_refused() -> None:
    fitted = objective().fit(TASKS)
    batch = fitted.collate([fitted.encode(ROWS[0], "many")], [0])
    with pytest.raises(UserError, match=r'task "many": call objective.bind\(model\)'):
        fitted.losses(tiny_models.bert(), batch)


def test_binding_returns_other_objectives_unchanged() -> None:
    plain = foretune.Classification(tiny_models.tokenizer())
    assert plain.bind(tiny_models.bert(num_labels=2)) == plain


class OpenClip(nn.Module):
    """The interface of open_clip's CLIP: `visual`, the text tower's parts, `encode_*`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.visual = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
            self.token_embedding = nn.Embedding(300, 16)
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Any) -> Any:
        return self.visual(image)

    def encode_text(self, text: Any) -> Any:
        return self.token_embedding(text).mean(1)


def tokens_of(texts: Any) -> Any:
    """As open_clip's tokenizers: (n, 40) ids."""
    return torch.tensor([[ord(c) % 300 for c in text.rjust(40)[-40:]] for text in texts])


def test_models_of_open_clip() -> None:
    rows = [
        {"x": np.full((3, 8, 8), i % 2 * 2 - 1, "f4"), "y": ["cat", "dog"][i % 2]} for i in range(6)
    ]
    tasks = TaskCollection((Task("one", rows, (), rows),), PromptClassification(tokens_of))
    model = OpenClip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Run(steps=20, batch_size=6, device="cpu", eval_every=0)
    adapted = foretune.adapt(model, tasks, foretune.FDAlign(learning_rate=1e-2), run)
    assert adapted.scores["one", 0] == 1.0
    after = adapted.models["one", 0].state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"visual.1.weight", "visual.1.bias"}
    bad = tasks.with_objective(PromptClassification(lambda texts: {"input_ids": texts}))
    with pytest.raises(UserError, match=r"open_clip\.get_tokenizer"):
        foretune.adapt(model, bad, foretune.FDAlign(), run)
