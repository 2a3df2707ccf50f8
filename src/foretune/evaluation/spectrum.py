"""The adaptability spectrum: which rank an unseen task needs on each base.

The theory of PEFT-ML (arXiv:2410.22264) is about ranks: after standard retraining on T tasks of
rank k, an unseen task differs from the base by rank k(T+1); after PEFT-ML, by rank k. Both sides
are measured here on real models: the score of adapters of increasing rank, and the singular values
of (fully fine-tuned − base).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from foretune.adapters.config import lora_scale
from foretune.models.surgery import linear_modules
from foretune.run import Run
from foretune.tasks.task import TaskCollection
from foretune.training import verbs
from foretune.training.loop import Progress
from foretune.training.outcome import Adapted, Outcome

FULL_TASKS = 8  # fully fine-tuned, one after the other: enough for means of singular values
MAX_VALUES = 64  # singular values that are recorded per module


def measure(
    bases: Mapping[str, nn.Module | Outcome],
    unseen: TaskCollection,
    *,
    adapt: Any,
    full: Any,
    run: Run,
    shots: int | None,
    ranks: Sequence[int] = (1, 2, 4, 8),
    max_tasks: int = FULL_TASKS,
    rates: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores by rank, and singular values of the changes made by full fine-tuning.

    Args:
        bases: Name → base.
        unseen: Tasks that no base was retrained on.
        adapt: A LoRA method; its rank is replaced, its scale is kept (`lora_scale`).
        full: A full fine-tuning method.
        run: Random seed and budget of each adaptation.
        shots: Training examples per task; None for all.
        ranks: Ranks of the adapters.
        max_tasks: Number of unseen tasks, from the first, that are also fully fine-tuned.
        rates: Learning rate of `adapt` by base; a base without one uses that of `adapt`.
        progress: Called during each adaptation.

    Returns:
        "rows": score by base, task and rank; "costs": cost by base and rank (None: full
        fine-tuning) over `num_tasks` tasks, with the trainable parameters of one task; "changes":
        the result of `changes` by base, task and module.
    """
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    singular_values: list[dict[str, Any]] = []
    scale = lora_scale(adapt.lora)
    for name in bases:
        base = bases[name]
        model = base.model if isinstance(base, Outcome) else base
        rate = (rates or {}).get(name, adapt.learning_rate)
        for rank in ranks:
            alpha = scale * (rank**0.5 if adapt.lora.get("use_rslora") else rank)
            lora = {**adapt.lora, "r": rank, "lora_alpha": alpha}
            method = dataclasses.replace(adapt, lora=lora, learning_rate=rate)
            adapted = verbs.adapt(model, unseen, method, run, shots=shots, progress=progress)
            rows += [
                {"base": name, "task": task, "rank": rank, "score": score}
                for (task, _), score in adapted.scores.items()
            ]
            costs.append(_cost(name, rank, adapted))
        fine_tuned = unseen.subset(unseen.names[:max_tasks])
        tuned = verbs.adapt(model, fine_tuned, full, run, shots=shots, progress=progress)
        costs.append(_cost(name, None, tuned))
        for (task, _), changed in tuned.models.items():
            singular_values += [
                {"base": name, "task": task, "module": module, **change}
                for module, change in changes(model, changed).items()
            ]
    return {
        "shots": shots,
        "ranks": list(ranks),
        "rows": rows,
        "costs": costs,
        "changes": singular_values,
    }


def _cost(base: str, rank: int | None, adapted: Adapted) -> dict[str, Any]:
    return {"base": base, "rank": rank, "num_tasks": len(adapted.scores), **adapted.cost}


@torch.no_grad()
def changes(base: nn.Module, changed: nn.Module) -> dict[str, dict[str, Any]]:
    """The spectrum of (changed − base) for every linear layer that changed.

    Returns:
        Module → "values": the largest singular values, at most `MAX_VALUES`; "norm": the norm of
        the change; both divided by ‖W‖_F; "rank_90": the number of singular values that hold 90 %
        of the sum of squares of all. A head of another width is new and left out.
    """
    spectra = {}
    changed_layers = linear_modules(changed)
    for name, layer in linear_modules(base).items():
        before: Any = layer.weight
        after: Any = changed_layers[name].weight
        if after.shape != before.shape:
            continue
        delta = (after - before).flatten(1)
        if delta.any():
            values = torch.linalg.svdvals(delta.double()) / before.double().norm()
            held = (values**2).cumsum(0)
            spectra[name] = {
                "values": [round(v, 8) for v in values.tolist()[:MAX_VALUES]],
                "norm": round(values.norm().item(), 8),
                "rank_90": int((held < 0.9 * held[-1]).sum()) + 1,
            }
    return spectra
