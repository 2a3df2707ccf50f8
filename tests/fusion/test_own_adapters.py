"""Whatever `adapt` and `retrain` write is fused over its base, by every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_model
from torch import Tensor

import foretune
import tiny_models
from foretune import CausalLM, Choice, Classification, Run, Task, TaskCollection
from foretune.adapters.sparse import load_sparse
from foretune.models.loading import load_base
from fusion.fused_models import ids, output, text_input
from fusion.test_inputs import IDENTITIES, convolutions
from fusion.test_labels import collection

RUN = Run(steps=3, batch_size=2, warmup=0, device="cpu")
LORA = foretune.LoRA(learning_rate=0.05, lora={"r": 2})


def same_labels() -> TaskCollection:
    return collection(a=["no", "yes"], b=["no", "yes"])


def other_labels() -> TaskCollection:
    return collection(a=["no", "yes"], b=["high", "low", "middle"])


def of_rows(row: dict[str, Any], objective: Any) -> TaskCollection:
    rows = [row] * 4
    return TaskCollection([Task(name, rows, rows[:1], rows[1:2]) for name in "ab"], objective)


def completions() -> TaskCollection:
    return of_rows({"prompt": "the cat", "completion": "sat"}, CausalLM(tiny_models.tokenizer()))


def choices() -> TaskCollection:
    row = {"context": "the cat", "candidates": ["a", "b"], "answer": 0}
    return of_rows(row, Choice(tiny_models.tokenizer()))


def plain_with_labels() -> torch.nn.Module:
    """A module whose head has learnt four labels."""
    model = tiny_models.plain()
    model.head_labels = ["0", "1", "2", "3"]
    return model


def signals_with(*labels: list[int]) -> TaskCollection:
    generator = np.random.default_rng(0)
    tasks = []
    for name, task_labels in zip("ab", labels, strict=True):
        rows = [
            {"x": generator.normal(size=(3, 8)).astype("f4"), "y": y}
            for y in task_labels
            for _ in range(4)
        ]
        tasks.append(Task(name, rows, rows[:2], rows[2:4]))
    return TaskCollection(tasks, Classification())


def texts(model: Any) -> Tensor:
    return output(model, text_input()).float()


def pairs(model: Any) -> Tensor:
    return output(model, {**text_input(), "decoder_input_ids": ids(3, 4, 1)}).float()


def signals(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1)))


def tied() -> Any:
    return tiny_models.llama(tie_word_embeddings=True)


def mixture() -> Any:
    """The experts are one tensor; the shared expert has layers of its own."""
    config = transformers.Qwen2MoeConfig(
        **tiny_models.DECODER,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen2MoeForCausalLM(config).eval()


def classifier(num_labels: int = 2) -> Any:
    return tiny_models.bert(num_labels=num_labels)


Case = tuple[Callable[[], Any], Callable[[], TaskCollection], Any, Callable[[Any], Tensor]]
CASES: dict[str, Case] = {
    "classifier": (classifier, same_labels, LORA, texts),
    "classifier in bfloat16": (lambda: classifier().bfloat16(), same_labels, LORA, texts),
    "classifier, own heads": (lambda: classifier(3), other_labels, LORA, texts),
    "own heads in bfloat16": (lambda: classifier(3).bfloat16(), other_labels, LORA, texts),
    "wider heads than the base's": (classifier, other_labels, LORA, texts),
    "llama": (tiny_models.llama, completions, LORA, texts),
    "llama in bfloat16": (lambda: tiny_models.llama().bfloat16(), completions, LORA, texts),
    "gpt2": (tiny_models.gpt2, completions, LORA, texts),
    "encoder-decoder": (tiny_models.t5, completions, LORA, pairs),
    "choice": (tiny_models.bert, choices, LORA, texts),
    "copy of a tied lm_head": (
        tied,
        completions,
        foretune.LoRA(learning_rate=0.05, lora={"r": 2, "modules_to_save": ["lm_head"]}),
        texts,
    ),
    "plain module": (
        plain_with_labels,
        lambda: signals_with([0, 1, 2, 3], [0, 1, 2, 3]),
        LORA,
        signals,
    ),
    "mixture with a shared expert": (mixture, completions, LORA, texts),
    "plain module whose head's name is an ending": (
        lambda: tiny_models.plain(outputs=3),
        lambda: signals_with([0, 1, 2], [0, 2, 3]),
        LORA,
        signals,
    ),
    "plain module, own heads": (
        convolutions,
        lambda: signals_with([0, 1], [1, 2]),
        LORA,
        signals,
    ),
    "heads alone": (lambda: classifier(3), other_labels, foretune.Head(learning_rate=0.05), texts),
    "whole models": (classifier, same_labels, foretune.Full(learning_rate=0.01), texts),
    "whole models, own heads": (
        lambda: classifier(3),
        other_labels,
        foretune.Full(learning_rate=0.01),
        texts,
    ),
    "whole plain modules": (
        tiny_models.plain,
        lambda: signals_with([0, 1, 2, 3], [0, 1, 2, 3]),
        foretune.Full(learning_rate=0.01),
        signals,
    ),
    "sparse changes": (classifier, same_labels, foretune.SaRA(learning_rate=0.01), texts),
}


def saved_base(build: Callable[[], Any], folder: Path) -> tuple[Any, Any]:
    """(what to give to fuse, the base in memory)."""
    base = build()
    if not hasattr(base, "save_pretrained"):
        return base, base
    base.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder, load_base(folder)[0]


def loaded(base: Any, folder: Path) -> Any:
    """The model of one task, loaded without fusing."""
    model = copy.deepcopy(base)
    if (folder / "adapter_config.json").is_file():
        return peft.PeftModel.from_pretrained(model, folder).eval()
    if (folder / "sparse_delta.safetensors").is_file():
        return load_sparse(model, folder)
    if (folder / "config.json").is_file():
        return load_base(folder)[0]
    load_model(model, str(folder / "model.safetensors"))
    return model.eval()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_what_adapt_writes_is_fused_over_its_base(kind: str, tmp_path: Path) -> None:
    build, tasks, method, answer = CASES[kind]
    source, base = saved_base(build, tmp_path / "base")
    adapted = foretune.adapt(base, tasks(), method, RUN)
    adapted.save(tmp_path / "new")
    folders = {name: tmp_path / "new" / name for name in "ab"}
    wide = copy.deepcopy(base)
    if adapted.num_labels is not None:
        wide = foretune.load_model(source, head="classification", num_labels=adapted.num_labels)[0]
    tolerance = {"rtol": 0.05, "atol": 0.05} if "bfloat16" in kind else {"rtol": 1e-4, "atol": 1e-4}
    for name, folder in folders.items():
        expected = answer(loaded(wide, folder))
        for identity in IDENTITIES:
            fused = foretune.fuse(source, {name: folder}, identity).set_task(name)
            torch.testing.assert_close(
                answer(fused.model), expected, **tolerance, msg=identity.name
            )
    for identity in IDENTITIES:
        fused = foretune.fuse(source, folders, identity)
        again = (
            foretune.load_fused(fused.save(tmp_path / identity.name))
            if source is not base
            else fused
        )
        for name in folders:
            assert answer(again.set_task(name).model).isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["classifier", "classifier, own heads"])
def test_what_retrain_writes_is_fused_over_the_retrained_base(kind: str, tmp_path: Path) -> None:
    build, tasks, _, answer = CASES[kind]
    run = RUN.replace(out=tmp_path / "run")
    foretune.retrain(build(), tasks(), foretune.PEFTML(lora={"r": 2}, learning_rate=0.05), run)
    source = tmp_path / "run" / "base"
    folder = tmp_path / "run" / "adapters" / "a"
    expected = answer(loaded(load_base(source)[0], folder))
    for identity in IDENTITIES:
        fused = foretune.fuse(source, {"a": folder}, identity).set_task("a")
        torch.testing.assert_close(answer(fused.model), expected, rtol=1e-4, atol=1e-4)


def test_adapters_over_a_bare_backbone_bring_their_heads(tmp_path: Path) -> None:
    """The base's folder holds a BertModel; the adapters were trained under a classifier."""
    source, _ = saved_base(tiny_models.bert, tmp_path / "base")
    base, _ = foretune.load_model(source, head="classification", num_labels=3)
    foretune.adapt(base, other_labels(), LORA, RUN).save(tmp_path / "new")
    folders = {name: tmp_path / "new" / name for name in "ab"}
    for identity in IDENTITIES:
        fused = foretune.fuse(source, {"a": folders["a"]}, identity).set_task("a")
        expected = texts(loaded(base, folders["a"]))
        torch.testing.assert_close(texts(fused.model), expected, rtol=1e-4, atol=1e-4)
    assert foretune.fuse(source, folders, IDENTITIES[0]).labels["b"][1] == "low"
    with pytest.raises(foretune.UserError, match="the base is a BertModel, but the adapters were"):
        foretune.fuse(tiny_models.bert(), folders, IDENTITIES[0])


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_adapter_is_fused_over_its_base_in_another_precision(trained: str, tmp_path: Path) -> None:
    dtype = getattr(torch, trained)
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    foretune.adapt(classifier().to(dtype), same_labels(), LORA, RUN).save(tmp_path)
    for held in (classifier().to(other), classifier().to(dtype).to(other)):
        fused = foretune.fuse(held, {"a": tmp_path / "a"}, IDENTITIES[0])
        assert next(fused.model.parameters()).dtype == other
    with pytest.raises(foretune.UserError, match="was trained on another base"):
        stranger = tiny_models.bert(num_labels=2, seed=5).to(other)
        foretune.fuse(stranger, {"a": tmp_path / "a"}, IDENTITIES[0])
