"""Scores many slots in batches that mix them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.errors import DivergedError
from foretune.models.packing import packed
from foretune.tasks.batch import Batch
from foretune.training.data import Pick, Step, TaskData
from foretune.training.process_group import ProcessGroup, pad_with_fillers
from foretune.training.sharding import reshard

ALONE = ProcessGroup()
SMALL, OF_SMALL = 256, 1024  # examples of at most so many numbers each are scored so many at once
STORED_BYTES = 2**26  # of batches that are scored repeatedly


def score_slots(
    model: nn.Module,
    data: TaskData,
    split: str,
    max_rows: int | None = None,
    *,
    batch_size: int = 64,
    budget: int | None = None,
    only: Sequence[int] | None = None,
    in_step_with: ProcessGroup = ALONE,
) -> dict[int, float]:
    """The mean score of each slot that has rows in `split`.

    Args:
        model: The model as it stands, with the adapters of a bank that is attached.
        data: The examples.
        split: "train", "validation" or "test".
        max_rows: Score at most this many examples per slot, evenly spread: examples are often
            ordered by label. None for all.
        batch_size: Examples scored together, of one slot or of several.
        budget: Tokens scored together; None for no limit.
        only: Score these slots alone.
        in_step_with: Processes over which the model is sharded: all of them score at the same time,
            each its own data, and call the model equally often.

    Returns:
        Mean score by slot; a slot without examples is left out.

    Raises:
        DivergedError: A score is not finite; the message names task and row.
    """
    chosen = range(len(data)) if only is None else only
    picks = [(s, i) for s in chosen for i in spread(data.num_rows(s, split), max_rows)]

    def measure(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"score": data.objective.scores(model, batch)}

    means = _means(measure, model, data, split, picks, batch_size, budget, in_step_with)
    return means.get("score", {})


def scores_and_losses(
    model: nn.Module,
    data: TaskData,
    split: str,
    *,
    batch_size: int = 64,
    budget: int | None = None,
    in_step_with: ProcessGroup = ALONE,
) -> tuple[dict[int, float], dict[int, float]]:
    """The mean score and the mean loss of each slot that has rows in `split`, as `score_slots`.

    Raises:
        DivergedError: A score or a loss is not finite; the message names task and row.
    """
    picks = [(s, i) for s in range(len(data)) for i in range(data.num_rows(s, split))]

    def measure(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return dict(
            zip(("score", "loss"), data.objective.scores_and_losses(model, batch), strict=True)
        )

    means = _means(measure, model, data, split, picks, batch_size, budget, in_step_with)
    return means.get("score", {}), means.get("loss", {})


@torch.no_grad()
def _means(
    measure: Callable[[nn.Module, Batch], dict[str, Tensor]],
    model: nn.Module,
    data: TaskData,
    split: str,
    picks: Sequence[Pick],
    batch_size: int,
    budget: int | None,
    group: ProcessGroup,
) -> dict[str, dict[int, float]]:
    """The means by slot of each of the values, (n,) for a batch, that `measure` returns by name.

    Raises:
        DivergedError: A value is not finite; the message names task and row.
    """
    steps = _steps(data, split, picks, batch_size, budget, group)
    error: DivergedError | None = None
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        with packed(model):
            for step in steps:
                measured: dict[str, list[float]] = defaultdict(list)
                for chunk in step.chunks:
                    for name, of_rows in measure(model, chunk.to(device)).items():
                        measured[name] += of_rows.tolist()
                for chunk in step.fillers:
                    measure(model, chunk.to(device))
                for name, row_values in measured.items():
                    for slot, i, value in zip(step.slots, step.rows, row_values, strict=True):
                        if not math.isfinite(value):
                            row = data.name_of(slot, split, i)
                            error = error or DivergedError(f"{row}: the {name} is {value}")
                        values[name][slot].append(value)
    finally:
        model.train(was_training)
        reshard(model)
    group.raise_on_all(error)
    return {
        name: {slot: sum(of_slot) / len(of_slot) for slot, of_slot in by_slot.items()}
        for name, by_slot in values.items()
    }


def _steps(
    data: TaskData,
    split: str,
    picks: Sequence[Pick],
    batch_size: int,
    budget: int | None,
    group: ProcessGroup,
) -> Iterator[Step]:
    """The batches of these examples; if they are few, as for a validation, they are stored."""
    key = (split, tuple(picks), batch_size, budget)
    if key in data.scored_steps:
        yield from data.scored_steps[key]
        return
    if picks and _is_small(data, data.row(picks[0][0], split, picks[0][1])):
        batch_size = max(batch_size, OF_SMALL)
    parts = [picks[start : start + batch_size] for start in range(0, len(picks), batch_size)]
    parts += [[]] * (max(group.gather(len(parts))) - len(parts))
    stored: list[Step] | None = [] if group.size == 1 else None  # all processes make equal calls
    num_bytes = 0
    for part in parts:
        step = data.step(part, split, train=False, seed=[0], budget=budget)
        step = pad_with_fillers(step, data, group)
        inputs = [value for chunk in step.chunks for value in chunk.inputs.values()]
        num_bytes += sum(value.nbytes for value in inputs if isinstance(value, Tensor))
        if stored is not None:
            stored = [*stored, step] if num_bytes <= STORED_BYTES else None
        yield step
    if stored is not None:
        data.scored_steps[key] = stored


def _is_small(data: TaskData, row: Mapping[str, Any]) -> bool:
    """Whether an encoded example is a short vector, or a text whose embedding is cached."""
    return data.objective.size(row) == 1 and sum(map(np.size, row.values())) <= SMALL


def spread(num_rows: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `num_rows` examples, evenly spread.

    >>> spread(9, 3), spread(2, 3), spread(2, None)
    ([0, 3, 6], [0, 1], [0, 1])
    """
    if most is None or num_rows <= most:
        return list(range(num_rows))
    return [i * num_rows // most for i in range(most)]
