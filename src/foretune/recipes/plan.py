"""`plan_recipe`: what a recipe would do and cost, from a few timed training steps per method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import foretune
from foretune.evaluation.conflict import Conflict
from foretune.recipes.adapting import BASIS_STEPS_FACTOR, candidates_of, held_out_of
from foretune.recipes.conflict import conflict_record, recipe_conflict
from foretune.recipes.console import SILENT, Console
from foretune.recipes.entries import MethodEntry, adapt_record, takes_rate
from foretune.recipes.plan_notes import plan_notes
from foretune.recipes.schema import Recipe
from foretune.recipes.setup import Setup, set_up
from foretune.recipes.timing import Stopwatch, evenly, rows_read, time_steps
from foretune.run import Run
from foretune.tasks.leakage import Leak, SharedInputs, find_overlaps
from foretune.tasks.summary import describe
from foretune.tasks.task import TaskCollection

if TYPE_CHECKING:
    from foretune.recipes.plan_layers import LayerPlan

STATE_BYTES = 16  # per trained parameter: its value, its gradient and two moments
FORWARD_SHARE = 1 / 3  # of the time of a forward and backward pass, approximately


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one method.

    Args:
        name: Name in the recipe.
        parameters: Trainable parameters by role: base, adapter (per task), head (per task).
        step_seconds: Time of a step; None for a method that trains nothing.
        seconds: Estimate for the whole recipe, including search, repeats and validations.
        peak_memory_mb: Peak memory of the steps that were timed, plus adapters that were left out;
            None if the system does not report it.
        layers: A step by its parts, from which time and memory were planned; None if steps were
            timed.
    """

    name: str
    parameters: dict[str, int]
    step_seconds: float | None
    seconds: float
    peak_memory_mb: float | None = None
    layers: LayerPlan | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe would do and cost.

    Args:
        name: Name of the recipe.
        notes: Sentences on tasks that are too few, that tell nothing, or that choose.
        conflict: Whether retraining is likely to pay, or why that cannot be measured.
        seen: Task → number of examples per split.
        unseen: The same for unseen tasks; None if the recipe has none.
        labels: Task → its labels, of seen and unseen tasks; empty where examples have none.
        drawn: What the numbers of shots come to, where a task has other numbers of rows.
        leaks: Examples that occur both in training and in evaluation data.
        shared_inputs: Inputs of unseen tasks that seen tasks have with answers of their own.
        retrain: Cost of each method.
        adapt: Cost of adapting all bases; None without unseen tasks.
    """

    name: str
    notes: list[str]
    conflict: Conflict | str
    seen: dict[str, dict[str, int]]
    unseen: dict[str, dict[str, int]] | None
    labels: dict[str, list[Any]]
    drawn: list[str]
    leaks: list[Leak]
    shared_inputs: list[SharedInputs]
    retrain: list[Cost]
    adapt: Cost | None

    @property
    def seconds(self) -> float:
        """Estimated time of the whole run."""
        return sum(cost.seconds for cost in [*self.retrain, *([self.adapt] if self.adapt else [])])

    @property
    def peak_memory_mb(self) -> float | None:
        """The highest peak memory of all methods; None if unknown."""
        costs = [*self.retrain, *([self.adapt] if self.adapt else [])]
        return max((cost.peak_memory_mb for cost in costs if cost.peak_memory_mb), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with the totals."""
        fields = {**dataclasses.asdict(self), "conflict": conflict_record(self.conflict)}
        return {**fields, "seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}


def plan_recipe(
    recipe: Recipe, console: Console = SILENT, *, layers: bool = False, processes: int = 1
) -> Plan:
    """Reads the data and times a few steps of each method.

    Args:
        recipe: The recipe.
        console: Receives the progress.
        layers: Plan the steps layer by layer instead, from the shapes of a model that is not
            loaded.
        processes: With `layers`, processes over which the base would be sharded (FSDP2).

    Raises:
        UserError: The data or the model does not fit the recipe, or cannot be planned by layers.
    """
    setup = set_up(recipe, console, weights=not layers)
    conflict: Conflict | str = "the model that measures it is not loaded"
    if not layers:
        conflict = recipe_conflict(setup, console)
    doing = "planning a step" if layers else "timing a few steps"
    costs: list[Cost] = []
    for entry in recipe.entries:
        console.say(f"{entry.name}: {doing}")
        cost = _choosing_cost if entry.method == "auto" else _retrain_cost
        costs.append(cost(setup, entry, all(c.step_seconds is None for c in costs), processes))
    adapt = None
    if setup.unseen is not None:
        console.say(f"adapting: {doing}")
        adapt = _adapt_cost(setup, setup.unseen, processes)
    overlaps = find_overlaps(setup.seen, setup.unseen)
    labels = _labels(setup)
    return Plan(
        name=recipe.name,
        notes=plan_notes(setup, labels),
        conflict=conflict,
        seen=describe(setup.seen),
        unseen=None if setup.unseen is None else describe(setup.unseen),
        leaks=overlaps.leaks,
        shared_inputs=overlaps.shared_inputs,
        labels=labels,
        drawn=[] if setup.unseen is None else _drawn(setup, setup.unseen),
        retrain=costs,
        adapt=adapt,
    )


def _labels(setup: Setup) -> dict[str, list[Any]]:
    """Task → its labels, for tasks whose outputs are labels."""
    from foretune.tasks.objectives.classification import one_form

    labels: dict[str, tuple[Any, ...]] = {}
    for tasks in (setup.seen, setup.unseen):
        if tasks is not None and tasks.objective is not None:
            for name in tasks.names:
                names = tasks.objective.local().output_labels(name)
                if names is not None:
                    labels[name] = tuple(label for label in names if label is not None)
    return {name: list(names) for name, names in one_form(labels).items()}


def is_on_meta(model: Any) -> bool:
    """Whether the model has shapes and no weights."""
    return any(p.is_meta for p in model.parameters())


def _drawn(setup: Setup, unseen: TaskCollection) -> list[str]:
    """What the recipe's numbers of shots come to in the unseen tasks."""
    from foretune.evaluation.wording import rows_drawn
    from foretune.tasks.rows import CLASSES
    from foretune.training.shots import draw_shots

    kind, block = setup.recipe.objective.kind, setup.recipe.adapt
    numbers = {
        shots: {len(slot.train) for slot in draw_shots(unseen, kind, shots, 1, 0)}
        for shots in block.row_counts
    }
    return rows_drawn(numbers, "rows per class" if kind in CLASSES else "rows")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step of full size, timed or planned: time and memory, and what reading a row takes."""

    seconds: float
    row_seconds: float
    parameters: dict[str, int]
    peak_memory_mb: float | None
    layers: LayerPlan | None = None


def _retrain_cost(setup: Setup, entry: MethodEntry, is_first: bool, processes: int) -> Cost:
    """The cost of retraining, of which the first bears that of frozen layers reading each row."""
    full_run = setup.recipe.retrain_run()
    if not takes_rate(entry.method):  # it trains nothing
        return Cost(name=entry.name, parameters={}, step_seconds=None, seconds=0.0)
    record = entry.record()
    together = min(full_run.tasks_per_step or len(setup.seen), len(setup.seen))
    if is_on_meta(setup.model):
        timed = _planned_retraining(setup, record, full_run, processes)
    else:
        timed = _timed_retraining(setup, record, full_run, together)
    step = timed.seconds
    per_row = step / (together * full_run.batch_size)
    once = 0.0
    if is_first and timed.row_seconds:
        once = timed.row_seconds * len(
            rows_read(setup.recipe.objective.kind, setup.seen, ("train", "validation"))
        )
    seconds = 0.0
    for steps in _retrainings(setup.recipe, entry):
        validations = _validations(full_run.eval_every, steps)
        seconds += steps * step + validations * _validated_rows(setup, record) * per_row
    return Cost(
        name=entry.name,
        parameters=timed.parameters,
        step_seconds=step,
        seconds=once + setup.recipe.seeds * seconds,
        peak_memory_mb=timed.peak_memory_mb,
        layers=timed.layers,
    )


def _timed_retraining(setup: Setup, record: Any, full_run: Run, together: int) -> _Step:
    # A method with episodes over all tasks updates the base once per several batches.
    episode = record.batches_per_update

    def train(tasks: TaskCollection, num_tasks: int, updates: int, watch: Stopwatch) -> Any:
        run = full_run.replace(steps=episode * updates, eval_every=0, tasks_per_step=num_tasks)
        return foretune.retrain(
            setup.model, tasks, record, run, tokenizer=setup.tokenizer, progress=watch
        )

    timing = time_steps(train, setup.seen, together, full_run.batch_size)
    per_step = timing.watch.updates / (episode * timing.watch.planned)
    return _Step(
        seconds=timing.seconds * per_step,
        row_seconds=timing.row_seconds * per_step,
        parameters=_parameters(timing.outcome.model, timing.outcome.bank),
        peak_memory_mb=timing.outcome.cost.get("peak_memory_mb"),
    )


def _planned_retraining(setup: Setup, record: Any, full_run: Run, processes: int) -> _Step:
    from foretune.training.model_copies import fresh_copy
    from foretune.training.verbs import objective_of

    objective = record.objective_for(objective_of(setup.seen).bind(setup.model))
    model = fresh_copy(setup.model, objective, full_run.seed)
    learner = record.learner(model, objective, setup.seen.names[:1], full_run)
    run = record.run_for(full_run, len(setup.seen))
    tasks = setup.seen.with_objective(objective)
    return _planned_step(learner, tasks, record, run, processes, run.steps / full_run.steps)


def _planned_step(
    learner: Any, tasks: TaskCollection, record: Any, run: Run, processes: int, factor: float
) -> _Step:
    """A step on all these tasks, planned by its layers; `factor` of them are one of full size."""
    from foretune.recipes.plan_layers import plan_layers

    parameters = _parameters(learner.model, learner.bank)
    plan = plan_layers(learner, tasks, record, run, processes)
    return _Step(
        seconds=plan.seconds * factor,
        row_seconds=0.0,
        parameters=parameters,
        peak_memory_mb=plan.memory_mb,
        layers=plan,
    )


def _retrainings(recipe: Recipe, entry: MethodEntry) -> list[int]:
    """The steps of each retraining of an entry in one repeat: its trials, and the base."""
    steps, trials = recipe.retrain_run().steps, len(entry.trials)
    trial_steps = min(recipe.retrain.search_steps or steps, steps)
    if trials == 1 or trial_steps == steps:  # the best trial is the base
        return [steps] * trials
    return [trial_steps] * trials + [steps]


def _validated_rows(setup: Setup, record: Any) -> float:
    """What a validation costs, in rows that go forward and backward."""
    rows = setup.recipe.retrain_run().eval_rows or math.inf
    held_out = held_out_of(setup, record)
    if held_out is None:
        return FORWARD_SHARE * sum(min(len(task.validation), rows) for task in setup.seen)
    trained = len(held_out.tasks) * held_out.run.steps * held_out.run.batch_size
    scored = sum(min(len(task.validation), rows) for task in held_out.tasks)
    scored *= len(held_out.score_at)
    return held_out.draws * (trained + FORWARD_SHARE * scored)


def _choosing_cost(setup: Setup, entry: MethodEntry, is_first: bool, processes: int) -> Cost:
    """The cost of `auto`, if each candidate is equally likely to stay.

    Candidates that differ only in their learning rate cost the same; one of them is timed.
    """
    from foretune.methods.auto import by_training

    record = entry.record()
    cost_by_kind: dict[str, Cost] = {}
    timed = []
    for candidate, *_ in by_training(record.candidates):
        fields = {k: v for k, v in candidate.items() if k not in ("name", "as", "learning_rate")}
        kind = f"{candidate['name']} {fields}"
        if kind not in cost_by_kind:
            timed_entry = MethodEntry(name=kind, method=candidate["name"], fields=fields, rates=[])
            first = is_first and not cost_by_kind
            cost_by_kind[kind] = _retrain_cost(setup, timed_entry, first, processes)
        timed.append(cost_by_kind[kind])
    seconds = sum(cost.seconds for cost in timed)
    trained = [cost for cost in timed if cost.step_seconds is not None]
    if not trained:
        return Cost(name=entry.name, parameters={}, step_seconds=None, seconds=0.0)
    total = seconds / len(trained)  # the chosen candidate is retrained with all steps
    for turn, share in enumerate(_remaining_shares(record)):
        total += share * min(1.0, record.budget * 2**turn) * seconds
    largest = max(trained, key=lambda cost: cost.peak_memory_mb or 0)
    step = sum(cost.step_seconds or 0 for cost in trained) / len(trained)
    return dataclasses.replace(largest, name=entry.name, step_seconds=step, seconds=total)


def _remaining_shares(auto: Any) -> list[float]:
    """The share of candidates left in each round of `auto`: half of the last one, and a control."""
    number = len(auto.candidates)
    remaining = [number]
    for _ in range(1, auto.rounds):
        remaining.append(min(number, math.ceil(remaining[-1] / 2) + 1))
    return [count / number for count in remaining]


def _adapt_cost(setup: Setup, unseen: TaskCollection, processes: int) -> Cost:
    from foretune.evaluation.adapt_search import NUM_STOPS

    block, recipe = setup.recipe.adapt, setup.recipe
    full_run, methods = recipe.adapt_run(), candidates_of(recipe)
    plain = [method for method in methods if method.fits(setup.model)]
    record = plain[-1] if block.searches else adapt_record(block)  # the last one trains the most

    if is_on_meta(setup.model):
        timed = _planned_adaptation(setup, unseen, record, full_run, processes)
    else:
        timed = _timed_adaptation(setup, unseen, record, full_run)
    step, once = timed.seconds, 0.0
    if timed.row_seconds:
        kind = recipe.objective.kind
        read = rows_read(kind, setup.seen, ("train", "validation"))
        once = timed.row_seconds * len(rows_read(kind, unseen, ("train", "test")) - read)
    bases = len(recipe.entries) * recipe.seeds
    comparisons = bases * len(block.shots) * block.draws
    adaptations: float = comparisons * len(unseen)
    rows: float = (comparisons + bases) * sum(len(task.test) for task in unseen)
    for number, held_out in _searches(setup):
        searched = number * sum(_tried(recipe, len(held_out), k) for k in block.row_counts)
        adaptations += searched
        rows += searched * NUM_STOPS * sum(map(len, held_out)) / len(held_out)
    fits = sum(not entry.record().keeps_adapters for entry in recipe.entries) * recipe.seeds
    if block.searches and any(method.name == "basis" for method in methods):
        # a basis is made of adapters to the seen tasks
        adaptations += BASIS_STEPS_FACTOR * fits * len(setup.seen)
    per_task = step / len(unseen)
    return Cost(
        name=", ".join(dict.fromkeys(method.name for method in methods)),
        parameters=timed.parameters,
        step_seconds=step,
        seconds=once
        + per_task * (full_run.steps * adaptations + FORWARD_SHARE * rows / full_run.batch_size),
        peak_memory_mb=timed.peak_memory_mb,
        layers=timed.layers,
    )


def _timed_adaptation(setup: Setup, unseen: TaskCollection, record: Any, full_run: Run) -> _Step:
    def train(tasks: TaskCollection, num_tasks: int, updates: int, watch: Stopwatch) -> Any:
        part = dataclasses.replace(tasks, tasks=evenly(tasks, num_tasks))
        run = full_run.replace(steps=updates, eval_every=0)
        return foretune.adapt(setup.model, part, record, run, progress=watch)

    timing = time_steps(train, unseen, len(unseen), full_run.batch_size)
    parameters = int(timing.outcome.cost.get("trainable_parameters") or 0)
    peak = timing.outcome.cost.get("peak_memory_mb")
    if peak is not None:  # the adapters that were left out, with gradients and optimiser state
        peak += (len(unseen) - timing.num_tasks) * parameters * STATE_BYTES / 2**20
    return _Step(
        seconds=timing.seconds,
        row_seconds=timing.row_seconds,
        parameters={"adapter": parameters},
        peak_memory_mb=peak,
    )


def _planned_adaptation(
    setup: Setup, unseen: TaskCollection, record: Any, full_run: Run, processes: int
) -> _Step:
    from foretune.training.model_copies import copy_to_adapt
    from foretune.training.verbs import objective_of

    bound = objective_of(unseen).bind(setup.model)
    model, objective = copy_to_adapt(setup.model, bound, full_run.seed)
    learner = record.learner(model, objective, unseen.names[:1], full_run)
    tasks, factor = unseen.with_objective(objective), 1
    if not record.shares_base:  # one task after the other, each with a copy of the base
        tasks, factor = tasks.subset(unseen.names[:1]), len(unseen)
    planned = _planned_step(learner, tasks, record, full_run, processes, factor)
    return dataclasses.replace(planned, parameters={"adapter": learner.parameters_per_task})


def _searches(setup: Setup) -> Iterator[tuple[float, list[Sequence[Any]]]]:
    """(number of searches of how to adapt, the rows of each held-out task that they score)."""
    recipe = setup.recipe
    if setup.held_out is not None and recipe.adapt.searches:
        tasks = [task.validation for task in setup.held_out]
        yield len(recipe.entries) * recipe.seeds, tasks
    for auto in (entry.record() for entry in recipe.entries if entry.method == "auto"):
        part = math.ceil(len(setup.seen) / min(auto.folds, len(setup.seen)))
        tasks = [task.validation for task in list(setup.seen)[:part]]
        yield recipe.seeds * sum(_remaining_shares(auto)) * len(auto.candidates), tasks


def _tried(recipe: Recipe, num_tasks: int, shots: int | None) -> float:
    """How often one search adapts to a task at one number of shots, in full steps."""
    from foretune.evaluation.adapt_search import expected_adaptations
    from foretune.evaluation.held_out import num_draws

    if not recipe.adapt.searches:
        return (1 if shots is None else num_draws(num_tasks)) * num_tasks
    return expected_adaptations(len(candidates_of(recipe)), num_tasks, shots)


def _validations(eval_every: int | None, steps: int) -> int:
    if eval_every == 0:
        return 0
    return math.ceil(steps / (eval_every or math.ceil(steps / 10)))


def _parameters(model: Any, bank: Any) -> dict[str, int]:
    roles = {"base": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if bank is not None:
        roles["adapter"] = sum(p[0].numel() for p in bank.layers.parameters())
        roles["head"] = sum(p[0].numel() for p in bank.heads.parameters())
    return {role: number for role, number in roles.items() if number}
