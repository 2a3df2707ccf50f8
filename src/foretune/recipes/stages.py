"""The stages of a run: search of a learning rate, and retraining. Each writes a file.

A stage whose file exists is finished, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

import foretune
from foretune.errors import DivergedError, UserError
from foretune.formats import STAGE, read_json, stamped
from foretune.processes import process_rank
from foretune.recipes.console import Console
from foretune.recipes.schema import MethodEntry, takes_rate
from foretune.recipes.setup import Setup
from foretune.run import Run
from foretune.tasks.task import TaskCollection

STAGE_FILE = "stage.json"  # in the folder of a finished stage
SEARCH_FILE = "search.json"  # the trials of a search over learning rates


class Trial(TypedDict):
    """A row of search.json."""

    learning_rate: float
    score: float | None


class Stage(TypedDict):
    """The content of stage.json."""

    name: str
    method: str
    label: str
    config: dict[str, Any]
    path: str
    retrain: dict[str, Any]
    choice: NotRequired[dict[str, Any]]


def base_folder(out: Path, entry: MethodEntry, seed: int) -> Path:
    """The folder of one retraining, with a plain model folder `base/` in it."""
    return out / "bases" / entry.name / f"seed-{seed}"


def search_rate(
    setup: Setup, entry: MethodEntry, folder: Path, console: Console
) -> tuple[float | None, list[dict[str, Any]]]:
    """(best learning rate, all trials).

    Each trial retrains the same model under the first seed without the search tasks, then adapts
    the base to these as to unseen tasks. A trial that diverges has the score None. Trials are
    written to the folder one by one.

    Raises:
        UserError: All trials diverged.
    """
    if not takes_rate(entry.method) or not entry.rates:
        return None, []
    if len(entry.rates) == 1:
        return entry.rates[0], []
    path = folder / SEARCH_FILE
    trials: list[dict[str, Any]] = []
    if path.is_file():
        trials = [{**trial} for trial in read_json(path, list[Trial])]
        if [trial["learning_rate"] for trial in trials] != entry.rates[: len(trials)]:
            raise UserError(f"{path} has other learning rates than the recipe: remove it")
    for rate in entry.rates[len(trials) :]:
        trials.append({"learning_rate": rate, "score": _trial(setup, entry, rate, console)})
        write_json(path, trials)
    scored = [trial for trial in trials if trial["score"] is not None]
    if not scored:
        rates = ", ".join(f"{rate:g}" for rate in entry.rates)
        raise UserError(f"{entry.name} diverged at all learning rates ({rates}): try lower ones")
    return max(scored, key=lambda trial: trial["score"])["learning_rate"], trials


def retrain_stage(
    setup: Setup,
    entry: MethodEntry,
    seed: int,
    out: Path,
    rate: float | None,
    searched: list[dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Retrains and saves the base; returns its record for the comparison."""
    folder = base_folder(out, entry, seed)
    if (folder / STAGE_FILE).is_file():
        console.say(f"{entry.name}, seed {seed}: already done")
        return {**read_json(folder / STAGE_FILE, Stage, STAGE)}
    record = entry.record(rate)
    run = setup.recipe.retrain_run(seed=seed, out=folder, resume=True)
    outcome = retrain(setup, setup.seen, record, run, console, f"{entry.name}, seed {seed}")
    used = rate if rate is not None else record.learning_rate
    stage = {
        "name": entry.name,
        "method": entry.method,
        "label": record.label if entry.name == entry.method else entry.name,
        "config": record.to_dict(),
        "path": str((folder / "base").relative_to(out)),
        "retrain": {
            "learning_rate": used,
            "searched": searched,
            "validation_score": outcome.validation_score,
            **total_cost(outcome),
        },
    }
    if outcome.choice is not None:
        stage["choice"] = outcome.choice
        console.say(f"{entry.name}, seed {seed}: takes {outcome.choice['chosen']}")
    write_json(folder / STAGE_FILE, stamped(stage, STAGE))
    return stage


def total_cost(outcome: Any) -> dict[str, Any]:
    """The cost of a retraining, including the trials of a method that chooses among others."""
    cost: dict[str, Any] = dict(outcome.cost)
    if outcome.choice is not None:
        for key, value in outcome.choice["cost"].items():
            cost[key] = cost.get(key, 0) + value
    return cost


def retrain(
    setup: Setup, seen: TaskCollection, record: Any, run: Run, console: Console, label: str
) -> Any:
    """The outcome of `foretune.retrain`, with a progress bar."""
    with console.bar(label) as progress:
        outcome = foretune.retrain(
            setup.model, seen, record, run, tokenizer=setup.tokenizer, progress=progress
        )
    score = outcome.validation_score
    validation = "" if score is None else f", validation score {score:.4f}"
    console.say(f"{label}: {outcome.cost['seconds']:.0f} s{validation}")
    return outcome


def _trial(setup: Setup, entry: MethodEntry, rate: float, console: Console) -> float | None:
    from foretune.evaluation.adapt_search import at_rates
    from foretune.evaluation.adapt_search import search as search_adapting
    from foretune.evaluation.wording import counted

    recipe, search = setup.recipe, setup.search
    full_run = recipe.retrain_run()
    steps = recipe.retrain.search_steps or full_run.steps
    run = full_run.replace(steps=min(steps, full_run.steps))
    label = f"{entry.name}, trying learning_rate={rate:g}"
    block, adapting = recipe.adapt, recipe.adapt_run()
    rounds = len(block.shots) * max(1, len(block.rates))
    try:
        seen = setup.seen.without(search.names)
        outcome = retrain(setup, seen, entry.record(rate), run, console, label)
        with console.bar(f"{label}: adapting", rounds=rounds) as progress:
            methods = at_rates(recipe.adapt_record(), block.rates)
            score = search_adapting(
                outcome.model, search, methods, adapting, block.row_counts, progress=progress
            ).score
    except DivergedError as error:
        console.say(f"{entry.name}: {error}")
        return None
    tasks = counted(len(search), "held-out task")
    console.say(f"{label}: {score:.4f} after adapting to {tasks}")
    return score


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, in the first of several processes."""
    from foretune.files import write_whole

    if process_rank() > 0:
        return
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))
