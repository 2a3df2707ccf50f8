"""`retrain` and `adapt`, the verbs that train; what differs between methods is in their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from foretune.errors import UserError
from foretune.files import RUN_FILE, write_whole
from foretune.method import check_verb
from foretune.models.quantised import refuse_quantised
from foretune.processes import base_is_sharded
from foretune.run import Run
from foretune.tasks.shard import Shard
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.adapt_plan import AdaptPlan, plan_of
from foretune.training.adapting import Adaptation, adapt_in, check_path
from foretune.training.held_out import HeldOut
from foretune.training.loop import Progress, check_device
from foretune.training.methods import AdaptMethod, RetrainMethod
from foretune.training.outcome import Adapted, Outcome
from foretune.training.process_group import (
    process_group,
)
from foretune.training.resume import (
    claimed,
)
from foretune.training.retraining import retrain_in


def retrain(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run | None = None,
    *,
    held_out: HeldOut | None = None,
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
        held_out: Tasks by which the base is validated after adapting to them, which also says
            before the first update how well the model adapts; None validates it by the validation
            examples of the seen tasks.
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
    refuse_quantised(
        model,
        "retraining",
        "retrain the original, then adapt that base with quantize",
    )
    objective_of(tasks)
    if run.steps < 1:
        raise UserError(
            f"steps must be a whole number not below 1, got {run.steps}: only adapting takes none"
        )
    retrain_with = _retrain_chosen if method.chooses else retrain_in
    if held_out is not None:
        held_out.check_apart(tasks)
        if base_is_sharded():
            raise UserError(
                "held-out tasks need the whole base in every process: leave held_out out, or train "
                "without FSDP"
            )
    if not method.chooses:
        tasks = tasks.with_objective(objective_of(tasks).fit(tasks))
    with claimed(run, "retrain", group) as run:
        return retrain_with(model, tasks, method, run, held_out, tokenizer, progress)


def _retrain_chosen(
    model: nn.Module,
    tasks: TaskCollection,
    method: RetrainMethod,
    run: Run,
    held_out: HeldOut | None,
    tokenizer: Any,
    progress: Progress | None,
) -> Outcome:
    """Lets the method choose another method, and retrains with that one."""
    group, out = process_group(), run.out
    chosen, choice = method.choose(model, tasks, run, progress, held_out)
    outcome = retrain(
        model, tasks, chosen, run, held_out=held_out, tokenizer=tokenizer, progress=progress
    )
    outcome.choice = choice
    if out is not None:
        text = json.dumps(outcome.record(), indent=1)
        group.on_first_process(lambda: write_whole(out / RUN_FILE, text))
    return outcome


def adapt(
    model: nn.Module,
    tasks: TaskCollection,
    method: AdaptMethod | AdaptPlan | None = None,
    run: Run | None = None,
    *,
    shots: int | None = None,
    draws: int = 1,
    split: str = "test",
    score_at: Sequence[int] = (),
    replace: bool = False,
    scores_only: bool = False,
    shard: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Adapts the model to each of many unseen tasks; adapters of many tasks train at once.

    The state after the last step is returned: a few shots leave no examples to choose a checkpoint
    by, and the test examples are never used for it.

    Args:
        model: A base; it is not changed.
        tasks: Unseen tasks, with an objective.
        method: An adapting method such as `foretune.LoRA()`, or a plan. None for the plan of a base
            that was loaded from its folder: as held-out tasks chose, by the task's number of rows.
        run: Random seed, budget, precision, folder; None for the defaults of `Run`. A plan sets the
            budget.
            `tasks_per_wave` limits how many tasks are adapted at the same time; all of these are
            in every step, `tasks_per_step` is ignored. 0 steps leave every task where the method
            starts.
        shots: Training examples per task (per class for a classification); None for all.
        draws: Independent draws of the shots, with one adapter each.
        split: The split that the adapted models are scored on.
        score_at: Steps after which all tasks are also scored (`Adapted.path`; where the score is an
            accuracy, `Adapted.path_losses` too), 0 for before the first; this changes nothing
            else. With a constant learning rate and no warmup, the score after s steps is that of a
            run of s steps.
        replace: With `run.resume`: tasks in the folder whose examples have changed are adapted
            again, and the earlier adapter goes to the folder `versions`; False refuses them.
        scores_only: Whole models that were adapted are dropped once they are scored, so that
            memory holds one of them at a time; without effect where `run.out` keeps them.
        shard: (K, N) adapts every N-th task by name, from the K-th on: one of N jobs that need no
            communication. The result of a task is as without it, up to the order of sums.
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
    method = method or plan_of(model)
    if method is None:
        raise UserError(
            "adapt needs a method, such as foretune.LoRA(): the base does not say how it is best "
            "adapted, as those of `foretune run` do"
        )
    if isinstance(method, AdaptPlan):
        if score_at:
            raise UserError("score_at needs a method: a plan takes other steps for each task")
    else:
        check_verb(method, "adapt")
    check_device(run.device)
    check_path(score_at, run)
    objective = objective_of(tasks).fit(tasks).bind(model)
    with claimed(run, "adapt", group) as run:
        how = Adaptation(
            method=method,
            run=run,
            shots=shots,
            draws=draws,
            split=split,
            score_at=score_at,
            progress=progress,
            replace=replace,
            scores_only=scores_only and run.out is None,
            shard=None if shard is None else Shard(*shard).checked(),
        )
        return adapt_in(model, tasks.with_objective(objective), how)


def adapt_variants(
    model: nn.Module,
    tasks: TaskCollection,
    methods: Sequence[AdaptMethod],
    run: Run,
    *,
    shots: int | None = None,
    draws: int = 1,
    split: str = "test",
    score_at: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Adapted]:
    """Adapts to each task by each of several methods, side by side: the steps are those of one.

    The result of each is that of `adapt`, up to the order of sums.

    Args:
        model: As for `adapt`, as are all others that are not listed.
        tasks: Tasks.
        methods: Records of one method that differ in its `slot_fields` alone.
        run: Random seed, budget and precision; nothing is saved.
        shots: Shots.
        draws: Draws.
        split: Split.
        score_at: Steps.
        progress: Progress.

    Raises:
        UserError: As `adapt`.
        DivergedError: A loss or score of any of them is not finite.
    """
    check_path(score_at, run)
    objective = objective_of(tasks).fit(tasks).bind(model)
    how = Adaptation(
        method=methods[0],
        run=run,
        shots=shots,
        draws=draws,
        split=split,
        score_at=score_at,
        progress=progress,
        variants=methods if len(methods) > 1 else (),
    )
    adapted = adapt_in(model, tasks.with_objective(objective), how)
    return [adapted.part(range(i * draws, (i + 1) * draws)) for i in range(len(methods))]


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
