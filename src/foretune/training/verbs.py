"""`retrain` and `adapt`, the verbs that train; what differs between methods is in their records."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretune.adapters.basis_file import load_basis, set_basis
from foretune.adapters.fingerprint import base_record
from foretune.adapters.peft_format import peft_config, peft_tensors
from foretune.errors import UserError
from foretune.files import RUN_FILE, write_whole
from foretune.manifest import final_path
from foretune.method import check_verb
from foretune.models.checkpoint import unstored_modules
from foretune.models.surgery import head_width, name_outputs
from foretune.processes import base_is_sharded
from foretune.run import Run
from foretune.tasks.objectives import settings_of
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.checkpoint import CheckpointStore
from foretune.training.data import SlotRows, TaskData, sampler_for
from foretune.training.learners.joint import Learner
from foretune.training.loop import Progress, check_device, fit, scores_after
from foretune.training.methods import AdaptMethod, RetrainMethod
from foretune.training.model_copies import (
    answers,
    copy_to_adapt,
    fresh_copy,
    has_drawn_head,
    has_other_labels,
    interpolate,
)
from foretune.training.outcome import Adapted, Outcome, folder_names, labels_of
from foretune.training.process_group import (
    Partition,
    check_layers,
    check_model,
    partition_slots,
    peer_errors,
    process_group,
)
from foretune.training.record import free_memory, metered
from foretune.training.resume import (
    SavedTask,
    TaskDraw,
    begin,
    claimed,
    collect_scores,
    inputs_of,
    inputs_to_adapt,
    load_finished,
    save_wave,
)
from foretune.training.scoring import score_slots
from foretune.training.seen_basis import basis_of_bank
from foretune.training.sharding import load_full_weights
from foretune.training.shots import draw_shots
from foretune.training.stopping import EarlyStopping
from foretune.training.text_limits import TextLimits


def retrain(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Outcome:
    """Retrains a copy of the model on many seen tasks, so that it adapts better to unseen ones.

    Args:
        model: The pretrained model; it is not changed. Parameters with `requires_grad=False` stay
            frozen.
        tasks: Seen tasks, with an objective.
        method: A retraining method such as `foretune.PEFTML()`.
        run: Random seed, budget, precision, folder; None for the defaults of `Run`.
        tokenizer: Saved beside the base; None for the objective's.
        progress: Called with (update, num_updates, figures) after every update.

    Returns:
        The retrained base in its best validated state; with `run.out` it is also on disk. With
        several processes the bank holds the tasks of this process, all else is the same in all.

    Raises:
        UserError: Bad data, a method of another verb, or a folder that is not empty.
        DivergedError: A loss is not finite.
        LostProcessError: Another process of the job has ended.
    """
    run, group = run or Run(), process_group()
    check_verb(method, "retrain")
    check_device(run.device)
    objective_of(tasks)
    retrain_in = _retrain_chosen if method.chooses else _retrain_in
    with claimed(run, "retrain", group) as run:
        return retrain_in(model, tasks, method, run, tokenizer, progress)


def _retrain_in(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run,
    tokenizer: Any,
    progress: Progress | None,
) -> Outcome:
    """Retrains in a folder that is claimed."""
    group = process_group()
    objective = method.objective_for(objective_of(tasks).fit(tasks).bind(model))
    data = TaskData.of(tasks, objective, TextLimits.of(model, objective))
    share = method.interpolate
    pretrained, model = model, fresh_copy(model, objective, run.seed)
    check_model(group, model)
    check_layers(group, model)
    inputs, finished = group.on_first_process(
        lambda: _begin_retraining(method, run, model, tasks, objective)
    )
    partition = partition_slots(
        group, data, run.batch_size, run.tasks_per_step, pooled=method.pooled
    )
    with torch.random.fork_rng(), metered() as cost, peer_errors():
        torch.manual_seed(run.seed)
        learner: Learner | None = method.learner(model, objective, partition.local_data.keys, run)
        if finished is None:
            record = _train(method, learner, model, partition, run, progress)
            if base_is_sharded():
                model = load_full_weights(fresh_copy(pretrained, objective, run.seed), model)
                if learner is not None and learner.bank is not None:
                    learner.bank.onto(model)
            fresh_head = has_other_labels(pretrained, objective)
            interpolate(model, pretrained, share, fresh_head=fresh_head)
        else:
            assert run.out is not None
            record = {**finished, "history": load_finished(run.out, learner, model, data.keys)}
    if hasattr(model, "name_or_path"):  # what adapters name as their base
        model.name_or_path = "" if run.out is None else final_path(run.out / "base")  # type: ignore[assignment]
    # A head that was not trained stands for the labels only if it did before or was drawn for them.
    is_named = learner is not None or answers(model, objective) or has_drawn_head(pretrained)
    if objective.shared().space is not None and is_named:
        name_outputs(model, objective.space or ())
    bank = learner.bank if learner and method.keeps_adapters else None
    if finished is not None and run.out is not None:
        basis = load_basis(run.out / "base")
    else:
        basis = None if bank is None else basis_of_bank(bank, partition, objective)
    set_basis(model, basis)
    outcome = Outcome(
        model=model.eval(),
        bank=bank if partition.slots else None,
        method=method,
        run=run if run.out is None else run.replace(out=Path(final_path(run.out))),
        objective=objective,
        tokenizer=tokenizer or objective.tokenizer,
        history=record["history"],
        # The score is that of the base before the interpolation.
        validation_score=record["validation_score"] if share == 1 else None,
        cost=record["cost"] if finished is not None else group.total_cost(cost) | record["cost"],
        tasks=data.keys,
        basis=basis,
        inputs=inputs,
    )
    if run.out is not None:
        _save(outcome, partition, run.out, save=finished is None)
    return outcome


def _retrain_chosen(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run,
    tokenizer: Any,
    progress: Progress | None,
) -> Outcome:
    """Lets the method choose another method, and retrains with that one."""
    group, out = process_group(), run.out
    chosen, choice = method.choose(model, tasks, run, progress)
    outcome = retrain(model, tasks, chosen, run, tokenizer=tokenizer, progress=progress)
    outcome.choice = choice
    if out is not None:
        text = json.dumps(outcome.record(), indent=1)
        group.on_first_process(lambda: write_whole(out / RUN_FILE, text))
    return outcome


def _begin_retraining(
    method: RetrainMethod, run: Run, model: nn.Module, tasks: TaskCollection, objective: Objective
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the run's inputs, and its record if it has finished in its folder."""
    if run.out is None:
        return {}, None
    inputs = {
        "tasks": tasks.names,
        "objective": objective.to_dict(),
        **inputs_of(model, tasks, objective.tokenizer),
    }
    return inputs, begin(run.out, method, run, inputs)


def _save(outcome: Outcome, partition: Partition, out: Path, *, save: bool) -> None:
    """Each process writes the adapters of its own tasks, then the first one writes all else."""
    with partition.group.raise_together():
        if save and partition.group.rank > 0:
            outcome.save_adapters(out)

    def finish() -> None:
        if save:
            outcome.save(out)
        CheckpointStore(out).clear()

    partition.group.on_first_process(finish)


def _train(
    method: RetrainMethod,
    learner: Learner | None,
    model: nn.Module,
    partition: Partition,
    run: Run,
    progress: Progress | None,
) -> dict[str, Any]:
    """Trains; returns history, validation score and cost. Without a learner it only scores."""
    data = partition.data
    if learner is None:
        local_scores = {}
        if partition.slots:
            local_scores = score_slots(model, partition.local_data, "validation", run.eval_rows)
        scores = partition.gather_scores(local_scores)
        best = sum(scores.values()) / len(scores) if scores else None
        cost = {"tokens": 0, "examples": 0, "validation_tokens": 0, "trainable_parameters": 0}
        return {"history": [], "validation_score": best, "cost": cost}
    budget = method.run_for(run, len(data))
    sampler = sampler_for(
        data, budget, pooled=method.pooled, batches_per_update=learner.batches_per_update
    )
    learner.average = method.average
    if learner.average:  # the averaged weights must still move: the rate must not fall to zero
        budget = budget.replace(schedule="constant")
    by_rows = method.pooled and learner.bank is None
    partition = replace(partition, by_rows=by_rows, sharded=base_is_sharded())
    record = fit(learner, data, sampler, budget, progress=progress, partition=partition)
    adapters = 0 if learner.bank is None else learner.bank.parameters_per_slot * len(data)
    cost = {key: record[key] for key in ("tokens", "examples", "validation_tokens")}
    cost["trainable_parameters"] = adapters + sum(p.numel() for p in learner.base)
    return {"history": record["history"], "validation_score": record["best_score"], "cost": cost}


def adapt(
    model: nn.Module,
    tasks: TaskCollection,
    method: AdaptMethod,
    run: Run | None = None,
    *,
    shots: int | None = None,
    draws: int = 1,
    split: str = "test",
    progress: Progress | None = None,
) -> Adapted:
    """Adapts the model to each of many unseen tasks; adapters of many tasks train at once.

    The state after the last step is returned: a few shots leave no examples to choose a checkpoint
    by, and the test examples are never used for it.

    Args:
        model: A base; it is not changed.
        tasks: Unseen tasks, with an objective.
        method: An adapting method such as `foretune.LoRA()`.
        run: Random seed, budget, precision, folder; None for the defaults of `Run`.
            `tasks_per_wave` limits how many tasks are adapted at the same time; all of these are
            in every step, `tasks_per_step` is ignored.
        shots: Training examples per task (per class for a classification); None for all.
        draws: Independent draws of the shots, with one adapter each.
        split: The split that the adapted models are scored on.
        progress: Called with (update, num_updates, figures) after every update, wave by wave.

    Returns:
        Scores and adapters by (task, draw). With several processes the scores are those of all
        tasks, the adapters those of this process.

    Raises:
        UserError: Bad data, a method of another verb, or a folder that is not empty.
        DivergedError: A loss is not finite.
        LostProcessError: Another process of the job has ended.
    """
    run, group = run or Run(), process_group()
    check_verb(method, "adapt")
    check_device(run.device)
    objective = objective_of(tasks).fit(tasks).bind(model)
    with claimed(run, "adapt", group) as run:
        return _adapt_in(
            model, tasks.with_objective(objective), method, run, shots, draws, split, progress
        )


def _adapt_in(
    model: nn.Module,
    tasks: TaskCollection,
    method: AdaptMethod,
    run: Run,
    shots: int | None,
    draws: int,
    split: str,
    progress: Progress | None,
) -> Adapted:
    """Adapts in a folder that is claimed, or in memory."""
    group, out = process_group(), run.out
    eval_every = run.eval_every if run.patience else 0
    run = run.replace(out=None, eval_every=eval_every, tasks_per_step=None)
    base = model
    model, objective = copy_to_adapt(base, objective_of(tasks), run.seed)
    check_model(group, model)
    limits = TextLimits.of(base, objective)
    slots = list(draw_shots(tasks, objective.kind, shots, draws, run.seed))
    task_draws = [(slot.task, slot.draw) for slot in slots]
    saved: dict[TaskDraw, SavedTask] = {}
    if out is not None:
        # Tasks may be added later, and labels with them, so the settings leave labels out.
        inputs = {"shots": shots, "split": split, "objective": settings_of(objective)}
        inputs |= inputs_to_adapt(base, model, tasks, objective)
        saved = group.on_first_process(lambda: _begin_adapting(out, method, run, inputs))
        slots = [slot for slot in slots if (slot.task, slot.draw) not in saved]
    partition = partition_slots(
        group, TaskData(slots, objective, limits), run.batch_size, len(slots), pooled=False
    )
    result = Adapted({}, {}, {}, {}, {})
    result.labels = labels_of(objective, tasks.names)
    result.folders = folder_names(task_draws, {key: task.folder for key, task in saved.items()})
    # Whole models have their own head; adapters are loaded onto the base's.
    if method.shares_base and objective.num_outputs() is not None:
        width = head_width(model)
        is_stored = width == head_width(base) and not unstored_modules(base)
        result.num_labels = None if is_stored else width
    with torch.random.fork_rng(), metered() as cost, group.raise_together():
        for wave in _waves(partition, _wave_size(model, slots, objective, method, run)):
            _adapt_wave(model, wave, objective, method, run, split, result, progress)
            if out is not None:
                save_wave(result, [(rows.task, rows.draw) for rows in wave], out, group)
    result.cost = group.total_cost(result.cost | cost)
    for key, task in saved.items():
        if task.score is not None:
            result.scores[key], result.num_rows[key] = task.score, task.num_rows
    result.scores = group.merge(result.scores, task_draws)
    result.num_rows = group.merge(result.num_rows, task_draws)
    result.stopped = group.merge(result.stopped, task_draws)
    if out is not None:
        group.on_first_process(lambda: collect_scores(out))
    return result


def _begin_adapting(
    out: Path, method: AdaptMethod, run: Run, inputs: dict[str, Any]
) -> dict[TaskDraw, SavedTask]:
    """Records what begins in the folder; returns the tasks that have finished there."""
    begin(out, method, run, inputs)
    return collect_scores(out)


def _adapt_wave(
    model: nn.Module,
    wave: Sequence[SlotRows],
    objective: Objective,
    method: AdaptMethod,
    run: Run,
    split: str,
    result: Adapted,
    progress: Progress | None,
) -> None:
    data = TaskData(wave, objective, TextLimits.of(model, objective))
    base = model if method.shares_base else copy.deepcopy(model)
    requires_grad = {p: p.requires_grad for p in base.parameters()}
    torch.manual_seed(run.seed)
    learner: Learner = method.learner(base, objective, data.keys, run)
    per_task = learner.parameters_per_task
    stopping = EarlyStopping(learner, run.patience) if run.patience else None
    sampler = sampler_for(data, run, pooled=method.pooled)
    record = fit(learner, data, sampler, run, validate=False, stopping=stopping, progress=progress)
    if base is not model:
        interpolate(base, model, method.interpolate)
    for slot, step in stopping.stopped.items() if stopping else ():
        result.stopped[wave[slot].task, wave[slot].draw] = step
    with learner.ready():
        scores = scores_after(run.steps, learner, data, split, None, run)
    for slot, score in scores.items():
        result.scores[wave[slot].task, wave[slot].draw] = score
        result.num_rows[wave[slot].task, wave[slot].draw] = data.num_rows(slot, split)
    if learner.bank is not None:
        result.config = peft_config(learner.bank, base, getattr(base, "name_or_path", None) or None)
        result.base_fingerprint = base_record(base, learner.bank.head_names)
        for slot, rows in enumerate(wave):
            result.tensors[rows.task, rows.draw] = peft_tensors(learner.bank, slot)
    else:
        learner.stop()
        result.models[wave[0].task, wave[0].draw] = base
        result.learners[wave[0].task, wave[0].draw] = learner
    result.cost["trainable_parameters"] = per_task
    for key in ("tokens", "examples"):
        result.cost[key] = result.cost.get(key, 0) + record[key]
    for p, trained in requires_grad.items():  # the method may have added parameters
        p.requires_grad_(trained)


def objective_of(tasks: TaskCollection) -> Objective:
    """The collection's objective.

    Raises:
        UserError: It has none, or one that does not subclass `Objective`.
    """
    objective = tasks.objective
    if objective is None:
        raise UserError(
            "these tasks have no objective; set one with tasks.with_objective(Choice(...))"
        )
    if Objective not in type(objective).__mro__:
        raise UserError(
            f"{type(objective).__name__} is not an objective: it must subclass "
            "foretune.tasks.task.Objective"
        )
    return objective


def _wave_size(
    model: nn.Module, slots: list[SlotRows], objective: Objective, method: AdaptMethod, run: Run
) -> int:
    """Number of tasks that are adapted at the same time."""
    if not method.shares_base:
        return 1
    if run.tasks_per_wave is not None or not slots:
        return run.tasks_per_wave or 1
    requires_grad = [p.requires_grad for p in model.parameters()]
    bank = method.learner(model, objective, [slots[0].key], run).bank
    for p, trained in zip(model.parameters(), requires_grad, strict=True):
        p.requires_grad_(trained)
    assert bank is not None  # a method that shares its base trains a bank
    bytes_per_task = 4 * 4 * bank.parameters_per_slot  # float32 value, gradient and two moments
    return max(1, free_memory(run.device) // 2 // bytes_per_task)


def _waves(partition: Partition, size: int) -> Iterator[list[SlotRows]]:
    slots = [partition.data.slots[slot] for slot in partition.slots]
    for start in range(0, len(slots), size):
        yield slots[start : start + size]
