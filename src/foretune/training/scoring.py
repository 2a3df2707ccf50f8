"""Scores many slots in batches that mix them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foretune.errors import DivergedError
from foretune.models.packing import packed
from foretune.tasks.batch import Batch
from foretune.training.data import TaskData


def score_slots(
    model: nn.Module,
    data: TaskData,
    split: str,
    max_rows: int | None = None,
    *,
    batch_size: int = 64,
    budget: int | None = None,
    only: int | None = None,
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
        only: Score this slot alone.

    Returns:
        Mean score by slot; a slot without examples is left out.

    Raises:
        DivergedError: A score is not finite; the message names task and row.
    """

    def score(model: nn.Module, batch: Batch) -> Tensor:
        return data.objective.scores(model, batch).unsqueeze(1)

    means = _means(score, model, data, split, max_rows, batch_size, budget, only)
    return {slot: mean[0] for slot, mean in means.items()}


def scores_and_losses(
    model: nn.Module,
    data: TaskData,
    split: str,
    *,
    batch_size: int = 64,
    budget: int | None = None,
) -> tuple[dict[int, float], dict[int, float]]:
    """The mean score and the mean loss of each slot that has rows in `split`, as `score_slots`.

    Raises:
        DivergedError: A score or a loss is not finite; the message names task and row.
    """

    def measure(model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack(data.objective.scores_and_losses(model, batch), dim=1)

    means = _means(measure, model, data, split, None, batch_size, budget, None)
    scores = {slot: score for slot, (score, _) in means.items()}
    return scores, {slot: loss for slot, (_, loss) in means.items()}


@torch.no_grad()
def _means(
    measure: Callable[[nn.Module, Batch], Tensor],
    model: nn.Module,
    data: TaskData,
    split: str,
    max_rows: int | None,
    batch_size: int,
    budget: int | None,
    only: int | None,
) -> dict[int, list[float]]:
    """The mean of each column of what `measure` returns for a batch, (n, columns), by slot."""
    chosen = range(len(data)) if only is None else [only]
    picks = [(s, i) for s in chosen for i in spread(data.num_rows(s, split), max_rows)]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows_by_slot: dict[int, list[list[float]]] = defaultdict(list)
    try:
        with packed(model):
            for start in range(0, len(picks), batch_size):
                part = picks[start : start + batch_size]
                step = data.step(part, split, train=False, seed=[0], budget=budget)
                rows = [
                    row
                    for chunk in step.chunks
                    for row in measure(model, chunk.to(device)).tolist()
                ]
                for slot, i, row in zip(step.slots, step.rows, rows, strict=True):
                    for value, what in zip(row, ("score", "loss"), strict=False):
                        if not math.isfinite(value):
                            name = data.name_of(slot, split, i)
                            raise DivergedError(f"{name}: the {what} is {value}")
                    rows_by_slot[slot].append(row)
    finally:
        model.train(was_training)
    return {
        slot: [sum(column) / len(column) for column in zip(*rows, strict=True)]
        for slot, rows in rows_by_slot.items()
    }


def spread(num_rows: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `num_rows` examples, evenly spread.

    >>> spread(9, 3), spread(2, 3), spread(2, None)
    ([0, 3, 6], [0, 1], [0, 1])
    """
    if most is None or num_rows <= most:
        return list(range(num_rows))
    return [i * num_rows // most for i in range(most)]
