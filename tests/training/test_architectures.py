"""The whole way through every architecture: retrain, save, adapt, save, load by stock loaders."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import foretune
import tiny_models
from foretune import PEFTML, CausalLM, Classification, LoRA, Run, Task, TaskCollection

WORDS = ("cat", "dog", "red", "blue")


def prompts(name: str) -> Task:
    rows = [{"prompt": f"the {w} sat", "completion": f"on {name} {w}"} for w in WORDS]
    return Task(name, train=rows, validation=rows[:1], test=rows[2:])


def labels(name: str) -> Task:
    rows = [{"text": f"{name} the {w}", "label": f"{name} {i % 2}"} for i, w in enumerate(WORDS)]
    return Task(name, train=rows, validation=rows[:2], test=rows[2:])


def images(name: str) -> Task:
    pictures = torch.randn(4, 3, 8, 8).numpy()
    rows = [{"x": x, "y": i % 3 % 2} for i, x in enumerate(pictures)]
    return Task(name, train=rows, validation=rows[:2], test=rows[2:])


def distilbert() -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=len(tiny_models.tokenizer()), dim=8, hidden_dim=16, n_layers=2, n_heads=2
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


def llama4() -> transformers.PreTrainedModel:
    """Its routers are linear layers that return tuples."""
    sizes = {**tiny_models.DECODER, "num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**sizes, intermediate_size_mlp=16)
    return transformers.Llama4ForCausalLM(config).eval()


def deberta() -> transformers.PreTrainedModel:
    sizes = {**tiny_models.SIZES, "num_hidden_layers": 2, "position_buckets": 8}
    config = transformers.DebertaV2Config(
        **sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True
    )
    return transformers.DebertaV2ForSequenceClassification(config).eval()


CASES = {
    "llama4": (llama4, CausalLM, prompts, "AutoModelForCausalLM"),
    "deberta": (deberta, Classification, labels, "AutoModelForSequenceClassification"),
    "gpt2": (tiny_models.gpt2, CausalLM, prompts, "AutoModelForCausalLM"),
    "llama": (tiny_models.llama, CausalLM, prompts, "AutoModelForCausalLM"),
    "qwen2": (tiny_models.qwen2, CausalLM, prompts, "AutoModelForCausalLM"),
    "t5": (tiny_models.t5, CausalLM, prompts, "AutoModelForSeq2SeqLM"),
    "roberta": (
        lambda: tiny_models.roberta(num_labels=2),
        Classification,
        labels,
        "AutoModelForSequenceClassification",
    ),
    "distilbert": (distilbert, Classification, labels, "AutoModelForSequenceClassification"),
    "vit": (
        lambda: tiny_models.vit(num_labels=2),
        Classification,
        images,
        "AutoModelForImageClassification",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_way_and_back_by_stock_loaders(name, tmp_path, monkeypatch):
    build, objective, task, auto = CASES[name]
    torch.manual_seed(0)
    instance = objective(None if task is images else tiny_models.tokenizer())
    seen = TaskCollection([task("a"), task("b")], instance)
    unseen = TaskCollection([task("c"), task("d")], instance)
    model = build()
    run = Run(steps=3, batch_size=2, device="cpu", out=tmp_path / "run")
    outcome = foretune.retrain(model, seen, PEFTML(lora={"r": 2}), run)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(outcome.model.parameters(), model.parameters(), strict=True)
    )
    adapted = foretune.adapt(
        outcome.model, unseen, LoRA(lora={"r": 2}), Run(steps=3, device="cpu", out=tmp_path / "new")
    )
    assert set(adapted.scores) == {("c", 0), ("d", 0)}

    base = getattr(transformers, auto).from_pretrained(tmp_path / "run" / "base")
    page = (tmp_path / "run" / "README.md").read_text()
    assert f"from transformers import {type(base).__name__}\n" in page
    shown = {}
    monkeypatch.chdir(tmp_path / "run")
    exec(page.partition("```python\n")[2].partition("```")[0], shown)
    assert type(shown["base"]) is type(base)
    for key, value in outcome.model.state_dict().items():
        torch.testing.assert_close(base.state_dict()[key], value)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "new" / "c")
    config = loaded.peft_config["default"]
    assert config.base_model_name_or_path == str(tmp_path / "run" / "base")
