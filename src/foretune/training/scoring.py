"""Scores many slots in batches that mix them."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import nn

from foretune.errors import DivergedError
from foretune.models.packing import packed
from foretune.training.data import TaskData


@torch.no_grad()
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
    chosen = range(len(data)) if only is None else [only]
    picks = [(s, i) for s in chosen for i in spread(data.num_rows(s, split), max_rows)]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores_by_slot: dict[int, list[float]] = defaultdict(list)
    try:
        with packed(model):
            for start in range(0, len(picks), batch_size):
                part = picks[start : start + batch_size]
                step = data.step(part, split, train=False, seed=[0], budget=budget)
                scores = [
                    score
                    for chunk in step.chunks
                    for score in data.objective.scores(model, chunk.to(device)).tolist()
                ]
                for slot, i, score in zip(step.slots, step.rows, scores, strict=True):
                    if not math.isfinite(score):
                        raise DivergedError(f"{data.name_of(slot, split, i)}: the score is {score}")
                    scores_by_slot[slot].append(score)
    finally:
        model.train(was_training)
    return {slot: sum(values) / len(values) for slot, values in scores_by_slot.items()}


def spread(num_rows: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `num_rows` examples, evenly spread.

    >>> spread(9, 3), spread(2, 3), spread(2, None)
    ([0, 3, 6], [0, 1], [0, 1])
    """
    if most is None or num_rows <= most:
        return list(range(num_rows))
    return [i * num_rows // most for i in range(most)]
