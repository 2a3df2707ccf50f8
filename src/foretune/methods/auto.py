"""Auto: try several retrainings on a part of the budget, take the one whose base adapts best.

No fixed choice is right for every collection: where tasks agree standard retraining is hard to
beat, where they pull apart PEFT-ML pays, and with a strong model any retraining may hurt. The seen
tasks can tell, if some of them play the unseen ones.

    round r = 0, 1, …    hold a part of the seen tasks out; retrain every candidate that is left on
                         the other ones, with budget · 2^r of the steps; adapt each base to the
                         tasks that were held out, as the user will; keep the better half, and
                         the controls: none and plain standard
    in the end           retrain the best candidate on all seen tasks with all steps

Paper: successive halving is of Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", AISTATS 2016, arXiv:1502.07943.

Deviations:
    - Each round holds other tasks out, so a candidate is not chosen for one lucky part.
    - A candidate's score is the mean of its rounds, weighted by their budgets.
    - The controls stay to the last round.
    - Where few tasks are held out, each is adapted to in several draws of its rows: with two tasks
      the luck of one draw is larger than the differences between candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from foretune.errors import UserError, did_you_mean
from foretune.evaluation.verdict import CONTROLS
from foretune.formats import CHOICE, stamped
from foretune.methods import make
from foretune.run import Run, above_zero, listed, share, whole
from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import TaskCollection

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
VARIANTS = {"heads", "interpolate", "average"}  # with one of them standard is no control
Trial = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Auto(RetrainMethod):
    """Choose among several retrainings on held-out seen tasks, then retrain on all of them.

    Args:
        candidates: Records of retraining methods, or mappings of a `name`, the fields that differ
            from its defaults and, as `as`, what to call it.
        folds: Parts into which the seen tasks are cut; each round holds one of them out.
        rounds: Rounds of halving; in the last one the best is taken.
        budget: Share of the steps that a candidate gets in the first round; twice as much in each
            that follows.
        adapt: How unseen tasks will be adapted to: a record, or a mapping with its `name`.
        adapt_run: The `Run` of that, or a mapping of its fields.
        adapt_rates: Learning rates that will be tried there; empty for the record's own.
        shots: The numbers of rows with which it will be done; None among them for all rows.
        group_column: The column that says which rows belong together, as in a `Source`.
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
        found = [_fields(candidate) for candidate in listed("candidates", self.candidates)]
        if len(found) < 2:
            raise UserError(f"auto chooses among at least 2 candidates, got {len(found)}")
        names = [label(candidate) for candidate in found]
        for i, name in enumerate(names):
            record = _record(found[i])
            if record.verb != "retrain" or record.name == self.name:
                raise UserError(f'auto chooses among methods that retrain, "{name}" is none')
            if name in names[:i]:
                raise UserError(f'auto has two candidates called "{name}": give one another "as"')
        whole("folds", self.folds, 2)
        whole("rounds", self.rounds, 1)
        above_zero("budget", self.budget)
        share("budget", self.budget)
        adapt = _fields(self.adapt)
        if _record(adapt).verb != "adapt":
            raise UserError(f'auto adapts by a method that adapts, "{adapt["name"]}" is none')
        rates, shots = listed("adapt_rates", self.adapt_rates), listed("shots", self.shots)
        for rate in rates:
            above_zero("adapt_rates", rate)
        for number in shots:
            whole("shots", number, 1, optional=True)
        if not shots:
            raise UserError("auto needs at least one number of shots, got none")
        object.__setattr__(self, "candidates", found)
        object.__setattr__(self, "adapt", adapt)
        object.__setattr__(self, "adapt_run", _run_fields(self.adapt_run))
        object.__setattr__(self, "adapt_rates", rates)
        object.__setattr__(self, "shots", shots)

    @override
    def choose(
        self, model: nn.Module, tasks: TaskCollection, run: Run, progress: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """(the best candidate's record, what was tried).

        Args:
            model: The model before retraining.
            tasks: The seen tasks, with an objective.
            run: As for the retraining; with `out`, trials are written to `out/choice.json` one by
                one and those that are there already are not made again.
            progress: Called during each training.

        Raises:
            UserError: One seen task, or those held out have no rows to be scored on.
        """
        from foretune.evaluation.held_out import build_search_tasks
        from foretune.training.process_group import process_group
        from foretune.training.record import metered

        if tasks.objective is not None:
            tasks = tasks.with_objective(tasks.objective.fit(tasks))
        groups = _parts(tasks, self.folds, run.seed)
        file = None if run.out is None else run.out / "choice.json"
        trials: list[Trial] = []
        about: dict[str, Any] = {}
        if file is not None:
            about, trials = process_group().first(lambda: _begun(file, self, run, model, tasks))
        alive = list(self.candidates)
        for number in range(self.rounds):
            held = groups[number % len(groups)]
            seen, own = tasks.without(held), tasks.subset(held)
            rows = build_search_tasks(own, self.shots, run.seed, self.group_column)
            steps = max(1, round(run.steps * min(1.0, self.budget * 2**number)))
            part = run.replace(out=None, resume=False, overwrite=False, steps=steps)
            for together in by_training(alive):
                known = {(trial["candidate"], trial["round"]) for trial in trials}
                if all((label(one), number) in known for one in together):
                    continue
                with metered() as cost:
                    found = self._try(model, seen, rows, together, part, progress)
                for one, scores in zip(together, found, strict=True):
                    trials.append(
                        {"candidate": label(one), "round": number, "steps": steps, **scores}
                    )
                trials[-1]["cost"] = cost | trials[-1].get("cost", {})
                _write(file, about, trials)
            ranked = _ranked(alive, trials)
            alive = _better_half(ranked)
        return _record(ranked[0]), _summary(ranked, trials, tasks, groups[: self.rounds])

    def _try(
        self,
        model: nn.Module,
        seen: TaskCollection,
        rows: TaskCollection,
        together: Sequence[Mapping[str, Any]],
        run: Run,
        progress: Any,
    ) -> list[Trial]:
        """One training; the held-out scores of each candidate that differs in its end alone."""
        from foretune.training.loop import DivergedError
        from foretune.training.model_copies import interpolate
        from foretune.training.verbs import retrain

        record = _record(together[0])
        if record.interpolate != 1:
            record = dataclasses.replace(record, interpolate=1.0)
        try:
            outcome = retrain(model, seen, record, run, progress=progress)
        except DivergedError as error:
            return [{"score": None, "reason": str(error)} for _ in together]
        found = []
        for candidate in together:
            base = outcome.model
            kept = _record(candidate).interpolate
            if kept != 1:
                base = copy.deepcopy(base)
                interpolate(base, model, kept)
            found.append(self._examine(base, rows, run.seed, progress))
        found[-1]["cost"] = {"tokens": outcome.cost.get("tokens", 0)}
        return found

    def _examine(self, base: nn.Module, rows: TaskCollection, seed: int, progress: Any) -> Trial:
        """Adapts a base to the held-out tasks at every number of shots; the best rate's scores."""
        from foretune.evaluation.held_out import best, try_rates
        from foretune.training.loop import DivergedError

        run = Run(**self.adapt_run).replace(seed=seed, out=None, resume=False, overwrite=False)
        method = _record(self.adapt)
        trials = try_rates(base, rows, method, self.adapt_rates, run, self.shots, progress)
        try:
            return best(trials)
        except DivergedError as error:
            return {"score": None, "reason": str(error)}


def label(candidate: Mapping[str, Any]) -> str:
    """What a candidate is called.

    >>> label({"name": "peft-ml", "penalty": 0.1}), label({"name": "none", "as": "control"})
    ('peft-ml penalty=0.1', 'control')
    """
    fields = [f"{key}={value}" for key, value in candidate.items() if key not in ("name", "as")]
    return str(candidate.get("as") or " ".join([str(candidate["name"]), *fields]))


def _fields(given: Any) -> dict[str, Any]:
    """A record or a mapping as a mapping of its name and fields."""
    if hasattr(given, "to_dict"):
        default = type(given)().to_dict()
        fields = {k: v for k, v in given.to_dict().items() if k == "name" or v != default.get(k)}
        return fields
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UserError(f'a method is a record, or a mapping with its "name"; got {given!r}')
    return dict(given)


def _run_fields(given: Any) -> dict[str, Any]:
    """A `Run`, or a mapping of its fields, as the mapping."""
    if isinstance(given, Run):
        return given.to_dict()
    if not isinstance(given, Mapping):
        raise UserError(f"adapt_run is a Run, or a mapping of its fields; got {given!r}")
    known = [f.name for f in dataclasses.fields(Run)]
    for name in given:
        if name not in known:
            raise UserError(f'a Run has no field "{name}".{did_you_mean(name, known)}')
    Run(**given)
    return dict(given)


def _record(fields: Mapping[str, Any]) -> Any:
    return make(**{key: value for key, value in fields.items() if key != "as"})


def _parts(tasks: TaskCollection, folds: int, seed: int) -> list[list[str]]:
    if len(tasks) < 2:
        raise UserError("auto holds seen tasks out to choose on, and there is only one seen task")
    return tasks.groups(math.ceil(len(tasks) / min(folds, len(tasks))), seed)


def by_training(candidates: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Candidates that differ in `interpolate` alone come out of one training."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for candidate in candidates:
        fields = {k: v for k, v in candidate.items() if k not in ("interpolate", "as")}
        found.setdefault(json.dumps(fields, sort_keys=True), []).append(candidate)
    return list(found.values())


def _mean(trials: Sequence[Trial]) -> float:
    """Mean of a candidate's rounds, weighted by their steps; the worst if one diverged."""
    if any(trial["score"] is None for trial in trials):
        return -math.inf
    return sum(t["score"] * t["steps"] for t in trials) / sum(t["steps"] for t in trials)


def _ranked(alive: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The candidates, best first; of equals the one that was named first."""

    def key(candidate: Mapping[str, Any]) -> float:
        return -_mean([t for t in trials if t["candidate"] == label(candidate)])

    ranked = sorted(alive, key=key)
    if math.isinf(key(ranked[0])):
        raise UserError("every candidate of auto diverged: lower their learning rates")
    return [one for one in ranked if not math.isinf(key(one))]


def _better_half(ranked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The better half, and the best of each control.

    What a control reaches in the end is what a choice must not fall below, so it is measured with
    all steps; in a short race many like candidates, or its own variants, would push it out.
    """
    kept = list(ranked[: math.ceil(len(ranked) / 2)])
    for control in CONTROLS:
        of_it = [one for one in ranked if one["name"] == control]
        plain = [one for one in of_it if not VARIANTS & one.keys()] or of_it
        if plain and plain[0] not in kept:
            kept.append(plain[0])
    return kept


def _summary(
    ranked: Sequence[Mapping[str, Any]],
    trials: Sequence[Trial],
    tasks: TaskCollection,
    held: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """What was tried, what it cost, and how sure the choice is."""
    best = label(ranked[0])
    own = {name: [t for t in trials if t["candidate"] == name] for name in _names(trials)}
    scores = {n: None if any(t["score"] is None for t in o) else _mean(o) for n, o in own.items()}
    costs = [trial["cost"] for trial in trials if "cost" in trial]
    return {
        "chosen": best,
        "scores": scores,
        "rounds": {name: len(found) for name, found in own.items()},
        "above": [
            above
            for name in own
            if name != best
            for above in [_above(own[best], own[name])]
            if above
        ],
        "num_held_out": len({name for part in held for name in part}),
        "num_seen": len(tasks),
        "cost": {
            key: round(sum(cost.get(key) or 0 for cost in costs), 3)
            for key in ("seconds", "cpu_seconds", "tokens")
        },
        "trials": list(trials),
    }


def _names(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial["candidate"] for trial in trials))


def _above(best: Sequence[Trial], other: Sequence[Trial]) -> dict[str, Any] | None:
    """How far the best is above another on the tasks of the rounds that both took part in."""
    from foretune.evaluation.statistics import paired_difference

    a: dict[str, list[float]] = {}  # a task may be held out in more rounds than one
    b: dict[str, list[float]] = {}
    for one, two in zip(best, other, strict=False):
        if two["score"] is None:
            return None
        for task, scores in one["by_task"].items():
            a.setdefault(task, []).extend(scores)
            b.setdefault(task, []).extend(two["by_task"][task])
    found = paired_difference([[fmean(own)] for own in a.values()], [[fmean(b[t])] for t in a])
    kept = ("difference", "low", "high", "p_value", "num_tasks")
    return {"over": other[0]["candidate"], **{key: getattr(found, key) for key in kept}}


def _begun(
    file: Path, method: Auto, run: Run, model: nn.Module, tasks: TaskCollection
) -> tuple[dict[str, Any], list[Trial]]:
    """What this choice depends on, and the trials that an interrupted one of the same left."""
    from foretune.training.model_copies import fresh_copy
    from foretune.training.resume import MOVABLE, check_same, inputs_of, read_record

    assert tasks.objective is not None  # `retrain` sees to it
    fields = method.to_dict()
    fields["adapt_run"] = {k: v for k, v in fields["adapt_run"].items() if k not in MOVABLE}
    about = {"method": fields, "run": run.to_dict(), "tasks": tasks.names}
    about["objective"] = tasks.objective.to_dict()
    about |= inputs_of(fresh_copy(model, tasks.objective, run.seed), tasks)
    about = json.loads(json.dumps(about))
    if not file.is_file():
        return about, []
    saved = read_record(file, CHOICE)
    check_same(file.parent, saved["about"], about)
    return about, list(saved["trials"])


def _write(file: Path | None, about: Any, trials: Sequence[Trial]) -> None:
    from foretune.files import write_whole
    from foretune.processes import process_rank

    if file is not None and process_rank() == 0:
        text = json.dumps(stamped({"about": about, "trials": list(trials)}, CHOICE), indent=1)
        write_whole(file, text)
