"""Outputs of rows without answers, in batches that mix tasks."""

from __future__ import annotations

import numpy as np
from torch import nn

from foretune.errors import DivergedError
from foretune.models.calls import eval_no_grad
from foretune.models.packing import packed
from foretune.training.data import Pick, TaskData


def predicted_outputs(
    model: nn.Module, data: TaskData, *, batch_size: int = 64, budget: int | None = None
) -> dict[Pick, np.ndarray]:
    """What the objective's `outputs` gives for each test example.

    Args:
        model: The model as it stands, with the adapters of a bank that is attached.
        data: The examples, whose answers are not used.
        batch_size: Examples per batch, of one slot or of several.
        budget: Tokens per call of the model; None for no limit.

    Returns:
        (slot, example) → (k,) outputs in float32.

    Raises:
        DivergedError: An output is NaN or +∞; the message names task and row.
    """
    picks = [(slot, i) for slot in range(len(data)) for i in range(data.num_rows(slot, "test"))]
    device = next(model.parameters()).device
    outputs: dict[Pick, np.ndarray] = {}
    with eval_no_grad(model), packed(model):
        for start in range(0, len(picks), batch_size):
            part = picks[start : start + batch_size]
            step = data.step(part, "test", train=False, seed=[0], budget=budget)
            rows = [
                row
                for chunk in step.chunks
                for row in data.objective.outputs(model, chunk.to(device)).float().cpu().numpy()
            ]
            for slot, i, row in zip(step.slots, step.rows, rows, strict=True):
                if not (row < np.inf).all():
                    raise DivergedError(f"{data.name_of(slot, 'test', i)}: an output is not finite")
                outputs[slot, i] = row
    return outputs
