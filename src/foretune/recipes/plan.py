"""`plan_recipe`: what a recipe would do and cost. Trains nothing but two steps to time them."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import foretune
from foretune.recipes.console import SILENT, Console
from foretune.recipes.schema import MethodEntry, Recipe, takes_rate
from foretune.recipes.setup import Setup, set_up
from foretune.tasks.leakage import Leak, find_leaks
from foretune.tasks.summary import describe
from foretune.tasks.task import Task, TaskCollection

TIMED_STEPS = 2
FORWARD_SHARE = 1 / 3  # a forward pass costs about a third of forward and backward


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method costs.

    Args:
        name: As in the recipe.
        parameters: Trainable parameters by role: base, adapter (of a task), head (of a task).
        step_seconds: Mean of two real steps; None for a method that trains nothing.
        seconds: Estimate for the whole recipe: search, repeats, validations.
        peak_memory_mb: Of those steps; None where the system does not tell.
    """

    name: str
    parameters: dict[str, int]
    step_seconds: float | None
    seconds: float
    peak_memory_mb: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe would do and cost.

    Args:
        name: The recipe's.
        seen: Task → number of rows of each split.
        unseen: The same for unseen tasks; None when the recipe sets none aside.
        leaks: Examples that stand where they must not.
        retrain: Cost of each method.
        adapt: Cost of adapting all bases; None without unseen tasks.
    """

    name: str
    seen: dict[str, dict[str, int]]
    unseen: dict[str, dict[str, int]] | None
    leaks: list[Leak]
    retrain: list[Cost]
    adapt: Cost | None

    @property
    def seconds(self) -> float:
        """Estimate for the whole run."""
        return sum(cost.seconds for cost in [*self.retrain, *([self.adapt] if self.adapt else [])])

    @property
    def peak_memory_mb(self) -> float | None:
        """The largest peak that was met."""
        costs = [*self.retrain, *([self.adapt] if self.adapt else [])]
        return max((cost.peak_memory_mb for cost in costs if cost.peak_memory_mb), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with the sums."""
        fields = dataclasses.asdict(self)
        return {**fields, "seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}


def plan_recipe(recipe: Recipe, console: Console = SILENT) -> Plan:
    """Looks at the data, and times two real steps of each method.

    Args:
        recipe: What would be run.
        console: Is told how it goes.

    Raises:
        UserError: The data or the model is not what the recipe needs.
    """
    setup = set_up(recipe, console)
    costs = []
    for entry in recipe.entries:
        console.say(f"{entry.name}: timing {TIMED_STEPS} steps")
        cost = _choosing_cost if entry.method == "auto" else _retrain_cost
        costs.append(cost(setup, entry))
    adapt = None
    if setup.unseen is not None:
        console.say(f"{recipe.adapt.method}: timing {TIMED_STEPS} steps")
        adapt = _adapt_cost(setup, setup.unseen)
    return Plan(
        name=recipe.name,
        seen=describe(setup.seen),
        unseen=None if setup.unseen is None else describe(setup.unseen),
        leaks=find_leaks(setup.seen, setup.unseen),
        retrain=costs,
        adapt=adapt,
    )


def _retrain_cost(setup: Setup, entry: MethodEntry) -> Cost:
    block = setup.recipe.retrain
    if not takes_rate(entry.method):  # it trains nothing
        return Cost(name=entry.name, parameters={}, step_seconds=None, seconds=0.0)
    run = setup.recipe.retrain_run().replace(eval_every=0)
    tasks = _trimmed(setup.seen, run.batch_size)

    record, watch = entry.record(), Stopwatch()
    # A method whose episodes are of all tasks together moves the base once in several batches.
    episode = record.batches_per_update
    run = run.replace(steps=episode * (1 + TIMED_STEPS))
    timed = foretune.retrain(
        setup.model, tasks, record, run, tokenizer=setup.tokenizer, progress=watch
    )
    step = watch.seconds_an_update() * watch.updates / run.steps
    together = min(run.tasks_per_step or len(setup.seen), len(setup.seen))
    trials = _trials(setup.recipe, entry)
    steps = setup.recipe.seeds * block.steps + trials * (block.search_steps or block.steps)
    validations = (setup.recipe.seeds + trials) * _validations(block.eval_every, block.steps)
    rows = sum(min(len(task.validation), block.eval_rows or math.inf) for task in setup.seen)
    per_row = step / (together * run.batch_size) * FORWARD_SHARE
    return Cost(
        name=entry.name,
        parameters=_parameters(timed.model, timed.bank),
        step_seconds=step,
        seconds=steps * step + validations * rows * per_row,
        peak_memory_mb=timed.cost.get("peak_memory_mb"),
    )


def _trials(recipe: Recipe, entry: MethodEntry) -> int:
    """Trials of a retraining rate in the whole run."""
    if len(entry.rates) < 2 or not takes_rate(entry.method):
        return 0
    return len(entry.rates) * (recipe.seeds if recipe.tasks.rotate else 1)


def _choosing_cost(setup: Setup, entry: MethodEntry) -> Cost:
    """What `auto` trains with, if every candidate has the same chance to stay.

    Candidates that differ in their rate alone cost the same, and one of them is timed.
    """
    from foretune.methods.auto import by_training

    record = entry.record()
    known: dict[str, Cost] = {}
    timed = []
    for candidate, *_ in by_training(record.candidates):
        fields = {k: v for k, v in candidate.items() if k not in ("name", "as", "learning_rate")}
        kind = f"{candidate['name']} {fields}"
        if kind not in known:
            one = MethodEntry(name=kind, method=candidate["name"], fields=fields, rates=[])
            known[kind] = _retrain_cost(setup, one)
        timed.append(known[kind])
    seconds = sum(cost.seconds for cost in timed)
    trained = [cost for cost in timed if cost.step_seconds is not None]
    if not trained:
        return Cost(name=entry.name, parameters={}, step_seconds=None, seconds=0.0)
    whole = seconds / len(trained)  # the one that is chosen, with all steps
    for turn, share in enumerate(_left(record)):
        whole += share * min(1.0, record.budget * 2**turn) * seconds
    largest = max(trained, key=lambda cost: cost.peak_memory_mb or 0)
    step = sum(cost.step_seconds or 0 for cost in trained) / len(trained)
    return dataclasses.replace(largest, name=entry.name, step_seconds=step, seconds=whole)


def _left(auto: Any) -> list[float]:
    """The share of the candidates in each round of `auto`: halves, and the controls that stay."""
    number = len(auto.candidates)
    left = [number]
    for _ in range(1, auto.rounds):
        left.append(min(number, math.ceil(left[-1] / 2) + 1))
    return [one / number for one in left]


def _adapt_cost(setup: Setup, unseen: TaskCollection) -> Cost:
    from foretune.evaluation.held_out import num_draws

    block, recipe = setup.recipe.adapt, setup.recipe
    run = recipe.adapt_run().replace(eval_every=0)
    record = recipe.adapt_record(block.rates[0] if block.rates else None)
    tasks = _trimmed(unseen, run.batch_size)

    watch = Stopwatch()
    run = run.replace(steps=1 + TIMED_STEPS)
    timed = foretune.adapt(setup.model, tasks, record, run, progress=watch)
    step = watch.seconds_an_update()
    repeats = len(recipe.entries) * recipe.seeds
    adaptations = repeats * len(block.shots) * block.draws
    # A trial adapts with several draws to a few tasks, and at every rate.
    bases = sum(_trials(recipe, entry) for entry in recipe.entries)
    bases += repeats if len(block.rates) > 1 else 0
    searched = bases * len(setup.search) * num_draws(len(setup.search))
    for auto in (entry.record() for entry in recipe.entries if entry.method == "auto"):
        held = math.ceil(len(setup.seen) / min(auto.folds, len(setup.seen)))
        tried = sum(_left(auto)) * len(auto.candidates)
        searched += recipe.seeds * tried * held * num_draws(held)
    searches = searched / len(unseen) * len(block.shots) * max(1, len(block.rates))
    rows: float = (adaptations + repeats) * sum(len(task.test) for task in unseen)
    known = sum(len(task.validation) for task in setup.search) / len(setup.search)
    rows += searches * len(unseen) * known  # a trial scores the rows of its task
    per_row = step / (len(unseen) * run.batch_size) * FORWARD_SHARE
    return Cost(
        name=block.method,
        parameters={"adapter": int(timed.cost.get("trainable_parameters") or 0)},
        step_seconds=step,
        seconds=block.steps * step * (adaptations + searches) + rows * per_row,
        peak_memory_mb=timed.cost.get("peak_memory_mb"),
    )


class Stopwatch:
    """Times the updates of a training; the first, which also warms things up, is left out."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.updates = 0

    def __call__(self, update: int, updates: int, figures: dict[str, Any]) -> None:
        self.ticks.append(time.perf_counter())
        self.updates = updates

    def seconds_an_update(self) -> float:
        return (self.ticks[-1] - self.ticks[0]) / max(1, len(self.ticks) - 1)


def _validations(eval_every: int | None, steps: int) -> int:
    if eval_every == 0:
        return 0
    return math.ceil(steps / (eval_every or math.ceil(steps / 10)))


def _trimmed(tasks: TaskCollection, batch_size: int) -> TaskCollection:
    """As many training rows as the timed steps read, so that nothing else is timed.

    A training row stands in for the test: the label of a real one may be in none of those kept.
    """
    rows = batch_size * (1 + TIMED_STEPS)
    small = tuple(Task(t.name, train=t.train[:rows], test=t.train[:1]) for t in tasks)
    return dataclasses.replace(tasks, tasks=small)


def _parameters(model: Any, bank: Any) -> dict[str, int]:
    roles = {"base": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if bank is not None:
        roles["adapter"] = sum(p[0].numel() for p in bank.layers.parameters())
        roles["head"] = sum(p[0].numel() for p in bank.heads.parameters())
    return {role: number for role, number in roles.items() if number}
