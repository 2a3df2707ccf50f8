"""What foretune does with an architecture: each check says "works", or why not.

What is neither, a wrong number or an error that is not the user's, fails an assertion.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import foretune
import tiny_models
from architectures.catalogue import Architecture
from foretune.adapters import mixing
from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import base_record
from foretune.adapters.peft_format import peft_config, peft_tensors, write_adapter
from foretune.errors import UserError
from foretune.models import frozen_prefix as prefixes
from foretune.models.packing import packed
from foretune.models.routing import route
from foretune.models.surgery import block_list, first_moving_block, freeze_lower
from foretune.pruning.experts import find_blocks

LORA = {"r": 2, "lora_alpha": 4}
NOTHING = "–"
SLOTS = [1, 0, 2, 0, 1, 2, 2, 0]


def bank_equals_one_by_one(architecture: Architecture, _: Path) -> str:
    """A batch that mixes tasks against each task alone: outputs, and gradients of the adapters."""
    model, inputs = architecture.build(), architecture.inputs(len(SLOTS))
    bank = random_bank(model)

    def together(slots: list[int], index: list[int]) -> Tensor:
        with bank.attached(), route(slots):
            return rows(model(**{k: v[index] for k, v in inputs.items()}), architecture, index)

    every = list(range(len(SLOTS)))
    with said() as notes, padding_removed(model):
        mixed = together(SLOTS, every)
        alone = torch.zeros_like(mixed)
        for slot in range(3):
            index = [i for i in every if SLOTS[i] == slot]
            alone = alone.index_copy(0, torch.tensor(index), together([slot] * len(index), index))
        close(mixed, alone)
        with torch.no_grad():
            plain = rows(model(**inputs), architecture, every)
        assert (plain - mixed).abs().max() > 1e-3 * plain.abs().max(), "adapters have no effect"
        weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(3))
        gradients = [
            torch.autograd.grad((y * weights).sum(), list(bank.parameters()), allow_unused=True)
            for y in (mixed, alone)
        ]
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            close(one, other)
    by_task = next((n for n in notes if "for each task of a batch on its own" in n), None)
    return "works" if by_task is None else f"works, task by task: {by_task.split(': ', 1)[1]}"


def stock_peft_loads_an_adapter(architecture: Architecture, folder: Path) -> str:
    """An adapter folder in stock PEFT against the bank: every tensor is read, outputs are equal."""
    model, inputs = architecture.build(), architecture.inputs()
    bank = random_bank(model)
    config = peft_config(bank, model, None)
    write_adapter(folder, config, peft_tensors(bank, 1), base_record(model, bank.head_names))
    index = list(range(4))
    with torch.no_grad():
        with bank.attached(), route([1] * 4):
            expected = rows(model(**inputs), architecture, index)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        close(rows(stock.get_base_model()(**inputs), architecture, index), expected)
    return "works"


def a_mixture_is_pruned(architecture: Architecture, folder: Path) -> str:
    """Keeping all experts changes nothing; half of them are saved and read back bit for bit."""
    model = architecture.build()
    if architecture.group not in ("mixtures of experts", "state spaces"):
        return NOTHING
    tokenizer = tiny_models.tokenizer()
    texts: list[Any] = [" ".join(tiny_models.WORDS[i : i + 8]) for i in range(8)]
    if architecture.reads == "pairs":
        texts = [{"prompt": text, "completion": "the cat"} for text in texts]
    inputs, index = architecture.inputs(), list(range(4))
    outputs = {}
    count = find_blocks(model)[0].num_experts
    for kept in (count, count // 2):
        pruned = foretune.prune(model, texts, foretune.REAP(experts=kept), tokenizer=tokenizer)
        assert set(pruned.size["after"]["experts"]) == {kept}
        with torch.no_grad():
            outputs[kept] = rows(pruned.model(**inputs), architecture, index)
    with torch.no_grad():
        close(outputs[count], rows(model(**inputs), architecture, index))
    assert torch.isfinite(outputs[count // 2]).all()
    pruned.save(folder / "pruned")
    head = "seq2seq" if architecture.reads == "pairs" else "causal-lm"
    loaded, _ = foretune.load_model(folder / "pruned", head=head)
    with torch.no_grad():
        close(rows(loaded(**inputs), architecture, index), outputs[count // 2])
    return "works"


def frozen_blocks_are_cached(architecture: Architecture, _: Path) -> str:
    """The model with cached states against itself, before and after all that trains has moved."""
    model, inputs, index = architecture.build(), architecture.inputs(), list(range(4))
    freeze_lower(model, 1)
    named = block_list(model)
    assert named is not None
    prefixes._WARNED.clear()
    if not first_moving_block(model, []):
        return "no: nothing below the blocks that train is frozen"
    with said() as notes, prefixes.frozen_prefix(model, []), torch.no_grad():
        served = "forward" in vars(named[1][0])
        for _step in range(2):
            output = rows(model(**inputs), architecture, index)
            with prefix_off(model):
                close(output, rows(model(**inputs), architecture, index))
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    if served:
        return "works"
    reason = next((note.split(": ", 1)[1] for note in notes if "computed in every" in note), None)
    return f"no: {reason or 'it reads something else than tokens'}"


CHECKS: dict[str, Callable[[Architecture, Path], str]] = {
    "bank = one by one": bank_equals_one_by_one,
    "stock PEFT": stock_peft_loads_an_adapter,
    "prune": a_mixture_is_pruned,
    "frozen prefix": frozen_blocks_are_cached,
}


def outcome(check: str, architecture: Architecture, folder: Path) -> str:
    """What a check says; an error of the user is a refusal."""
    mixing._WARNED.clear()
    try:
        return CHECKS[check](architecture, folder).replace(architecture.model, "this model")
    except UserError as error:
        text = str(error).replace(architecture.model, "this model")
        return NOTHING if "no mixture of experts" in text else f"refused: {text}"


def random_bank(model: Any) -> AdapterBank:
    """Adapters of three tasks on every layer that can carry one, all of them random."""
    bank = AdapterBank(model, ["a", "b", "c"], lora=LORA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return bank


def rows(output: Any, architecture: Architecture, index: list[int]) -> Tensor:
    """(n, …) output of a model for the rows of `index`, zero at padding."""
    if getattr(output, "text_embeds", None) is not None:
        return torch.cat([output.text_embeds, output.image_embeds], 1)
    value: Tensor | None = getattr(output, "logits", None)
    value = output.last_hidden_state if value is None else value
    mask = architecture.inputs(len(SLOTS)).get("attention_mask")
    if mask is not None and value.shape[1:2] == mask.shape[1:] and value.dim() == 3:
        value = value * mask[index, :, None]
    return value


def close(value: Tensor, expected: Tensor) -> None:
    """Asserts that two tensors differ by no more than rounding."""
    scale = max(float(expected.detach().abs().max()), 1e-6)
    torch.testing.assert_close(value / scale, expected / scale, rtol=0, atol=2e-4)


@contextlib.contextmanager
def padding_removed(model: Any) -> Iterator[None]:
    """As in training: padding is removed where the model allows it."""
    with packed(model):
        yield


@contextlib.contextmanager
def prefix_off(model: Any) -> Iterator[None]:
    """Inside the block a frozen prefix serves nothing."""
    hooks = dict(model._forward_pre_hooks)
    model._forward_pre_hooks.clear()
    try:
        yield
    finally:
        model._forward_pre_hooks.update(hooks)


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """Inside the block, collects what foretune says."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("foretune")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
