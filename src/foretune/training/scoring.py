"""Scores of many slots in mixed batches."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

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
        model: Scored as it stands: with a bank's adapters when one is attached.
        data: The rows.
        split: "train", "validation" or "test".
        max_rows: At most so many rows of each slot, evenly spread over them: rows often stand in
            the order of their labels.
        batch_size: Rows scored together, of one slot or of several.
        budget: Tokens scored together; None for no bound.
        only: Score this slot alone.

    Returns:
        Mean score by slot; a slot without rows is left out.
    """
    chosen = range(len(data)) if only is None else [only]
    picks = [(s, i) for s in chosen for i in spread(data.num_rows(s, split), max_rows)]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found: dict[int, list[float]] = defaultdict(list)
    try:
        with packed(model):
            for start in range(0, len(picks), batch_size):
                part = picks[start : start + batch_size]
                for chunk in data.step(part, split, train=False, seed=[0], budget=budget).chunks:
                    scores = data.objective.scores(model, chunk.to(device))
                    for slot, score in zip(chunk.slots, scores.tolist(), strict=True):
                        found[slot].append(score)
    finally:
        model.train(was_training)
    return {slot: sum(values) / len(values) for slot, values in found.items()}


def spread(num_rows: int, most: int | None) -> list[int]:
    """At most so many of the rows, evenly spread.

    >>> spread(9, 3), spread(2, 3), spread(2, None)
    ([0, 3, 6], [0, 1], [0, 1])
    """
    if most is None or num_rows <= most:
        return list(range(num_rows))
    return [i * num_rows // most for i in range(most)]
