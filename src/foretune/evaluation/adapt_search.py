"""How a base is adapted best, by its held-out tasks: the method, its fields, the stopping step.

No number of steps is right for every base and number of examples: adapting may help for some steps
and then harm, or harm from the first. Every candidate is therefore scored along the path of one
adaptation, and *not adapting* is always among the choices.

    for each number of shots
        part of the tasks   every candidate adapts to it and is scored at several steps; the better
                            half, by the best mean along the path, goes on to a larger part, each
                            no further than to the step after its best one
        all tasks           a quarter adapts to further draws of the examples; of these candidates,
                            each at its best step, the simplest that is not worse than the best by
                            more than one standard error of their difference

A search over dozens of settings on a few tasks flatters the winner; the standard error is that of
the paired difference over tasks, so what is not told apart is decided by simplicity (Breiman et
al., "Classification and Regression Trees", 1984, section 3.4.3: the one-standard-error rule).
Where the score is an accuracy, the loss selects: a few examples say more by their likelihoods than
by how many of them are right.
Candidates that differ in a rate or a strength alone adapt side by side: their steps are shared, and
what frozen layers make of a text is computed once for all of them.
Successive halving: Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943.
"""

from __future__ import annotations

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
from foretune.training.methods import AdaptMethod
from foretune.training.process_group import process_group
from foretune.training.record import counted, metered
from foretune.training.shots import draw_shots

NUM_STOPS = 5  # stopping steps of a path, each twice the one before; the last is `run.steps`
MIN_PART = 16  # held-out tasks on which candidates are dropped
LATER_SHARE = 0.5  # of a path's steps are left after the first part, on average (benchmarks/LOG.md)
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
            loss}); or, if it diverged, the reason. Steps that are late for a candidate were scored
            on fewer tasks.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens and examples of the search.
    """

    score: float
    by_task: dict[str, list[float]]
    plan: AdaptPlan | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


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


def num_adaptations(num_candidates: int, num_tasks: int, shots: int | None = 1) -> int:
    """How many adaptations a search makes, at most, at one number of shots; None: of all rows.

    >>> num_adaptations(12, 64), num_adaptations(12, 64, None), num_adaptations(1, 2)
    (768, 384, 6)
    """
    draws = 1 if shots is None else held_out.num_draws(num_tasks)
    tried = sum(count * size for count, size in halving(num_candidates, num_tasks))
    again = 0 if shots is None else max(0, DRAWS - draws)
    return draws * tried + again * _quarter(num_candidates) * num_tasks


def expected_adaptations(num_candidates: int, num_tasks: int, shots: int | None = 1) -> float:
    """The full paths that a search's adaptations amount to, most of which end before `run.steps`.

    >>> expected_adaptations(12, 64), expected_adaptations(12, 64, None)
    (480.0, 288.0)
    """
    first = num_candidates * halving(num_candidates, num_tasks)[0][1]
    first *= 1 if shots is None else held_out.num_draws(num_tasks)
    return first + LATER_SHARE * (num_adaptations(num_candidates, num_tasks, shots) - first)


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
    steps: list[int]
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
        return max(self.steps, key=lambda step: fmean(self.values(step).values()))

    def shorten(self) -> None:
        """Leaves out the steps that are later than the one after the best step."""
        if self.scores:
            end = sorted(self.steps).index(self.best_step()) + 2
            self.steps = sorted(self.steps)[:end]

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
            for path in remaining:
                path.shorten()
            self._extend([idle, *remaining], part, shots)
            if idle.reason is not None:  # the base itself, so no candidate has a finite score
                raise DivergedError(idle.reason)
            remaining, done = [path for path in remaining if path.reason is None], done + size
        if shots is not None and self.most > self.draws:
            remaining = sorted(remaining, key=_Path.best, reverse=True)[: _quarter(len(methods))]
            for path in remaining:
                path.shorten()
            self._extend([idle, *remaining], self.tasks, shots, again=True)
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
        self,
        paths: Sequence[_Path],
        part: TaskCollection,
        shots: int | None,
        *,
        again: bool = False,
    ) -> None:
        """Adds the scores of further tasks, or of further draws of all tasks, to paths."""
        for alike in _alike(paths):
            self._extend_alike(alike, part, shots, again)

    def _extend_alike(
        self, paths: Sequence[_Path], part: TaskCollection, shots: int | None, again: bool
    ) -> None:
        steps = sorted({step for path in paths for step in path.steps})
        run = Setting(method=paths[0].method, steps=steps[-1]).run(self.run)
        draws = 1 if shots is None else self.draws
        if again:
            run, draws = run.replace(seed=(run.seed + 1) % MAX_SEED), self.most - self.draws
        # The base as it is, a path of step 0, is where any of the others starts.
        methods = [path.method for path in paths if path.steps != [0]] or [paths[0].method]
        try:
            results = verbs.adapt_variants(
                self.model,
                part,
                methods,
                run,
                shots=shots,
                draws=draws,
                split="validation",
                score_at=steps,
                progress=self.progress,
            )
        except DivergedError as error:
            if len(paths) == 1:
                paths[0].reason = str(error)
            for path in paths if len(paths) > 1 else ():
                self._extend_alike([path], part, shots, again)
            return
        for path in paths:
            adapted = results[methods.index(path.method)] if path.steps != [0] else results[0]
            _add(path.scores, {step: adapted.path[step] for step in path.steps})
            losses = adapted.path_losses
            _add(path.losses, {step: losses[step] for step in path.steps if step in losses})

    def fixed(self, method: AdaptMethod, shots: int | None) -> ByTask:
        """The scores of a fixed way to adapt."""
        steps, draws = self.run.steps, 1 if shots is None else self.draws
        scores: dict[int, ByTask] = {}
        adapted = verbs.adapt(
            self.model,
            self.tasks,
            method,
            self.run,
            shots=shots,
            draws=draws,
            split="validation",
            score_at=[steps],
            progress=self.progress,
        )
        _add(scores, adapted.path)
        return scores[steps]


def _alike(paths: Sequence[_Path]) -> list[list[_Path]]:
    """The paths in groups whose methods can adapt side by side."""
    groups: dict[str, list[_Path]] = {}
    for path in paths:
        method = path.method
        fields = {k: v for k, v in method.to_dict().items() if k not in method.slot_fields}
        groups.setdefault(f"{type(method)} {fields}", []).append(path)
    return list(groups.values())


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
