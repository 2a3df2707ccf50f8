"""`compare`: adapt several bases to the same unseen tasks; paired differences, verdict, costs.

Fair by construction: every base gets the same examples, the same fresh adapters and the same search
of how to adapt, which uses validation examples of *seen* tasks and nothing from the unseen ones.
The unit of the statistics is the unseen task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

import foretune
from foretune.errors import UserError
from foretune.evaluation import held_out
from foretune.evaluation.adapt_candidates import at_rates
from foretune.evaluation.adapt_search import Search, search
from foretune.evaluation.statistics import pairs_and_means
from foretune.evaluation.verdict import verdict
from foretune.files import COMPARISON_FILE, check_file_names, write_whole
from foretune.formats import COMPARISON
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.loading_code import class_name
from foretune.run import Run
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import TaskCollection
from foretune.training import verbs
from foretune.training.adapt_plan import AdaptPlan
from foretune.training.data import TaskData, slot_of
from foretune.training.loop import Progress
from foretune.training.model_copies import answers
from foretune.training.outcome import Outcome
from foretune.training.scoring import score_slots
from foretune.training.shots import draw_shots
from foretune.training.text_limits import TextLimits


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Args:
        record: What `comparison.json` holds: metric, bases with their cost, all scores, paired
            differences with intervals, and the verdict.
    """

    record: dict[str, Any]

    @property
    def sentence(self) -> str:
        """The verdict: which base to take, with the interval, or that the data cannot tell."""
        return self.record["verdict"]["sentence"]

    def to_dict(self) -> dict[str, Any]:
        """The record, which is JSON-able."""
        return self.record

    def save(self, folder: Path | str) -> Path:
        """Writes comparison.json, scores.csv and report.html; returns the path of the report."""
        from foretune.evaluation.report import write_report

        folder = Path(folder)
        write_whole(folder / COMPARISON_FILE, json.dumps(self.record, indent=1))
        return write_report(self.record, folder)


def compare(
    bases: Mapping[str, nn.Module | Outcome],
    unseen: TaskCollection,
    *,
    adapt: Any,
    run: Run | None = None,
    shots: Sequence[int | None] = (8, 40),
    draws: int = 1,
    seen: TaskCollection | None = None,
    learning_rates: Sequence[float] = (),
    plans: Mapping[str, AdaptPlan] | None = None,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Adapts every base to every unseen task at several numbers of shots, and compares the scores.

    Args:
        bases: Name → base. The mapping may load each base when it is looked up.
        unseen: Tasks that no base was retrained on, with an objective and test examples.
        adapt: The adapt method, such as `foretune.LoRA()`; or several records, the simplest first,
            among which `search` chooses for each base and number of shots, with a number of steps.
        run: Random seed and budget of each adaptation; where it is searched, the largest one.
        shots: Numbers of training examples per task (per class for classification); None for all.
        draws: Independent draws of the shots.
        seen: Tasks on whose validation examples is searched; no base was retrained on them.
        learning_rates: Rates of a single `adapt`, to choose among as among several records; empty
            for its own.
        plans: How to adapt bases for which that was searched before; no other base is searched
            for then, but adapted by `adapt`.
        keep: Folder in which to save the adapters of the last of `shots` (first draw) as
            `<base>/<task>`; None does not save them.
        progress: Called with (update, updates, figures) during each adaptation.

    Returns:
        Scores at 0 shots (before adapting, where the base's head fits) and at all `shots`.

    Raises:
        UserError: No bases, or names that cannot be those of folders; an unseen task without test
            examples, a search without seen tasks, or a base without plan or single method.
    """
    run = run or Run()
    if not bases:
        raise UserError("compare needs at least one base, got none")
    if keep is not None:
        check_file_names("base", bases)
    ways = at_rates(adapt, learning_rates)
    if plans is None and seen is None and isinstance(ways, Sequence):
        raise UserError(
            "how to adapt is searched on seen tasks: pass seen=..., or a single method and rate"
        )
    for name in () if plans is None or not isinstance(ways, Sequence) else bases:
        if plans is not None and name not in plans:
            raise UserError(
                f'plans has none for base "{name}" ({", ".join(plans)}): pass a single method as '
                "adapt, for the bases without one"
            )
    for task in unseen:
        if not task.test:
            raise UserError(f'unseen task "{task.name}" has no test examples to score on')
    # Seen tasks come first: if they share labels, a base's head means the same on unseen tasks.
    objective = verbs.objective_of(unseen if seen is None else seen)
    for tasks in (unseen,) if seen is None else (seen, unseen):
        objective = objective.fit(tasks)
    unseen = unseen.with_objective(objective)
    scores: list[dict[str, Any]] = []
    base_records: list[dict[str, Any]] = []
    for name in bases:
        base = bases[name]
        model = base.model if isinstance(base, Outcome) else base
        scores += zero_shot(name, model, unseen, draws)
        plan, searched = None if plans is None else plans.get(name), None
        if plans is None and seen is not None and isinstance(ways, Sequence):
            searched = search(model, held_out.usable(seen), ways, run, shots, progress=progress)
            plan = searched.plan
        cost: dict[str, Any] = {}
        way: Any = plan or ways
        for k in shots:
            adapted = verbs.adapt(
                model,
                unseen,
                way,
                run,
                shots=k,
                draws=draws,
                scores_only=keep is None or k != shots[-1],
                progress=progress,
            )
            drawn = draw_shots(unseen, objective.kind, k, draws, run.seed)
            num_train = {(slot.task, slot.draw): len(slot.train) for slot in drawn}
            scores += [
                {
                    "base": name,
                    "task": task,
                    "shots": k,
                    "repeat": 0,
                    "seed": draw,
                    "score": score,
                    "num_rows": adapted.num_rows[task, draw],
                    "num_train": num_train[task, draw],
                }
                for (task, draw), score in adapted.scores.items()
            ]
            cost = _summed(cost, adapted.cost)
        if keep is not None:
            adapted.first_draw().save(keep / name)
        entry = {**_base_record(name, base), "model_class": class_name(model)}
        entry["num_labels"] = adapted.num_labels
        entry["adapt"] = {**_adapt_record(ways, plan, searched), **cost}
        base_records.append(entry)
    pairs, means = pairs_and_means(scores, base_records)
    unit = "rows per class" if objective.kind in CLASSES else "rows"
    return Comparison(
        {
            "format": COMPARISON,
            "foretune": foretune.__version__,
            "title": "comparison",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "metric": {"name": objective.metric, "chance": objective.chance()},
            "adapt": {
                **_adapt_method(ways, plans),
                "steps": run.steps,
                "batch_size": run.batch_size,
                "shots_unit": unit,
            },
            "collection": _counted(seen, "seen") | _counted(unseen, "unseen"),
            "bases": base_records,
            "scores": scores,
            "pairs": pairs,
            "means": means,
            "spectrum": None,
            "verdict": verdict(
                pairs, means, base_records, metric=objective.metric, shots_unit=unit
            ),
            "recipe": "",
        }
    )


def _adapt_method(ways: Any, plans: Mapping[str, AdaptPlan] | None) -> dict[str, Any]:
    """What the record of a comparison says of the adaptation of all bases."""
    if plans is not None:
        chosen = [planned.setting.method.name for p in plans.values() for planned in p.settings]
        return {"method": "search", "methods": [*dict.fromkeys(chosen)], "config": {}}
    if isinstance(ways, Sequence):
        tried = dict.fromkeys(method.name for method in ways)
        return {"method": "search", "methods": [*tried], "config": {}}
    return {"method": ways.name, "config": ways.to_dict()}


def _adapt_record(ways: Any, plan: AdaptPlan | None, searched: Search | None) -> dict[str, Any]:
    """What is recorded of how a base was adapted."""
    if plan is None:
        return {"learning_rate": ways.learning_rate, "searched": []}
    record: dict[str, Any] = {"learning_rate": None, "searched": []}
    record["by_shots"] = plan.to_dict()["settings"]
    if searched is not None:
        record |= {"trials": searched.trials, "search": searched.cost}
    return record


def zero_shot(
    name: str, model: nn.Module, unseen: TaskCollection, draws: int
) -> list[dict[str, Any]]:
    """Scores of the base on the unseen tasks before adapting; none where its head is for others."""
    objective = verbs.objective_of(unseen).bind(model)
    has_outputs = objective.num_outputs() is not None
    if has_outputs and (objective.shared() is not objective or not answers(model, objective)):
        return []
    limits = TextLimits.of(model, objective)
    data = TaskData([slot_of(task) for task in unseen], objective, limits)
    with frozen_prefix(model, []):
        scores = score_slots(model, data, "test")
    return [
        {
            "base": name,
            "task": data.slots[slot].key,
            "shots": 0,
            "repeat": 0,
            "seed": draw,
            "score": score,
            "num_rows": data.num_rows(slot, "test"),
        }
        for draw in range(draws)
        for slot, score in scores.items()
    ]


def _base_record(name: str, base: nn.Module | Outcome) -> dict[str, Any]:
    if not isinstance(base, Outcome):
        return {
            "name": name,
            "method": name,
            "label": name,
            "config": {},
            "path": None,
            "retrain": None,
        }
    method = base.method
    return {
        "name": name,
        "method": method.name,
        "label": method.label,
        "config": method.to_dict(),
        "path": None if base.run.out is None else str(base.run.out / "base"),
        "retrain": {"learning_rate": method.learning_rate, **base.cost},
    }


def _counted(tasks: TaskCollection | None, side: str) -> dict[str, int]:
    if tasks is None:
        return {}
    return {f"num_{side}": len(tasks), f"rows_{side}": sum(map(len, tasks))}


def _summed(total: dict[str, Any], cost: Mapping[str, Any]) -> dict[str, Any]:
    """The total with one more cost added: times and tokens add up, peaks are maxima."""
    peaks = ("peak_memory_mb", "trainable_parameters")
    merged = dict(total)
    for key, value in cost.items():
        if value is None or key not in merged or merged[key] is None:
            merged[key] = value
        else:
            merged[key] = max(merged[key], value) if key in peaks else round(merged[key] + value, 3)
    return merged
