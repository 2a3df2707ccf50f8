"""How a base is adapted best, by its held-out tasks: the method, its fields, the stopping step.

No number of steps is right for every base and number of examples: adapting may help for some steps
and then harm, or harm from the first. Every candidate is therefore scored along the path of one
adaptation, and *not adapting* is always among the choices.

    for each number of shots
        part of the tasks   every candidate adapts to it and is scored at several steps; the better
                            half, by the best mean along the path, goes on to a larger part
        all tasks           a quarter adapts to further draws of the examples; of these candidates,
                            each at its best step, the simplest that is not worse than the best by
                            more than one standard error of their difference

A search over dozens of settings on a few tasks flatters the winner; the standard error is that of
the paired difference over tasks, so what is not told apart is decided by simplicity (Breiman et
al., "Classification and Regression Trees", 1984, section 3.4.3: the one-standard-error rule).
Where the score is an accuracy, the loss selects: a few examples say more by their likelihoods than
by how many of them are right.
Successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np
from torch import nn

from foretune.entry_points import entry_point
from foretune.errors import DivergedError, UserError
from foretune.evaluation import held_out
from foretune.run import MAX_SEED, Run
from foretune.tasks.task import TaskCollection
from foretune.training import verbs
from foretune.training.adapt_plan import AdaptPlan, PlannedSetting, Setting
from foretune.training.adapted_scores import simplest, standard_error
from foretune.training.loop import Progress
from foretune.training.methods import AdaptMethod, RetrainMethod
from foretune.training.outcome import Adapted
from foretune.training.process_group import process_group
from foretune.training.record import counted, metered
from foretune.training.shots import draw_shots

# What is tried of a method where nothing is set: field → values.
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "basis": {"free": (0, 1), "strength": (10.0, 3.0, 1.0, 0.3)},
    "head": {"learning_rate": (3e-3, 1e-2, 3e-2)},
    "lora": {"learning_rate": (1e-3, 3e-3, 1e-2)},
}
SIMPLEST = ("basis", "head", "lora")  # then all others, in the order in which they are listed
NUM_STOPS = 5  # stopping steps of a path, each twice the one before; the last is `run.steps`
MIN_PART = 16  # held-out tasks on which candidates are dropped
DRAWS = 3  # of each task's examples, for the last quarter of the candidates

ByTask = dict[str, list[float]]  # one score per draw


@dataclass(frozen=True, kw_only=True)
class Search:
    """The result of `search`.

    Args:
        score: Mean score of the held-out tasks at the chosen settings, averaged over the numbers of
            shots.
        by_task: The scores behind it: task → one per draw and number of shots.
        plan: The chosen settings; None for a fixed way to adapt.
        trials: One dict per candidate and number of shots: shots, name, config, num_tasks, draws,
            score, path ({step: mean score}) and, where the loss selects, losses ({step: mean
            loss}); or, if it diverged, the reason.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens and examples of the search.
    """

    score: float
    by_task: dict[str, list[float]]
    plan: AdaptPlan | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


Entry = str | Mapping[str, Mapping[str, Any] | None] | AdaptMethod


def candidates(
    methods: Sequence[Entry],
    learning_rates: Sequence[float] = (),
    lora: Mapping[str, Any] | None = None,
) -> list[AdaptMethod]:
    """The records to choose among, the simplest first: basis, head, LoRA, all others.

    Args:
        methods: Names of adapt methods, one-key mappings of a name to its fields, or records. A
            field `search` maps fields to the values to try, as `learning_rate` or `lora.r`; without
            it those of `GRIDS` that are not set are tried. A record is tried as it is.
        learning_rates: Learning rates of all methods without one of their own.
        lora: Fields of `peft.LoraConfig` for all that train one.

    Raises:
        UserError: An unknown method or field, or a value out of range.
    """
    records: list[AdaptMethod] = []
    for entry in methods:
        if isinstance(entry, (str, Mapping)):
            named = {entry: None} if isinstance(entry, str) else entry
            for name, fields in named.items():
                records += _grid(name, dict(fields or {}), learning_rates, lora)
        else:
            records.append(entry)
    names = list(dict.fromkeys([*SIMPLEST, *(record.name for record in records)]))
    return sorted(records, key=lambda record: (names.index(record.name), *_strength(record)))


def _grid(
    name: str,
    fields: dict[str, Any],
    learning_rates: Sequence[float],
    lora: Mapping[str, Any] | None,
) -> list[Any]:
    """The records of one entry: all combinations of the values that are tried.

    Raises:
        UserError: `search` does not map fields to lists of values.
    """
    make: Any = entry_point("foretune.methods:make")
    default = entry_point("foretune.methods:method_class_of")(name, "adapt")()
    grid = dict(GRIDS.get(name, {}))
    if learning_rates and name != "basis":
        grid["learning_rate"] = tuple(learning_rates)
    searched = fields.pop("search", None) or {}
    if not isinstance(searched, Mapping) or not all(
        isinstance(values, (list, tuple)) and values for values in searched.values()
    ):
        raise UserError(f"search of {name} maps fields to lists of values, got {searched!r}")
    grid = {key: values for key, values in grid.items() if key not in fields} | dict(searched)
    if lora is not None and hasattr(default, "lora"):
        fields = {"lora": dict(lora), **fields}
    records = []
    for values in itertools.product(*grid.values()):
        changed = dict(fields)
        for key, value in zip(grid, values, strict=True):
            outer, _, inner = key.partition(".")
            if inner:  # a field of a field, such as lora.r
                mapping = changed.get(outer, getattr(default, outer, None))
                changed[outer] = {**(mapping or {}), inner: value}
            else:
                changed[key] = value
        records.append(make(name, **changed))
    return records


def at_rates(
    adapt: AdaptMethod | Sequence[AdaptMethod], learning_rates: Sequence[float]
) -> AdaptMethod | Sequence[AdaptMethod]:
    """What `search` takes for a method and learning rates: one rate is fixed, several are tried."""
    if isinstance(adapt, Sequence) or not learning_rates:
        return adapt
    record: Any = adapt
    rates = sorted(learning_rates)
    records = [dataclasses.replace(record, learning_rate=rate) for rate in rates]
    return records if len(records) > 1 else records[0]


def _strength(record: Any) -> tuple[float, ...]:
    """Sorts the records of one method: what leaves the start less freedom comes later."""
    lora = getattr(record, "lora", None) or {}
    return (
        getattr(record, "free", 0) or 0,
        lora.get("r", 0) or 0,
        -(getattr(record, "strength", 0) or 0),
        -(getattr(record, "pull", 0) or 0),
        record.learning_rate or 0,
    )


def validation_method(methods: Sequence[AdaptMethod], retrain: RetrainMethod) -> AdaptMethod:
    """The candidate by which a base is validated while it is retrained: one that costs little.

    It is the middle one of the plain method's: of the heads for a base whose tasks differ in their
    heads alone, else of the LoRA adapters; of the other, or of all, where there are none.

    Args:
        methods: The candidates, the simplest first.
        retrain: The retraining method.
    """
    names = ("head", "lora") if retrain.only_heads else ("lora", "head")
    for name in names:
        plain = [method for method in methods if method.name == name]
        if plain:
            return plain[(len(plain) - 1) // 2]
    return methods[(len(methods) - 1) // 2]


def stopping_steps(steps: int) -> list[int]:
    """Steps at which a path is scored: `steps`, its half, its quarter and so on.

    >>> stopping_steps(80), stopping_steps(3)
    ([5, 10, 20, 40, 80], [1, 2, 3])
    """
    return sorted({math.ceil(steps / 2**i) for i in range(NUM_STOPS)} - {0})


def halving(num_candidates: int, num_tasks: int) -> list[tuple[int, int]]:
    """(remaining candidates, further tasks that they are tried on), round by round.

    >>> halving(12, 64), halving(12, 20)
    ([(12, 16), (6, 16), (3, 32)], [(12, 20)])
    """
    ends = [num_tasks]
    while ends[0] // 2 >= MIN_PART and 2 ** len(ends) < num_candidates:
        ends.insert(0, ends[0] // 2)
    starts = [0, *ends[:-1]]
    counts = [math.ceil(num_candidates / 2**i) for i in range(len(ends))]
    return [(n, end - start) for n, start, end in zip(counts, starts, ends, strict=True)]


def num_adaptations(num_candidates: int, num_tasks: int) -> int:
    """How many adaptations a search makes at one finite number of shots.

    >>> num_adaptations(12, 64), num_adaptations(1, 2)
    (768, 6)
    """
    draws = held_out.num_draws(num_tasks)
    tried = sum(count * size for count, size in halving(num_candidates, num_tasks))
    return draws * tried + max(0, DRAWS - draws) * _quarter(num_candidates) * num_tasks


def _quarter(num_candidates: int) -> int:
    return math.ceil(num_candidates / 4)


def search(
    model: nn.Module,
    tasks: TaskCollection,
    methods: AdaptMethod | Sequence[AdaptMethod],
    run: Run,
    shots: Sequence[int | None],
    *,
    draws: int | None = None,
    progress: Progress | None = None,
) -> Search:
    """Chooses how to adapt a base for each number of shots.

    Args:
        model: The base; it is not changed.
        tasks: Held-out tasks, on which the base was not retrained. Their training examples are
            adapted on and their validation examples scored; nothing else is read.
        methods: Candidates, the simplest first; those that the base does not fit are left out. A
            single record instead of a sequence is a fixed way to adapt, which is only scored.
        run: Random seed, batches and largest number of steps. `patience` is ignored: early stopping
            would use the same examples that are scored.
        shots: Numbers of training examples; None for all.
        draws: Draws of the shots per task; None for as many as the noise of a draw demands: more
            for few tasks, and `DRAWS` for the candidates that are left at the end.
        progress: Called during each adaptation.

    Raises:
        UserError: There are no candidates that the base fits.
        DivergedError: A score of the base itself, or of the fixed way to adapt, is not finite.
    """
    tasks = tasks.with_objective(verbs.objective_of(tasks).fit(tasks))
    run = run.replace(patience=None, out=None, resume=False, overwrite=False)
    few = held_out.num_draws(len(tasks)) if draws is None else draws
    trying = _Trying(model, tasks, run, few, max(few, DRAWS) if draws is None else few, progress)
    plan = None
    with metered() as cost, counted() as spent:
        if isinstance(methods, Sequence):
            fitting = [method for method in methods if method.fits(model)]
            if not fitting:
                names = ", ".join(dict.fromkeys(method.name for method in methods)) or "none"
                raise UserError(f"the base cannot be adapted by any of the candidates: {names}")
            chosen = [trying.choose(fitting, k) for k in shots]
            scores = [by_task for _, by_task in chosen]
            plan = AdaptPlan(settings=tuple(planned for planned, _ in chosen), run=run)
        else:
            scores = [trying.fixed(methods, k) for k in shots]
    by_task = {name: [score for part in scores for score in part[name]] for name in tasks.names}
    return Search(
        score=fmean(_mean(part) for part in scores),
        by_task=by_task,
        plan=plan,
        trials=trying.trials,
        cost=process_group().total_cost({**cost, **spent}),
    )


@dataclass(eq=False)
class _Path:
    """A candidate, its steps, its scores and, where they select, losses: step → task → by draw."""

    method: AdaptMethod
    steps: Sequence[int]
    scores: dict[int, ByTask] = field(default_factory=dict)
    losses: dict[int, ByTask] = field(default_factory=dict)
    reason: str | None = None  # why it diverged

    def values(self, step: int) -> dict[str, float]:
        """What selects a step: each task's mean score or, where there are losses, minus loss."""
        if self.losses:
            return {task: -fmean(losses) for task, losses in self.losses[step].items()}
        return {task: fmean(scores) for task, scores in self.scores[step].items()}

    def best_step(self) -> int:
        """The step with the best mean value, the first of equal ones."""
        return max(sorted(self.scores), key=lambda step: fmean(self.values(step).values()))

    def best(self) -> float:
        """The best mean value along the path; −∞ before the first score."""
        return fmean(self.values(self.best_step()).values()) if self.scores else -math.inf


@dataclass
class _Trying:
    """Tries ways to adapt one base to its held-out tasks: first in `draws`, at last in `most`."""

    model: nn.Module
    tasks: TaskCollection
    run: Run
    draws: int
    most: int
    progress: Progress | None
    trials: list[dict[str, Any]] = field(default_factory=list)

    def choose(
        self, methods: Sequence[AdaptMethod], shots: int | None
    ) -> tuple[PlannedSetting, ByTask]:
        """The setting for a number of shots, and its scores.

        Raises:
            DivergedError: A score or loss of the base itself is not finite.
        """
        make: Any = entry_point("foretune.methods:make")
        plain = next((method for method in methods if method.starts_at_base), None)
        idle, stops = _Path(plain or make("head"), [0]), stopping_steps(self.run.steps)
        paths = [_Path(m, stops if m.starts_at_base else [0, *stops]) for m in methods]
        names = np.random.default_rng(self.run.seed).permutation(self.tasks.names).tolist()
        remaining, done = paths, 0
        for count, size in halving(len(methods), len(names)):
            part = self.tasks.subset(names[done : done + size])
            remaining = sorted(remaining, key=_Path.best, reverse=True)[:count]
            for path in (idle, *remaining):
                self._extend(path, part, shots)
            if idle.reason is not None:  # the base itself, so no candidate has a finite score
                raise DivergedError(idle.reason)
            remaining, done = [path for path in remaining if path.reason is None], done + size
        if shots is not None and self.most > self.draws:
            remaining = sorted(remaining, key=_Path.best, reverse=True)[: _quarter(len(methods))]
            for path in (idle, *remaining):
                self._extend(path, self.tasks, shots, again=True)
            remaining = [path for path in remaining if path.reason is None]
        self.trials += [_trial(path, shots) for path in paths]
        finalists = [idle, *(path for path in paths if path in remaining)]
        values = [finalist.values(finalist.best_step()) for finalist in finalists]
        path = finalists[simplest(np.array([[of_task[n] for n in names] for of_task in values]))]
        step = path.best_step()
        chosen, before = path.scores[step], idle.scores[0]
        changes = np.array([fmean(chosen[name]) - fmean(before[name]) for name in names])
        drawn = draw_shots(self.tasks, verbs.objective_of(self.tasks).kind, shots, 1, self.run.seed)
        planned = PlannedSetting(
            shots=shots,
            rows=int(median(len(slot.train) for slot in drawn)),
            setting=Setting(method=path.method, steps=step),
            score=_mean(chosen),
            score_before=_mean(before),
            standard_error=float(standard_error(changes)),
            num_tasks=len(names),
        )
        return planned, chosen

    def _extend(
        self, path: _Path, part: TaskCollection, shots: int | None, *, again: bool = False
    ) -> None:
        """Adds the scores of further tasks, or of further draws of all tasks, to a path."""
        run = Setting(method=path.method, steps=max(path.steps)).run(self.run)
        draws = 1 if shots is None else self.draws
        if again:
            run, draws = run.replace(seed=(run.seed + 1) % MAX_SEED), self.most - self.draws
        try:
            adapted = self.adapt(path.method, part, run, shots, draws, path.steps)
        except DivergedError as error:
            path.reason = str(error)
            return
        _add(path.scores, adapted.path)
        _add(path.losses, adapted.path_losses)

    def adapt(
        self,
        method: AdaptMethod,
        tasks: TaskCollection,
        run: Run,
        shots: int | None,
        draws: int,
        score_at: Sequence[int],
    ) -> Adapted:
        """Adapts to the tasks, and scores them on their validation examples."""
        return verbs.adapt(
            self.model,
            tasks,
            method,
            run,
            shots=shots,
            draws=draws,
            split="validation",
            score_at=score_at,
            progress=self.progress,
        )

    def fixed(self, method: AdaptMethod, shots: int | None) -> ByTask:
        """The scores of a fixed way to adapt."""
        steps, draws = self.run.steps, 1 if shots is None else self.draws
        scores: dict[int, ByTask] = {}
        _add(scores, self.adapt(method, self.tasks, self.run, shots, draws, [steps]).path)
        return scores[steps]


def _add(by_step: dict[int, ByTask], path: Mapping[int, Mapping[tuple[str, int], float]]) -> None:
    """Adds the values of an adaptation's path: step → (task, draw) → value."""
    for step, by_draw in path.items():
        for (task, _), value in by_draw.items():
            by_step.setdefault(step, {}).setdefault(task, []).append(value)


def _trial(path: _Path, shots: int | None) -> dict[str, Any]:
    """A candidate's record."""
    config = path.method.to_dict()
    trial: dict[str, Any] = {"shots": shots, "name": path.method.name, "config": config}
    if path.reason is not None:
        return {**trial, "score": None, "reason": path.reason}
    by_task = path.scores[path.best_step()]
    trial |= {"score": _mean(by_task), "num_tasks": len(by_task)}
    trial |= {"draws": max(map(len, by_task.values())), "path": _means(path.scores)}
    if path.losses:
        trial["losses"] = _means(path.losses)
    return trial


def _means(by_step: Mapping[int, ByTask]) -> dict[str, float]:
    return {str(step): _mean(by_task) for step, by_task in sorted(by_step.items())}


def _mean(by_task: ByTask) -> float:
    """The mean over tasks of their means over draws."""
    return fmean(fmean(scores) for scores in by_task.values())
