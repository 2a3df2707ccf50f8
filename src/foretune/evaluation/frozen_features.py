"""Features of a model before any retraining, and the conflict of tasks measured on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from foretune.errors import UserError
from foretune.evaluation.conflict import Conflict, measure_conflict
from foretune.evaluation.conflict_reading import Inputs
from foretune.models.calls import eval_no_grad
from foretune.models.dual_encoder import embeddings, has_towers
from foretune.models.surgery import head_modules
from foretune.tasks.objectives import text
from foretune.tasks.task import TaskCollection

BATCH = 64
MOST_INPUTS = 3000
PARAMETERS = 30_000_000  # up to this size so many inputs are embedded; with a larger model fewer
LEAST_INPUTS = 300
TOKEN_FIELDS = ("max_tokens", "max_context_tokens", "max_response_tokens")  # of objectives
MAX_TOKENS = 128  # where the objective has no limit


def conflict_on(
    model: nn.Module,
    tasks: TaskCollection,
    *,
    shots: Sequence[int | None] = (4, None),
    redraw: Callable[[TaskCollection], TaskCollection] | None = None,
    seed: int = 0,
) -> Conflict:
    """Measures conflict; where tasks do not share their inputs, on frozen features of a model.

    Arrays are taken as they are, too: the features that predict better decide.

    Args:
        model: The model before any retraining.
        tasks: Seen tasks with their objective; their test rows are not read.
        shots: Numbers of rows that a held-out task is given, per class where there are classes;
            None for all that can be spared.
        redraw: Replaces the candidates that were drawn, for a part of the tasks of a choice, by
            fewer different ones; None if it need not.
        seed: Random seed.

    Raises:
        UserError: The conflict of these tasks cannot be measured.
    """
    objective: Any = tasks.objective
    inputs = Inputs(
        embed=functools.partial(embed_texts, model, objective),
        most=_most_inputs(model),
        redraw=redraw,
        context_turns=getattr(objective, "context_turns", None),
    )
    first = next(row for task in tasks for row in task.train)
    if "x" not in first:
        return measure_conflict(tasks, inputs, shots=shots, seed=seed)
    conflict = measure_conflict(tasks, shots=shots, seed=seed)
    if conflict.over == "inputs":
        return conflict
    inputs = Inputs(embed=functools.partial(embed_arrays, model), most=_most_inputs(model))
    try:
        on_model = measure_conflict(tasks, inputs, shots=shots, seed=seed)
    except NoFeaturesError:
        return conflict
    return max(conflict, on_model, key=_explained)


class NoFeaturesError(Exception):
    """The model has no layer between its input and its output whose values could be features."""


def _most_inputs(model: nn.Module) -> int:
    size = sum(p.numel() for p in model.parameters())
    return max(LEAST_INPUTS, int(MOST_INPUTS * min(1.0, PARAMETERS / max(size, 1))))


def _explained(conflict: Conflict) -> float:
    """The share of the labels' variance that the best step predicts, over the numbers of shots."""
    return float(np.mean([max(step.r2.values()) for step in conflict.by_shots]))


def embed_texts(model: nn.Module, objective: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """(n, d) the mean of a text's last hidden states."""
    tokenizer = objective.tokenizer
    template = text.single_template(tokenizer)
    limits = [getattr(objective, name) for name in TOKEN_FIELDS if hasattr(objective, name)]
    room = max([*limits] or [MAX_TOKENS]) - len(template)
    ids = [text.token_ids(tokenizer, t, "a text")[: max(room, 1)] for t in texts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # little padding
    read = _reader(model)
    device = next(model.parameters()).device
    parts = []
    with eval_no_grad(model):
        for start in range(0, len(order), BATCH):
            rows = [template.fill(ids[row]) for row in order[start : start + BATCH]]
            padded, mask = text.pad(rows, text.pad_id(tokenizer)), text.pad_mask(rows)
            parts.append(read(padded.to(device), mask.to(device)).float().cpu())
    embedded = np.empty((len(ids), parts[0].shape[1]), dtype=np.float32)
    embedded[order] = torch.cat(parts).numpy()
    return embedded


def _reader(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What turns ids and mask, each (n, L), into (n, d)."""
    body: Any = model.base_model if isinstance(model, PreTrainedModel) else model
    if hasattr(body, "embed"):  # a tower on a frozen encoder
        embed: Callable[[Tensor, Tensor], Tensor] = body.embed
        return embed
    if getattr(body.config, "is_encoder_decoder", False):
        body = body.get_encoder()

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
        return text.mean_pool(hidden.float(), mask)

    return read


def embed_arrays(model: nn.Module, arrays: Sequence[Any]) -> NDArray[np.float32]:
    """(n, d) what the model's head reads; of a model with an image tower, its embeddings.

    Raises:
        NoFeaturesError: The head reads the arrays themselves, or nothing.
    """
    device = next(model.parameters()).device
    parts = []
    with eval_no_grad(model):
        for start in range(0, len(arrays), BATCH):
            batch = np.stack([np.asarray(x) for x in arrays[start : start + BATCH]])
            x = torch.from_numpy(batch.astype(np.float32, copy=False)).to(device)
            read = embeddings(model, {"x": x}) if has_towers(model) else _read_by_head(model, x)
            parts.append(read.flatten(1).float().cpu())
    vectors: NDArray[np.float32] = torch.cat(parts).numpy()
    return vectors


def _read_by_head(model: nn.Module, x: Tensor) -> Tensor:
    """(n, …) the input of the model's head.

    Raises:
        NoFeaturesError: It is the arrays (n, …) themselves, or there is none.
    """
    read: list[Tensor] = []
    try:
        head = model.get_submodule(head_modules(model)[0])
    except UserError:
        raise NoFeaturesError from None
    handle = head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if len(read) != 1 or len(read[0]) != len(x) or read[0].shape == x.shape:
        raise NoFeaturesError
    return read[0]
