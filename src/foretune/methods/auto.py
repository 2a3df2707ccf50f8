"""Auto: try several retrainings on a part of the budget, take the one whose base adapts best.

No fixed choice is right for every collection: where tasks agree, standard retraining is hard to
beat; where they pull the base in different directions, PEFT-ML may pay off; with a strong model any
retraining may hurt. The seen tasks can tell, if some of them play the role of unseen ones.

    round r = 0, 1, …    hold out a part of the seen tasks; retrain every remaining candidate on the
                         others, with budget · 2^r of the steps; adapt each base to the held-out
                         tasks, as the unseen tasks will be; keep the better half, and the
                         controls: none and plain standard
    in the end           retrain the best candidate on all seen tasks with all steps

Where tasks share inputs, their conflict is measured first, as by `foretune plan`: PEFT-ML and
factorised heads are not tried where they can hardly gain, and come first where they should.

Paper: successive halving is due to Jamieson and Talwalkar, "Non-stochastic Best Arm Identification
and Hyperparameter Optimization", AISTATS 2016, arXiv:1502.07943.

Deviations:
    - Each round holds out different tasks, so a candidate is not chosen for one lucky part.
    - A candidate's score is the mean over its rounds, weighted by their steps.
    - The controls stay to the last round.
    - Where few tasks are held out, each is adapted to in several draws of its examples: with two
      tasks the noise of one draw exceeds the differences between candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import TypedDict, override

from foretune.errors import DivergedError, UserError
from foretune.evaluation.trial_report import Trial, label, mean_score, report_of
from foretune.evaluation.verdict import CONTROLS
from foretune.formats import CHOICE, read_json, stamped
from foretune.methods import fields_of, make
from foretune.run import Run, check_fraction, check_int, check_list, check_positive, run_fields
from foretune.training.methods import RetrainMethod
from foretune.training.trial_progress import within

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import TaskCollection
    from foretune.training.held_out import HeldOut

CHOICE_FILE = "choice.json"  # the trials of the search, in the folder of the run
PAPER = {
    "title": "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
    "authors": "Kevin Jamieson and Ameet Talwalkar",
    "year": 2016,
    "venue": "AISTATS",
    "arxiv": "1502.07943",
}
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"name": "none"},
    {"name": "standard"},
    {"name": "standard", "interpolate": 0.5},
    {"name": "standard", "average": 0.5},
    {"name": "peft-ml"},
    {"name": "peft-ml", "interpolate": 0.5},
    {"name": "peft-ml", "average": 0.5},
)
VARIANTS = {"interpolate", "average"}  # fields that make standard no longer a control


@dataclass(frozen=True, kw_only=True)
class Auto(RetrainMethod):
    """Choose among several retrainings on held-out seen tasks, then retrain on all of them.

    Args:
        candidates: Retrain methods to choose among: records, or mappings of a `name`, the fields
            that differ from its defaults and, as `as`, a display name.
        folds: Number of parts into which the seen tasks are split; each round holds out one.
        rounds: Number of rounds of halving; the last one leaves the best.
        budget: Share of the steps that a candidate gets in the first round; doubled in each
            following round.
        adapt: How unseen tasks will be adapted to: a record, or a mapping with its `name`. A list
            of these, and of entries of a recipe's `adapt.methods`, is a choice, made anew for each
            base on the held-out tasks.
        adapt_run: The `Run` of that adaptation, or a mapping of its fields.
        adapt_rates: Learning rates to choose among in adapting; empty for the records' own.
        shots: Numbers of examples to adapt with; None among them for all examples.
        group_column: Column of groups of rows that stay on one side of a split, as in a `Source`.
    """

    candidates: Any = CANDIDATES
    folds: int = 4
    rounds: int = 3
    budget: float = 0.25
    adapt: Any = field(default_factory=lambda: {"name": "lora"})
    adapt_run: Any = field(default_factory=dict)
    adapt_rates: Sequence[float] = ()
    shots: Sequence[int | None] = (8, 40)
    group_column: str | None = None

    name: ClassVar[str] = "auto"
    label: ClassVar[str] = "auto"
    chooses: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        candidates = [
            fields_of(candidate) for candidate in check_list("candidates", self.candidates)
        ]
        if len(candidates) < 2:
            raise UserError(f"auto chooses among at least 2 candidates, got {len(candidates)}")
        names = [label(candidate) for candidate in candidates]
        for i, name in enumerate(names):
            record = _record(candidates[i])
            if record.verb != "retrain" or record.name == self.name:
                raise UserError(f'auto chooses among retrain methods; "{name}" is not one of them')
            if name in names[:i]:
                raise UserError(f'auto has two candidates called "{name}": name one with "as"')
        check_int("folds", self.folds, 2)
        check_int("rounds", self.rounds, 1)
        check_positive("budget", self.budget)
        check_fraction("budget", self.budget)
        adapt = _adapt_fields(self.adapt)
        rates, shots = check_list("adapt_rates", self.adapt_rates), check_list("shots", self.shots)
        for rate in rates:
            check_positive("adapt_rates", rate)
        for number in shots:
            check_int("shots", number, 1, optional=True)
        if not shots:
            raise UserError("auto needs at least one number of shots, got none")
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "adapt", adapt)
        object.__setattr__(self, "adapt_run", run_fields(self.adapt_run))
        object.__setattr__(self, "adapt_rates", rates)
        object.__setattr__(self, "shots", shots)

    @override
    def choose(
        self,
        model: nn.Module,
        tasks: TaskCollection,
        run: Run,
        progress: Any = None,
        held_out: HeldOut | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """(the best candidate's record, a report of the trials).

        Args:
            model: The model before retraining.
            tasks: The seen tasks, with an objective.
            run: The run of the retraining; with `out`, each trial is written to `out/choice.json`
                when it is done, and trials in that file are not repeated.
            progress: Called during each training.
            held_out: Further tasks that every retraining is validated by.

        Raises:
            UserError: There is only one seen task, or no held-out task has examples to score on.
        """
        from foretune.evaluation.held_out import build_search_tasks
        from foretune.evaluation.promising import promising
        from foretune.training.process_group import process_group
        from foretune.training.record import counted, metered

        if tasks.objective is not None:
            tasks = tasks.with_objective(tasks.objective.fit(tasks))
        groups = _parts(tasks, self.folds, run.seed)
        file = None if run.out is None else run.out / CHOICE_FILE
        trials: list[Trial] = []
        inputs: dict[str, Any] = {}
        if file is not None:
            inputs, trials = process_group().on_first_process(
                lambda: _resumed(file, self, run, model, tasks)
            )
        remaining = promising(self.candidates, tasks, self.shots, run.seed)
        for number in range(self.rounds):
            names = groups[number % len(groups)]
            seen, group_tasks = tasks.without(names), tasks.subset(names)
            scored = build_search_tasks(group_tasks, self.shots, run.seed, self.group_column)
            steps = max(1, round(run.steps * min(1.0, self.budget * 2**number)))
            round_run = run.replace(out=None, resume=False, overwrite=False, steps=steps)
            trainings = by_training(remaining)
            for place, group in enumerate(trainings):
                finished = {(trial["candidate"], trial["round"]) for trial in trials}
                if all((label(candidate), number) in finished for candidate in group):
                    continue
                begin = (number + place / len(trainings)) / self.rounds
                end = (number + (place + 1) / len(trainings)) / self.rounds
                doing = f"round {number + 1} of {self.rounds}, {label(group[0])}"
                with metered() as cost, counted() as spent:
                    scores = self._train_and_score(
                        *(model, seen, scored, group, round_run),
                        within(progress, begin, end, doing),
                        held_out,
                    )
                for candidate, score in zip(group, scores, strict=True):
                    trials.append(
                        {"candidate": label(candidate), "round": number, "steps": steps, **score}
                    )
                trials[-1]["cost"] = process_group().total_cost(cost | spent)
                _write(file, inputs, trials)
            ranked = _ranked(remaining, trials)
            remaining = _better_half(ranked)
        return _record(ranked[0]), report_of(ranked, trials, tasks, groups[: self.rounds])

    def _train_and_score(
        self,
        model: nn.Module,
        seen: TaskCollection,
        scored: TaskCollection,
        group: Sequence[Mapping[str, Any]],
        run: Run,
        progress: Any,
        held_out: HeldOut | None,
    ) -> list[Trial]:
        """Retrains once for candidates that differ only in `interpolate`; scores each of them."""
        from foretune.training.model_copies import interpolate
        from foretune.training.verbs import retrain

        record = _record(group[0])
        if record.interpolate != 1:
            record = dataclasses.replace(record, interpolate=1.0)
        try:
            outcome = retrain(model, seen, record, run, held_out=held_out, progress=progress)
        except DivergedError as error:
            return [{"score": None, "reason": str(error)} for _ in group]
        scores = []
        for candidate in group:
            base = outcome.model
            alpha = _record(candidate).interpolate
            if alpha != 1:
                base = copy.deepcopy(base)
                interpolate(base, model, alpha)
            scores.append(self._adapt_and_score(base, scored, run.seed, progress))
        return scores

    def _adapt_and_score(
        self, base: nn.Module, scored: TaskCollection, seed: int, progress: Any
    ) -> Trial:
        """Adapts a base to held-out tasks at every number of shots, as is best; its scores."""
        from foretune.evaluation.adapt_candidates import at_rates, candidates
        from foretune.evaluation.adapt_search import search

        run = Run(**self.adapt_run).replace(seed=seed, out=None, resume=False, overwrite=False)
        if isinstance(self.adapt, list):
            entries = [_record(a) if "name" in a else a for a in self.adapt]
            methods: Any = candidates(entries, self.adapt_rates)
        else:
            methods = at_rates(_record(self.adapt), self.adapt_rates)
        try:
            result = search(base, scored, methods, run, self.shots, progress=progress)
        except DivergedError as error:
            return {"score": None, "reason": str(error)}
        trial: Trial = {"score": result.score, "by_task": result.by_task}
        if result.plan is not None:
            trial["adapt"] = result.plan.to_dict()["settings"]
        return trial


def _adapt_fields(adapt: Any) -> dict[str, Any] | list[Any]:
    """The fields of an adapt method, or a list of these and of names.

    Raises:
        UserError: One is not an adapt method.
    """
    if isinstance(adapt, (list, tuple)):
        if not adapt:
            raise UserError("auto adapts by at least one adapt method, got none")
        return [_adapt_entry(entry) for entry in adapt]
    fields = fields_of(adapt)
    if _record(fields).verb != "adapt":
        raise UserError(f'auto adapts by an adapt method; "{fields["name"]}" is not one')
    return fields


def _adapt_entry(entry: Any) -> dict[str, Any]:
    """An entry of a list of adapt methods: the fields of a method, or its name with fields to try.

    Raises:
        UserError: It is neither.
    """
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, Mapping) and "name" not in entry:
        return dict(entry)
    fields = _adapt_fields(entry)
    assert isinstance(fields, dict)  # the entry is no list
    return fields


def _record(fields: Mapping[str, Any]) -> Any:
    return make(**{key: value for key, value in fields.items() if key != "as"})


def _parts(tasks: TaskCollection, folds: int, seed: int) -> list[list[str]]:
    """The names of the tasks, cut into `folds` parts, or fewer where there are fewer tasks.

    Raises:
        UserError: There is only one task.
    """
    if len(tasks) < 2:
        raise UserError("auto holds out seen tasks to choose on, but there is only one seen task")
    return tasks.groups(math.ceil(len(tasks) / min(folds, len(tasks))), seed)


def by_training(candidates: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The candidates in groups that share one training: they differ only in `interpolate`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for candidate in candidates:
        fields = {k: v for k, v in candidate.items() if k not in ("interpolate", "as")}
        groups.setdefault(json.dumps(fields, sort_keys=True), []).append(candidate)
    return list(groups.values())


def _ranked(candidates: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The candidates that did not diverge, best first; ties keep their order.

    Raises:
        UserError: All diverged.
    """

    def key(candidate: Mapping[str, Any]) -> float:
        return -mean_score([t for t in trials if t["candidate"] == label(candidate)])

    ranked = sorted(candidates, key=key)
    if math.isinf(key(ranked[0])):
        raise UserError("every candidate of auto diverged: lower their learning rates")
    return [candidate for candidate in ranked if not math.isinf(key(candidate))]


def _better_half(ranked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The better half, and the best of each control.

    The choice must not fall below the final score of a control, so controls are measured with all
    steps; after few steps many similar candidates, or a control's variants, would push it out.
    """
    survivors = list(ranked[: math.ceil(len(ranked) / 2)])
    for control in CONTROLS:
        variants = [candidate for candidate in ranked if candidate["name"] == control]
        plain = [candidate for candidate in variants if not VARIANTS & candidate.keys()] or variants
        if plain and plain[0] not in survivors:
            survivors.append(plain[0])
    return survivors


# What is used of choice.json.
_Choice = TypedDict(  # noqa: UP013
    "_Choice", {"about": dict[str, Any], "trials": list[dict[str, Any]]}
)


def _resumed(
    file: Path, method: Auto, run: Run, model: nn.Module, tasks: TaskCollection
) -> tuple[dict[str, Any], list[Trial]]:
    """The inputs of this choice, and the trials that an interrupted choice on them left."""
    from foretune.training.model_copies import fresh_copy
    from foretune.training.resume import MOVABLE, check_same, inputs_of

    assert tasks.objective is not None  # `retrain` sets it
    fields = method.to_dict()
    fields["adapt_run"] = {k: v for k, v in fields["adapt_run"].items() if k not in MOVABLE}
    inputs = {"method": fields, "run": run.to_dict(), "tasks": tasks.names}
    inputs["objective"] = tasks.objective.to_dict()
    copy_of = fresh_copy(model, tasks.objective, run.seed)
    inputs |= inputs_of(copy_of, tasks, tasks.objective.tokenizer)
    inputs = json.loads(json.dumps(inputs))
    if not file.is_file():
        return inputs, []
    saved = read_json(file, _Choice, CHOICE)
    check_same(file.parent, saved["about"], inputs)
    return inputs, saved["trials"]


def _write(file: Path | None, inputs: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    from foretune.files import write_whole
    from foretune.processes import process_rank

    if file is not None and process_rank() == 0:
        text = json.dumps(stamped({"about": inputs, "trials": list(trials)}, CHOICE), indent=1)
        write_whole(file, text)
