"""Tiny models with fine-tuned copies, for the tests of what fuses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import tiny_models


def nudged(model: nn.Module, seed: int, only: str = "", size: float = 0.3) -> Any:
    """A copy whose parameters (those with `only` in their names) are moved at random."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return made


def linears(model: nn.Module, seed: int, size: float = 0.3) -> Any:
    """A copy whose linear layers, output embeddings and heads left aside, are moved."""
    from transformers.pytorch_utils import Conv1D

    made = copy.deepcopy(model)
    output = getattr(made, "get_output_embeddings", lambda: None)()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in made.named_modules():
            if not isinstance(module, nn.Linear | Conv1D) or module is output:
                continue
            if name.startswith(("classifier", "score")):
                continue
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return made


def adapted(model: nn.Module, seed: int, targets: list[str], **config: Any) -> Any:
    """A PEFT model over a copy, with a random LoRA."""
    made = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets, **config}),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval()


def ids(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, tiny_models.VOCABULARY, (rows, length), generator=generator)


def text_input() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def image_input() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


# Family → (its model, an input)
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "bert": (tiny_models.bert, text_input),
    "roberta-classifier": (lambda: tiny_models.roberta(num_labels=3), text_input),
    "gpt2": (tiny_models.gpt2, text_input),
    "llama": (tiny_models.llama, text_input),
    "qwen2": (tiny_models.qwen2, text_input),
    "vit": (tiny_models.vit, image_input),
    "t5": (tiny_models.t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(3, 4, 1)}),
}


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model says, as one tensor."""
    with torch.no_grad():
        said = model(**batch)
    return said.logits if "logits" in said else said.last_hidden_state


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
