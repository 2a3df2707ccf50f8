"""How `retrain` retrains: a copy of the model, validated, settled and saved."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretune.adapters.basis_file import load_basis, set_basis
from foretune.errors import DivergedError
from foretune.manifest import final_path
from foretune.models.seeding import seed_generators
from foretune.models.surgery import name_outputs
from foretune.processes import base_is_sharded
from foretune.run import Run
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.adapted_scores import best_scores
from foretune.training.adapting import Adaptation, adapt_in
from foretune.training.checkpoint import CheckpointStore
from foretune.training.data import TaskData, sampler_for
from foretune.training.held_out import HeldOut
from foretune.training.learners.joint import Learner
from foretune.training.loop import AdaptedScores, Progress, fit
from foretune.training.methods import RetrainMethod
from foretune.training.model_copies import (
    answers,
    fresh_copy,
    has_drawn_head,
    has_other_labels,
    interpolate,
)
from foretune.training.outcome import Outcome
from foretune.training.process_group import (
    Partition,
    check_layers,
    check_model,
    partition_slots,
    peer_errors,
    process_group,
)
from foretune.training.record import counted, metered
from foretune.training.resume import (
    begin,
    inputs_of,
    load_finished,
)
from foretune.training.scoring import score_slots
from foretune.training.seen_basis import basis_of_bank
from foretune.training.sharding import load_full_weights
from foretune.training.text_limits import TextLimits


def retrain_in(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run,
    held_out: HeldOut | None,
    tokenizer: Any,
    progress: Progress | None,
) -> Outcome:
    """Retrains in a folder that is claimed.

    Args:
        model: The pretrained model; it is not changed.
        tasks: The seen tasks, with an objective that is fitted to them.
        method: The method.
        run: The run.
        held_out: As in `retrain`.
        tokenizer: As in `retrain`.
        progress: As in `retrain`.
    """
    group = process_group()
    assert tasks.objective is not None  # `retrain` sets it
    objective = method.objective_for(tasks.objective.bind(model))
    data = TaskData.of(tasks, objective, TextLimits.of(model, objective))
    share = method.interpolate
    pretrained, model = model, fresh_copy(model, objective, run.seed)
    set_basis(model, None)  # that of the input describes other adapters
    model.foretune_adapting = None  # type: ignore[assignment]  # that of another base
    check_model(group, model)
    check_layers(group, model)
    inputs, finished = group.on_first_process(
        lambda: _begin_retraining(method, run, model, tasks, objective, held_out)
    )
    partition = partition_slots(
        group, data, run.batch_size, run.tasks_per_step, pooled=method.pooled
    )
    with torch.random.fork_rng(), metered() as cost, peer_errors():
        seed_generators(run.seed)
        learner: Learner | None = method.learner(model, objective, partition.local_data.keys, run)
        if finished is None:
            adapted_scores = None
            if held_out is not None:
                held_out_rows = held_out.with_rows(run.eval_rows, tasks.objective)

                def adapted_scores() -> dict[str, float] | None:
                    base = copy.deepcopy(model)
                    _settle(base, pretrained, learner, method, objective)
                    return _adapted_scores(base, held_out_rows, held_out, run)

            record = _train(method, learner, model, partition, run, adapted_scores, progress)
            if base_is_sharded():
                model = load_full_weights(fresh_copy(pretrained, objective, run.seed), model)
                if learner is not None and learner.bank is not None:
                    learner.bank.onto(model)
            _settle(model, pretrained, learner, method, objective)
        else:
            assert run.out is not None
            record = {**finished, "history": load_finished(run.out, learner, model, data.keys)}
            _name(model, pretrained, learner, objective)
    if run.out is not None and hasattr(model, "name_or_path"):  # what adapters name as their base
        model.name_or_path = final_path(run.out / "base")  # type: ignore[assignment]
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
        # On the seen tasks the base is scored before the interpolation.
        validation_score=record["validation_score"] if share == 1 or held_out else None,
        held_out_scores=record.get("held_out_scores"),
        cost=record["cost"] if finished is not None else group.total_cost(cost) | record["cost"],
        tasks=data.keys,
        basis=basis,
        inputs=inputs,
        rows={task.name: task.train for task in tasks},
    )
    if run.out is not None:
        _save(outcome, partition, run.out, save=finished is None)
    return outcome


def _settle(
    model: nn.Module,
    pretrained: nn.Module,
    learner: Learner | None,
    method: RetrainMethod,
    objective: Objective,
) -> None:
    """Makes of a trained model, in place, the base that is returned."""
    if learner is not None:
        learner.settle(model)
    fresh_head = has_other_labels(pretrained, objective)
    interpolate(model, pretrained, method.interpolate, fresh_head=fresh_head)
    _name(model, pretrained, learner, objective)


def _name(
    model: nn.Module, pretrained: nn.Module, learner: Learner | None, objective: Objective
) -> None:
    """Names the outputs of a base by the labels that they stand for; it is no stored model's."""
    # A head that was not trained stands for the labels only if it did before or was drawn for them.
    is_named = learner is not None or answers(model, objective) or has_drawn_head(pretrained)
    if objective.shared().space is not None and is_named:
        name_outputs(model, objective.space or ())
    if hasattr(model, "name_or_path"):
        model.name_or_path = ""  # type: ignore[assignment]


def _adapted_scores(
    base: nn.Module, tasks: TaskCollection, held_out: HeldOut, run: Run
) -> dict[str, float] | None:
    """The scores by task where they are best along one adaptation; None if that diverges."""
    assert tasks.objective is not None  # that of the seen tasks
    tasks = tasks.with_objective(tasks.objective.fit(tasks).bind(base))
    how = Adaptation(
        method=held_out.method,
        run=held_out.run_in(run),
        shots=held_out.shots,
        draws=held_out.draws,
        split="validation",
        score_at=held_out.score_at,
        progress=None,
    )
    try:
        adapted = adapt_in(base, tasks, how)
    except DivergedError:
        return None
    return best_scores(adapted.path)


def _begin_retraining(
    method: RetrainMethod,
    run: Run,
    model: nn.Module,
    tasks: TaskCollection,
    objective: Objective,
    held_out: HeldOut | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the run's inputs, and its record if it has finished in its folder."""
    if run.out is None:
        return {}, None
    inputs = {
        "tasks": tasks.names,
        "objective": objective.to_dict(),
        **inputs_of(model, tasks, objective.tokenizer),
        "held_out": None if held_out is None else held_out.to_dict(),
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
    adapted_scores: AdaptedScores | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Trains; returns history, validation score and cost. Without a learner it only scores."""
    data = partition.data
    if learner is None:
        return _scored(model, partition, run, adapted_scores)
    budget = method.run_for(run, len(data))
    sampler = sampler_for(
        data, budget, pooled=method.pooled, batches_per_update=learner.batches_per_update
    )
    learner.average = method.average
    if learner.average:  # the averaged weights must still move: the rate must not fall to zero
        budget = budget.replace(schedule="constant")
    partition = replace(partition, by_rows=method.pooled, sharded=base_is_sharded())
    record = fit(
        learner,
        data,
        sampler,
        budget,
        adapted_scores=adapted_scores,
        progress=progress,
        partition=partition,
    )
    adapters = 0 if learner.bank is None else learner.parameters_per_task * len(data)
    cost = {key: record[key] for key in ("tokens", "examples", "validation_tokens")}
    cost["trainable_parameters"] = adapters + sum(p.numel() for p in learner.base)
    return {
        "history": record["history"],
        "validation_score": record["best_score"],
        "held_out_scores": record["by_task"],
        "cost": cost,
    }


def _scored(
    model: nn.Module,
    partition: Partition,
    run: Run,
    adapted_scores: AdaptedScores | None,
) -> dict[str, Any]:
    """The record of a retraining that trains nothing."""
    history: list[dict[str, Any]] = []
    by_task = None
    with counted() as spent:
        if adapted_scores is not None:
            by_task = adapted_scores()
            best = None if by_task is None else sum(by_task.values()) / len(by_task)
            history = [{"step": 0, "adapted_score": best}]
        else:
            local_scores = {}
            if partition.slots:
                local_scores = score_slots(model, partition.local_data, "validation", run.eval_rows)
            scores = partition.gather_scores(local_scores)
            best = sum(scores.values()) / len(scores) if scores else None
    validation_tokens = int(partition.group.sum(torch.tensor(spent["tokens"])))
    cost = {"tokens": 0, "examples": 0, "trainable_parameters": 0}
    cost["validation_tokens"] = validation_tokens
    return {
        "history": history,
        "validation_score": best,
        "held_out_scores": by_task,
        "cost": cost,
    }
