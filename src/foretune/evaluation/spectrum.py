"""The adaptability spectrum: which rank an unseen task needs on each base.

The theory of PEFT-ML (arXiv:2410.22264) is about ranks: after standard retraining on T tasks of
rank k an unseen task is k(T+1) ranks away from the base, after PEFT-ML k. Here both sides are
measured on real models: the score that adapters of growing rank reach, and the singular values of
(fully fine-tuned − base).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from foretune.models.surgery import linear_modules
from foretune.run import Run
from foretune.tasks.task import TaskCollection
from foretune.training import verbs
from foretune.training.loop import Progress
from foretune.training.outcome import Adapted, Outcome

FULL_TASKS = 8  # fully fine-tuned, one after the other: enough for means of singular values
KEPT = 64  # singular values of a change that are written down


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
    """Scores by rank, and singular values of what full fine-tuning changes.

    Args:
        bases: Name → base.
        unseen: Tasks that no base was retrained on.
        adapt: A LoRA method; its rank is replaced, its scale lora_alpha / r is kept.
        full: A full fine-tuning method.
        run: Seed and budget of each adaptation.
        shots: Rows to adapt on; None for all.
        ranks: Ranks of the adapters.
        max_tasks: The first so many unseen tasks are fully fine-tuned.
        rates: Learning rates of `adapt` by base.
        progress: Called during each adaptation.

    Returns:
        "rows": score of each base, task and rank; "costs": of each base and rank (None: full
        fine-tuning), over `num_tasks` tasks, trainable parameters those of one; "changes": what
        `changes` says of each base and task.
    """
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    scale = adapt.lora.get("lora_alpha", 8) / adapt.lora.get("r", 8)
    for name in bases:
        given = bases[name]
        model = given.model if isinstance(given, Outcome) else given
        rate = (rates or {}).get(name, adapt.learning_rate)
        for rank in ranks:
            lora = {**adapt.lora, "r": rank, "lora_alpha": scale * rank}
            method = dataclasses.replace(adapt, lora=lora, learning_rate=rate)
            found = verbs.adapt(model, unseen, method, run, shots=shots, progress=progress)
            rows += [
                {"base": name, "task": task, "rank": rank, "score": score}
                for (task, _), score in found.scores.items()
            ]
            costs.append(_cost(name, rank, found))
        few = unseen.subset(unseen.names[:max_tasks])
        tuned = verbs.adapt(model, few, full, run, shots=shots, progress=progress)
        costs.append(_cost(name, None, tuned))
        for (task, _), changed in tuned.models.items():
            values += [
                {"base": name, "task": task, "module": module, **change}
                for module, change in changes(model, changed).items()
            ]
    return {
        "shots": shots,
        "ranks": list(ranks),
        "rows": rows,
        "costs": costs,
        "changes": values,
    }


def _cost(base: str, rank: int | None, adapted: Adapted) -> dict[str, Any]:
    return {"base": base, "rank": rank, "num_tasks": len(adapted.scores), **adapted.cost}


@torch.no_grad()
def changes(base: nn.Module, changed: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every linear layer that moved, the spectrum of (changed − base).

    Returns:
        Module → "values": the largest singular values, at most `KEPT`; "norm": that of the whole
        change; both divided by ‖W‖_F; "rank_90": how many singular values, of all there are, hold
        90 % of the sum of squares. A head of another width is a fresh one: it has no change to
        speak of.
    """
    found = {}
    others = linear_modules(changed)
    for name, layer in linear_modules(base).items():
        before: Any = layer.weight
        after: Any = others[name].weight
        if after.shape != before.shape:
            continue
        delta = (after - before).flatten(1)
        if delta.any():
            values = torch.linalg.svdvals(delta.double()) / before.double().norm()
            held = (values**2).cumsum(0)
            found[name] = {
                "values": [round(v, 8) for v in values.tolist()[:KEPT]],
                "norm": round(values.norm().item(), 8),
                "rank_90": int((held < 0.9 * held[-1]).sum()) + 1,
            }
    return found
