"""How `adapt` adapts: waves of tasks on one frozen base, with scores along the path."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from foretune.adapters.fingerprint import base_record
from foretune.adapters.peft_format import peft_config, peft_tensors
from foretune.errors import UserError
from foretune.models.checkpoint import unstored_modules
from foretune.models.prefix_cache import renew_prefix_caches
from foretune.models.quantised import quantised_as, refuse_quantised
from foretune.models.seeding import seed_generators
from foretune.models.surgery import head_width
from foretune.processes import base_is_sharded
from foretune.run import Run
from foretune.tasks.objectives import settings_of
from foretune.tasks.shard import Shard, digest_of_names
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.adapt_plan import AdaptPlan, Setting
from foretune.training.data import SlotRows, TaskData, sampler_for
from foretune.training.learners.joint import Learner
from foretune.training.loop import Progress, fit, naming_step, scores_after
from foretune.training.methods import AdaptMethod
from foretune.training.model_copies import copy_to_adapt, interpolate
from foretune.training.outcome import Adapted, folder_names, labels_of
from foretune.training.process_group import (
    Partition,
    ProcessGroup,
    check_model,
    partition_slots,
    process_group,
)
from foretune.training.record import free_memory, metered
from foretune.training.resume import (
    begin,
    collect_scores,
    inputs_to_adapt,
    save_wave,
)
from foretune.training.scores_file import SavedTask, TaskDraw
from foretune.training.shots import draw_shots
from foretune.training.stopping import EarlyStopping
from foretune.training.text_limits import TextLimits
from foretune.training.trained_on import TrainedOn, base_of

V = TypeVar("V")
# Tasks that are adapted at the same time at most, where nothing else is set: so many keep a machine
# busy, and what is saved after each wave is not lost when a run is interrupted.
MOST_PER_WAVE = 1000


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What `adapt` was asked for, beside model and tasks; its arguments by their names.

    With `variants`, which differ from `method` in `slot_fields` alone, each draw is adapted by each
    of them side by side: they are numbered as further draws.
    """

    method: AdaptMethod | AdaptPlan
    run: Run
    shots: int | None
    draws: int
    split: str
    score_at: Sequence[int]
    progress: Progress | None
    replace: bool = False
    scores_only: bool = False
    shard: Shard | None = None
    variants: Sequence[AdaptMethod] = ()

    def variant_of(self, draw: int) -> int:
        """Which of the variants a draw is adapted by: there are `draws` of each in turn."""
        return draw // self.draws


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to adapt, and the slots that are adapted in it."""

    method: AdaptMethod
    run: Run
    slots: list[SlotRows]


def check_path(score_at: Sequence[int], run: Run) -> None:
    """Checks the steps that an adaptation is to be scored at.

    Raises:
        UserError: One is beyond the run's last step, or tasks may stop before it.
    """
    for step in score_at:
        if not 0 <= step <= run.steps:
            raise UserError(f"score_at takes steps from 0 to {run.steps}, got {step}")
    if score_at and run.patience:
        raise UserError(
            f"score_at needs all tasks to take all steps, but patience={run.patience} stops some"
        )


def adapt_in(model: nn.Module, tasks: TaskCollection, how: Adaptation) -> Adapted:
    """Adapts in a folder that is claimed, or in memory.

    Args:
        model: A base; it is not changed.
        tasks: The tasks, with a fitted objective that is bound to the model.
        how: The adaptation.
    """
    group, run, out = process_group(), how.run, how.run.out
    assert tasks.objective is not None  # `adapt` sets it
    eval_every = run.eval_every if run.patience else 0
    run = run.replace(out=None, eval_every=eval_every, tasks_per_step=None)
    base = model
    model, objective = copy_to_adapt(base, tasks.objective, run.seed)
    check_model(group, model)
    limits = TextLimits.of(base, objective)
    # The objective is that of all tasks, so that a head is as wide in every shard.
    names = tasks.names if how.shard is None else how.shard.names(tasks.names)
    part = [tasks[name] for name in names]
    slots = list(draw_shots(part, objective.kind, how.shots, how.draws, run.seed))
    if how.variants:  # with the same key, on which all depends that is random
        slots = [
            dataclasses.replace(slot, draw=slot.draw + how.draws * i)
            for i in range(len(how.variants))
            for slot in slots
        ]
    task_draws = [(slot.task, slot.draw) for slot in slots]
    saved: dict[TaskDraw, SavedTask] = {}
    changed: dict[TaskDraw, SavedTask] = {}
    if out is not None:
        # Tasks may be added later, and labels with them, so the settings leave labels out.
        inputs = {"shots": how.shots, "split": how.split, "objective": settings_of(objective)}
        inputs |= inputs_to_adapt(base, model, part, objective)
        inputs |= {"shard": None if how.shard is None else str(how.shard)}
        if how.shard is not None:
            inputs |= {"all_tasks": digest_of_names(tasks.names)}
        saved = group.on_first_process(
            lambda: _begin_adapting(out, how.method, run, inputs, how.replace)
        )
        changed = {
            key: task
            for key, task in saved.items()
            if key in task_draws and task.digest not in (None, tasks[key[0]].digest)
        }
        saved = {key: task for key, task in saved.items() if key not in changed}
        slots = [slot for slot in slots if (slot.task, slot.draw) not in saved]
    result = Adapted({}, {}, {}, {}, {}, earlier=changed)
    result.digests = {task.name: task.digest for task in part}
    ways = _ways(how, run, slots)
    if isinstance(how.method, AdaptPlan):
        result.settings = {
            (slot.task, slot.draw): Setting(method=way.method, steps=way.run.steps)
            for way in ways
            for slot in way.slots
        }
    in_use = {key: task.folder for key, task in (saved | changed).items()}
    result.labels = labels_of(objective, names)
    result.folders = folder_names(task_draws, in_use)
    # Whole models have their own head; adapters are loaded onto the base's.
    shares_base = any(way.method.shares_base for way in ways)
    if base_is_sharded():
        _check_sharding(model, ways)
    if shares_base and objective.num_outputs() is not None:
        width = head_width(model)
        is_stored = width == head_width(base) and not unstored_modules(base)
        result.num_labels = None if is_stored else width
    with torch.random.fork_rng(), metered() as cost, group.raise_together():
        for way in ways:
            waves = _waves(group, TaskData(way.slots, objective, limits), way, model)
            for number, wave in enumerate(waves):
                if number:
                    renew_prefix_caches()
                keys = _adapt_wave(model, wave, objective, way, how, result)
                if out is not None:
                    save_wave(result, keys, out, group)
    result.cost = group.total_cost(result.cost | cost)
    for key, task in saved.items():
        if task.score is not None:
            result.scores[key], result.num_rows[key] = task.score, task.num_rows
    result.scores = group.merge(result.scores, task_draws)
    result.num_rows = group.merge(result.num_rows, task_draws)
    result.stopped = group.merge(result.stopped, task_draws)
    steps = sorted({*how.score_at})
    result.path = {s: group.merge(result.path.get(s, {}), task_draws) for s in steps}
    if objective.select_by_loss:
        losses = result.path_losses
        result.path_losses = {s: group.merge(losses.get(s, {}), task_draws) for s in steps}
    if out is not None:
        group.on_first_process(lambda: collect_scores(out))
    return result


def _ways(how: Adaptation, run: Run, slots: Sequence[SlotRows]) -> list[Way]:
    """The ways in which the slots are adapted: a single one, or those of a plan by their rows."""
    if not isinstance(how.method, AdaptPlan):
        return [Way(method=how.method, run=run, slots=list(slots))]
    plan, ways = how.method, dict[str, Way]()
    for slot in slots:
        setting = None if how.shots is None else plan.at_shots(how.shots)
        setting = setting or plan.setting_for(len(slot.train))
        way = Way(method=setting.method, run=plan.run_for(setting, run), slots=[])
        ways.setdefault(repr(setting), way).slots.append(slot)
    return list(ways.values())


def _begin_adapting(
    out: Path, method: AdaptMethod | AdaptPlan, run: Run, inputs: dict[str, Any], replace: bool
) -> dict[TaskDraw, SavedTask]:
    """Records what begins in the folder; returns the tasks that have finished there."""
    advice = "--replace (replace=True) adapts that task again and keeps the earlier adapter"
    begin(out, method, run, inputs, replace=replace, about_rows=advice)
    return collect_scores(out)


def _adapt_wave(
    model: nn.Module,
    wave: Partition,
    objective: Objective,
    way: Way,
    how: Adaptation,
    result: Adapted,
) -> list[TaskDraw]:
    """Adapts the tasks of one wave, and adds those of this process to the result."""
    method, run = way.method, way.run
    if not method.shares_base:
        advice = "adapt it with lora or head, or load it without quantize"
        refuse_quantised(model, method.name, advice)
    data = wave.local_data
    keys = [(data.slots[i].task, data.slots[i].draw) for i in range(len(wave.slots))]
    # A base that is sharded is a copy: the next wave, and its record, need the whole one.
    base = copy.deepcopy(model) if wave.sharded or not method.shares_base else model
    requires_grad = {p: p.requires_grad for p in base.parameters()}
    seed_generators(run.seed)
    learner: Learner = method.learner(base, objective, data.keys, run)
    if how.variants:
        learner.vary([how.variants[how.variant_of(slot.draw)] for slot in data.slots])
    per_task = learner.parameters_per_task

    path: dict[int, dict[int, float]] = {}
    losses: dict[int, dict[int, float]] = {}

    def score(step: int) -> None:
        if step not in how.score_at:
            return
        interpolates = not method.shares_base and method.interpolate != 1
        state = learner.slot_state(0) if interpolates else {}
        if interpolates:
            interpolate(base, model, method.interpolate)
        with naming_step(step, learner, run):
            if objective.select_by_loss:
                path[step], losses[step] = learner.scores_and_losses(data, how.split)
            else:
                path[step] = learner.score(data, how.split, None)
        if interpolates:
            learner.load_slot(0, state)

    stopping = EarlyStopping(learner, run.patience) if run.patience else None
    record = fit(
        learner,
        wave.data,
        sampler_for(wave.data, run, pooled=method.pooled),
        run,
        validate=False,
        stopping=stopping,
        progress=how.progress,
        partition=wave,
        at_step=score,
    )
    if not method.shares_base:
        interpolate(base, model, method.interpolate)
    scores = path.get(run.steps)
    if scores is None:
        with learner.ready():
            scores = scores_after(run.steps, learner, data, how.split, None, run)
    for merged, by_step in ((result.path, path), (result.path_losses, losses)):
        for step, by_slot in by_step.items():
            merged.setdefault(step, {}).update(_by_key(by_slot, keys))
    result.num_train |= {key: data.num_rows(s, "train") for s, key in enumerate(keys)}
    result.scores |= _by_key(scores, keys)
    result.num_rows |= _by_key({s: data.num_rows(s, how.split) for s in scores}, keys)
    for slot, step in stopping.stopped.items() if stopping else ():
        result.stopped[keys[slot]] = step
    if learner.bank is not None:
        name = getattr(model, "name_or_path", None) or None
        result.config = peft_config(learner.bank, model, name)
        result.base_fingerprint = base_record(model, learner.bank.head_names)
        for slot, key in enumerate(keys):
            result.tensors[key] = peft_tensors(learner.bank, slot)
            result.records[key] = (result.config, result.base_fingerprint)
    else:
        learner.stop()
        if not how.scores_only:
            result.models[keys[0]] = base
            result.learners[keys[0]] = learner
    for slot, key in enumerate(keys):
        result.trained_on[key] = TrainedOn(
            task=key[0],
            draw=key[1],
            rows=data.slots[slot].train,
            method=method.to_dict(),
            steps=run.steps,
            objective=objective,
            **base_of(model, result.num_labels),
        )
    result.cost["trainable_parameters"] = max(per_task, result.cost.get("trainable_parameters", 0))
    for name in ("tokens", "examples"):
        # Where processes train together, each has counted what all of them did.
        counted = record[name] if wave.group.rank == 0 else 0
        result.cost[name] = result.cost.get(name, 0) + counted
    for p, trained in requires_grad.items():  # the method may have added parameters
        p.requires_grad_(trained)
    return keys


def _by_key(values: Mapping[int, V], keys: Sequence[TaskDraw]) -> dict[TaskDraw, V]:
    """The values of slots by task and draw; of a slot without a key, an unused copy, none."""
    return {keys[slot]: value for slot, value in values.items() if slot < len(keys)}


def _wave_size(model: nn.Module, objective: Objective, way: Way) -> int:
    """Number of tasks that are adapted at the same time."""
    method, run, slots = way.method, way.run, way.slots
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
    return max(1, min(MOST_PER_WAVE, free_memory(run.device) // 2 // bytes_per_task))


def _waves(group: ProcessGroup, data: TaskData, way: Way, model: nn.Module) -> Iterator[Partition]:
    """This process's part of each wave: alone with its own tasks, or together on a sharded base."""

    def partition_of(part: TaskData) -> Partition:
        return partition_slots(group, part, way.run.batch_size, len(part), pooled=False)

    size = _wave_size(model, data.objective, way)
    if base_is_sharded():
        size = min(group.gather(size)) * group.size
        for start in range(0, len(data), size):
            part = TaskData(data.slots[start : start + size], data.objective, data.limits)
            yield dataclasses.replace(partition_of(part), sharded=True)
        return
    partition = partition_of(data)
    slots = [data.slots[slot] for slot in partition.slots]
    for start in range(0, len(slots), size):
        yield Partition(TaskData(slots[start : start + size], data.objective, data.limits))


def _check_sharding(model: nn.Module, ways: Sequence[Way]) -> None:
    """Checks that these ways can adapt a base that is sharded over the processes.

    Raises:
        UserError: One cannot.
    """
    if quantised_as(model) is not None:
        raise UserError(
            "a quantised base cannot be sharded (FSDP): adapt without FSDP, each process then "
            "holds all of it"
        )
    for way in ways:
        if not way.method.shares_base:
            raise UserError(
                f"{way.method.name} trains a whole copy of the base for each task, which is not "
                "sharded (FSDP): adapt with lora or head, or without FSDP"
            )
        if way.run.patience:
            raise UserError(
                f"patience={way.run.patience} stops tasks one by one, which a sharded base (FSDP) "
                "does not allow: leave patience out, or adapt without FSDP"
            )
