"""`retrain` and `adapt`: the verbs. What differs between methods, the method's record decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foretune.adapters.fingerprint import fingerprint
from foretune.adapters.peft_format import peft_config, peft_tensors
from foretune.errors import UserError
from foretune.files import claim_folder, write_whole
from foretune.method import check_verb
from foretune.models.surgery import head_width, match_head
from foretune.processes import base_is_sharded
from foretune.run import Run
from foretune.tasks.objectives import settings_of
from foretune.tasks.row_store import select
from foretune.tasks.rows import CLASSES
from foretune.tasks.splits import label_of
from foretune.tasks.task import Objective, Task, TaskCollection
from foretune.training.checkpoint import CheckpointStore
from foretune.training.data import (
    PerTaskSampler,
    PooledSampler,
    Sampler,
    SlotRows,
    TaskData,
    number_of,
)
from foretune.training.learners.joint import Learner
from foretune.training.loop import Progress, fit
from foretune.training.outcome import Adapted, Outcome, labels_of
from foretune.training.ranks import Deal, check_layers, check_model, connected, deal_out, join
from foretune.training.record import free_memory, metered
from foretune.training.resume import (
    TaskDraw,
    begin,
    collect_scores,
    inputs_of,
    read_back,
    save_wave,
)
from foretune.training.scoring import score_slots
from foretune.training.sharding import whole_model
from foretune.training.stopping import EarlyStopping


def retrain(
    model: nn.Module,
    tasks: TaskCollection,
    method: Any,
    run: Run | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Outcome:
    """Retrains a copy of the model on many seen tasks, so that it adapts better to unseen ones.

    Args:
        model: The pretrained model; it is not changed. Parameters with `requires_grad=False` stay
            as they are.
        tasks: Seen tasks, with an objective.
        method: A retraining method such as `foretune.PEFTML()`.
        run: Seed, budget, precision, folder; the defaults of `Run` when None.
        tokenizer: Saved beside the base; the objective's own when None.
        progress: Called with (update, updates, figures) after every update.

    Returns:
        The retrained base in its best validated state and, with `run.out`, everything on disk. In
        one of several processes the bank has the tasks of this process, all else is the same.

    Raises:
        UserError: Bad data, a method of another verb, a folder that is not empty.
        DivergedError: A loss was not finite.
        LostProcessError: Another process of the job has ended.
    """
    run, ranks = run or Run(), join()
    check_verb(method, "retrain")
    if hasattr(method, "choose"):
        return _retrain_chosen(model, tasks, method, run, tokenizer, progress)
    objective = method.objective_for(bound(objective_of(tasks).fit(tasks), model))
    data = TaskData.of(tasks, objective)
    share = getattr(method, "interpolate", 1.0)
    given, model = model, fresh_copy(model, objective, run.seed)
    check_model(ranks, model)
    check_layers(ranks, model)
    inputs, finished = ranks.first(lambda: _begin_retraining(method, run, model, tasks, objective))
    deal = deal_out(ranks, data, run.batch_size, run.tasks_per_step, pooled=method.pooled)
    with torch.random.fork_rng(), metered() as cost, connected():
        torch.manual_seed(run.seed)
        learner: Learner | None = method.learner(model, objective, deal.own.keys, run)
        if finished is None:
            record = _train(method, learner, model, deal, run, progress)
            if base_is_sharded():
                model = whole_model(model, fresh_copy(given, objective, run.seed))
                if learner is not None and learner.bank is not None:
                    learner.bank.onto(model)
            interpolate(model, given, share)
        else:
            assert run.out is not None
            record = {**finished, "history": read_back(run.out, learner, model)}
    if hasattr(model, "name_or_path"):  # what adapters name as their base
        model.name_or_path = "" if run.out is None else str(run.out / "base")  # type: ignore[assignment]
    outcome = Outcome(
        model=model.eval(),
        bank=learner.bank if learner and method.keeps_adapters and deal.slots else None,
        method=method,
        run=run,
        objective=objective,
        tokenizer=tokenizer or getattr(objective, "tokenizer", None),
        history=record["history"],
        # Of a base that was taken back half-way it would be the score of another one.
        validation_score=record["validation_score"] if share == 1 else None,
        cost=record["cost"] if finished is not None else ranks.total_cost(cost) | record["cost"],
        tasks=data.keys,
        inputs=inputs,
    )
    if run.out is not None:
        _save(outcome, deal, run.out, save=finished is None)
    return outcome


def _retrain_chosen(
    model: nn.Module,
    tasks: TaskCollection,
    method: Any,
    run: Run,
    tokenizer: Any,
    progress: Progress | None,
) -> Outcome:
    """Lets the method choose another one, and retrains by that."""
    ranks, out = join(), run.out
    objective_of(tasks)
    if out is not None:
        ranks.first(lambda: claim_folder(out, resume=run.resume, overwrite=run.overwrite))
        run = run.replace(resume=True, overwrite=False)
    chosen, choice = method.choose(model, tasks, run, progress)
    outcome = retrain(model, tasks, chosen, run, tokenizer=tokenizer, progress=progress)
    outcome.choice = choice
    if out is not None:
        ranks.first(lambda: write_whole(out / "run.json", json.dumps(outcome.record(), indent=1)))
    return outcome


def _begin_retraining(
    method: Any, run: Run, model: nn.Module, tasks: TaskCollection, objective: Objective
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Claims the folder; what the run depends on, and the record of one that has finished there."""
    if run.out is None:
        return {}, None
    claim_folder(run.out, resume=run.resume, overwrite=run.overwrite)
    about = {"tasks": tasks.names, "objective": objective.to_dict()}
    inputs = {**about, **inputs_of(model, tasks)}
    return inputs, begin(run.out, method, run, inputs)


def fresh_copy(model: nn.Module, objective: Objective, seed: int) -> nn.Module:
    """A copy of the model with a head that fits the objective."""
    return _copy_with_head(model, objective, objective.num_outputs(), seed)


def _copy_with_head(
    model: nn.Module, objective: Objective, outputs: int | None, seed: int
) -> nn.Module:
    model = copy.deepcopy(model)
    match_head(model, outputs, seed)
    if hasattr(objective, "freeze"):
        objective.freeze(model)
    return model


def _to_adapt(model: nn.Module, objective: Objective, seed: int) -> tuple[nn.Module, Objective]:
    """A copy of a base that can be adapted, and the form of the objective for its head.

    A head that all tasks are to share but that the base does not have is none it could have learnt,
    so each task gets one of its own. Heads are as wide as the base's, so that stock loaders put
    them there, unless a task has more labels.
    """
    outputs = objective.num_outputs()
    if outputs is not None:
        width = head_width(model)
        if width not in (None, outputs) and hasattr(objective, "local"):
            objective = objective.local()
            outputs = max(width or 0, objective.num_outputs() or 0)
    return _copy_with_head(model, objective, outputs, seed), objective


def bound(objective: Objective, model: nn.Module) -> Objective:
    """The objective with what it reads off the model before any training, if it reads anything."""
    return objective.bind(model) if hasattr(objective, "bind") else objective


@torch.no_grad()
def interpolate(model: nn.Module, given: nn.Module, share: float) -> None:
    """Takes the model back to `share` of its way from `given`; a head of another shape stays.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903: their α.
    """
    if share == 1:
        return
    start = dict(given.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and name in start and start[name].shape == p.shape:
            p.copy_(torch.lerp(start[name].to(p), p, share))


def _save(outcome: Outcome, deal: Deal, out: Path, *, save: bool) -> None:
    """Each process writes its own tasks' adapters, then the first one everything else."""
    with deal.ranks.together():
        if save and deal.ranks.rank > 0:
            outcome.save_adapters(out)

    def finish() -> None:
        if save:
            outcome.save(out)
        CheckpointStore(out).clear()

    deal.ranks.first(finish)


def _train(
    method: Any,
    learner: Learner | None,
    model: nn.Module,
    deal: Deal,
    run: Run,
    progress: Progress | None,
) -> dict[str, Any]:
    """Runs the loop; history, validation score and what was read. Without a learner: the score."""
    data = deal.data
    if learner is None:
        own = score_slots(model, deal.own, "validation", run.eval_rows) if deal.slots else {}
        scores = deal.scores(own)
        best = sum(scores.values()) / len(scores) if scores else None
        cost = {"tokens": 0, "examples": 0, "trainable_parameters": 0}
        return {"history": [], "validation_score": best, "cost": cost}
    budget = method.budget(run, len(data))
    sampler = sampler_for(method, data, budget, learner.batches_per_update)
    learner.average = method.average
    if learner.average:  # a mean of weights that still move: the rate must not fall to zero
        budget = budget.replace(schedule="constant")
    by_rows = method.pooled and learner.bank is None
    deal = replace(deal, by_rows=by_rows, sharded=base_is_sharded())
    record = fit(learner, data, sampler, budget, progress=progress, deal=deal)
    adapters = 0 if learner.bank is None else learner.bank.parameters_per_slot * len(data)
    cost = {key: record[key] for key in ("tokens", "examples")}
    cost["trainable_parameters"] = adapters + sum(p.numel() for p in learner.base)
    return {"history": record["history"], "validation_score": record["best_score"], "cost": cost}


def adapt(
    model: nn.Module,
    tasks: TaskCollection,
    method: Any,
    run: Run | None = None,
    *,
    shots: int | None = None,
    draws: int = 1,
    split: str = "test",
    progress: Progress | None = None,
) -> Adapted:
    """Adapts the model to each of many unseen tasks, all of them at once where they are adapters.

    The state after the last step is what counts: with a few shots there are no rows to spare on
    which a checkpoint could be chosen, and the test rows are never used for it.

    Args:
        model: A base; it is not changed.
        tasks: Unseen tasks, with an objective.
        method: An adapting method such as `foretune.LoRA()`.
        run: `tasks_per_wave` bounds how many tasks are adapted at the same time; every task
            takes part in every step, whatever `tasks_per_step` says.
        shots: Rows of each task to learn from (rows of each class for a classification); None
            for all training rows.
        draws: Independent draws of the shots, each with an adapter of its own.
        split: The rows on which the adapted models are scored.
        progress: Called with (update, updates, figures); waves follow one another.

    Returns:
        Scores and adapters by (task, draw). In one of several processes the scores are those of
        all tasks, the adapters those of this process.
    """
    run, ranks = run or Run(), join()
    check_verb(method, "adapt")
    objective = bound(objective_of(tasks).fit(tasks), model)
    out = run.out
    every = run.eval_every if run.patience else 0
    run = run.replace(out=None, eval_every=every, tasks_per_step=None)
    given = model
    model, objective = _to_adapt(given, objective, run.seed)
    check_model(ranks, model)
    slots = list(draw_shots(tasks, objective.kind, shots, draws, run.seed))
    wanted = [(slot.task, slot.draw) for slot in slots]
    done: dict[TaskDraw, tuple[float, int]] = {}
    if out is not None:
        # Tasks may be added later, and with them labels; these are the rows'.
        own = settings_of(objective)
        about = {"shots": shots, "split": split, "objective": own, **inputs_of(model, tasks)}
        done = ranks.first(lambda: _begin_adapting(out, method, run, about))
        slots = [slot for slot in slots if (slot.task, slot.draw) not in done]
    deal = deal_out(ranks, TaskData(slots, objective), run.batch_size, len(slots), pooled=False)
    result = Adapted({}, {}, {}, {}, "", write=getattr(method, "write", None))
    result.labels = labels_of(objective, tasks.names)
    # Whole models bring their head; adapters are put on the base's.
    if method.shares_base and objective.num_outputs() is not None:
        width = head_width(model)
        result.num_labels = None if width == head_width(given) else width
    with torch.random.fork_rng(), metered() as cost, ranks.together():
        for wave in _waves(deal, _wave_size(model, slots, objective, method, run)):
            _adapt_wave(model, wave, objective, method, run, split, result, progress)
            if out is not None:
                save_wave(result, [(rows.task, rows.draw) for rows in wave], out, ranks)
    result.cost = ranks.total_cost(result.cost | cost)
    for key, (score, num_rows) in done.items():
        result.scores[key], result.num_rows[key] = score, num_rows
    result.scores = ranks.merged(result.scores, wanted)
    result.num_rows = ranks.merged(result.num_rows, wanted)
    result.stopped = ranks.merged(result.stopped, wanted)
    if out is not None:
        ranks.first(lambda: collect_scores(out))
    return result


def _begin_adapting(
    out: Path, method: Any, run: Run, about: dict[str, Any]
) -> dict[TaskDraw, tuple[float, int]]:
    """Claims the folder; score and rows of each task that was finished there."""
    claim_folder(out, resume=run.resume, overwrite=run.overwrite)
    begin(out, method, run, about)
    return collect_scores(out)


def _adapt_wave(
    model: nn.Module,
    wave: Sequence[SlotRows],
    objective: Objective,
    method: Any,
    run: Run,
    split: str,
    result: Adapted,
    progress: Progress | None,
) -> None:
    data = TaskData(wave, objective)
    base = model if method.shares_base else copy.deepcopy(model)
    wanted = {p: p.requires_grad for p in base.parameters()}
    torch.manual_seed(run.seed)
    learner: Learner = method.learner(base, objective, data.keys, run)
    per_task = (
        sum(p.numel() for p in learner.base)
        if learner.bank is None
        else (learner.bank.parameters_per_slot)
    )
    stopping = EarlyStopping(learner, run.patience) if run.patience else None
    sampler = sampler_for(method, data, run)
    record = fit(learner, data, sampler, run, validate=False, stopping=stopping, progress=progress)
    if base is not model:
        interpolate(base, model, getattr(method, "interpolate", 1.0))
    for slot, step in stopping.stopped.items() if stopping else ():
        result.stopped[wave[slot].task, wave[slot].draw] = step
    with learner.ready():
        scores = learner.score(data, split, None)
    for slot, score in scores.items():
        result.scores[wave[slot].task, wave[slot].draw] = score
        result.num_rows[wave[slot].task, wave[slot].draw] = data.num_rows(slot, split)
    if learner.bank is not None:
        result.config = peft_config(learner.bank, base, getattr(base, "name_or_path", None) or None)
        result.base_fingerprint = fingerprint(base, learner.bank.head_names)
        for slot, rows in enumerate(wave):
            result.tensors[rows.task, rows.draw] = peft_tensors(learner.bank, slot)
    else:
        result.models[wave[0].task, wave[0].draw] = base
    result.cost["trainable_parameters"] = per_task
    for key in ("tokens", "examples"):
        result.cost[key] = result.cost.get(key, 0) + record[key]
    for p, trained in wanted.items():  # a method may have put others beside them
        p.requires_grad_(trained)


def draw_shots(
    tasks: TaskCollection, kind: str, shots: int | None, draws: int, seed: int
) -> Iterator[SlotRows]:
    """One slot for each task and draw, holding the first `shots` rows of a seeded permutation.

    The draw of fewer shots is the beginning of the draw of more, and depends on the task's name
    but not on which other tasks there are.

    Raises:
        UserError: A task without training rows, or shots below 1.
    """
    if shots is not None and shots < 1:
        raise UserError(f"shots must be at least 1, got {shots}")
    for task in tasks:
        if not task.train:
            raise UserError(f'task "{task.name}" has no training rows to adapt on')
        for draw in range(draws):
            rng = np.random.default_rng([seed, number_of(task.name), draw])
            order = rng.permutation(len(task.train)).tolist()
            chosen = order if shots is None else _first(task, order, shots, kind)
            yield SlotRows(
                key=task.name if draw == 0 else f"{task.name}#{draw}",
                train=select(task.train, chosen),
                validation=task.validation,
                test=task.test,
                task=task.name,
                draw=draw,
            )


def _first(task: Task, order: list[int], shots: int, kind: str) -> list[int]:
    if kind not in CLASSES:
        return order[:shots]
    taken: dict[Any, int] = {}
    chosen = []
    for i in order:
        label = label_of(task.train[i])
        if taken.setdefault(label, 0) < shots:
            taken[label] += 1
            chosen.append(i)
    return chosen


def sampler_for(method: Any, data: TaskData, run: Run, batches_per_update: int = 1) -> Sampler:
    """The order in which this method sees the training rows; the budget is the same for all."""
    sizes = [len(slot.train) for slot in data.slots]
    if method.pooled:
        together = min(run.tasks_per_step or len(data), len(data))
        # As many rows as the other sampler draws, which never repeats a row within a batch.
        in_a_round = sum(min(run.batch_size, size) for size in sizes)
        count = max(1, round(in_a_round * together / len(sizes)))
        return PooledSampler(sizes, count, run.seed)
    return PerTaskSampler(
        sizes, run.batch_size, run.tasks_per_step, run.seed, data.keys, batches_per_update
    )


def objective_of(tasks: TaskCollection) -> Objective:
    """The collection's objective.

    Raises:
        UserError: It has none.
    """
    if tasks.objective is None:
        raise UserError(
            "these tasks have no objective; give them one with tasks.with_objective(Choice(...))"
        )
    return tasks.objective


def _wave_size(
    model: nn.Module, slots: list[SlotRows], objective: Objective, method: Any, run: Run
) -> int:
    """How many tasks are adapted at the same time."""
    if not method.shares_base:
        return 1
    if run.tasks_per_wave is not None or not slots:
        return run.tasks_per_wave or 1
    wanted = [p.requires_grad for p in model.parameters()]
    bank = method.learner(model, objective, [slots[0].key], run).bank
    for p, trained in zip(model.parameters(), wanted, strict=True):
        p.requires_grad_(trained)
    each = 4 * 4 * bank.parameters_per_slot  # float32 value, gradient and two moments
    return max(1, free_memory(run.device) // 2 // each)


def _waves(deal: Deal, size: int) -> Iterator[list[SlotRows]]:
    slots = [deal.data.slots[slot] for slot in deal.slots]
    for start in range(0, len(slots), size):
        yield slots[start : start + size]
