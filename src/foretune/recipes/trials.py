"""The trials of a retraining: each learning rate with each combination of the searched fields.

A trial retrains without the held-out tasks of its repeat; its score is that after a short
adaptation to these tasks. With all steps, the best trial is the base itself.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

import foretune
from foretune.errors import DivergedError, UserError
from foretune.files import RUN_FILE, put_in_place, remove
from foretune.formats import read_json
from foretune.manifest import TRIAL, all_files, record_files
from foretune.recipes.adapting import held_out_of
from foretune.recipes.console import Console
from foretune.recipes.entries import MethodEntry
from foretune.recipes.folder import on_first_process, write_json
from foretune.recipes.setup import Setup
from foretune.run import Run

SEARCH_FILE = "search.json"  # the finished trials, in the folder of the retraining


class Trial(TypedDict):
    """A row of search.json; the score is None where the trial diverged."""

    learning_rate: float | None
    fields: dict[str, Any]
    score: float | None
    by_task: NotRequired[dict[str, float] | None]


def best_trial(
    setup: Setup, entry: MethodEntry, seed: int, folder: Path, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Retrains with each setting of an entry, or with those that an interrupted search has left.

    Args:
        setup: The tasks and the model of the repeat.
        entry: The method with the settings to try.
        seed: Random seed of the repeat.
        folder: Folder of the retraining. Trials with all steps leave the best retraining there,
            finished; with fewer steps they leave nothing but their scores.
        console: Receives the progress.

    Returns:
        (settings of the best trial, all trials); no trials where there is a single setting.

    Raises:
        UserError: All trials diverged, or the folder has the trials of another recipe.
    """
    settings = entry.trials
    if len(settings) == 1:
        return settings[0], []
    path = folder / SEARCH_FILE
    trials: list[dict[str, Any]] = []
    if path.is_file():
        trials = [{**trial} for trial in read_json(path, list[Trial])]
    recorded = [(trial["learning_rate"], trial["fields"]) for trial in trials]
    if recorded != [_rate_and_fields(tried) for tried in settings[: len(trials)]]:
        raise UserError(f"{path} has other settings than the recipe: remove it")
    steps, all_steps = setup.recipe.retrain.search_steps, setup.recipe.retrain_run().steps
    for number in range(len(trials), len(settings)):
        on_first_process(functools.partial(_remove_all_but, folder, best_of(trials), number))
        run = setup.recipe.retrain_run(seed=seed, out=folder / f"{TRIAL}{number}", resume=True)
        if steps is not None and steps < all_steps:
            run = run.replace(steps=steps, out=None, resume=False)
        scores = _scores(setup, entry, settings[number], run, console)
        rate, fields = _rate_and_fields(settings[number])
        trials.append({"learning_rate": rate, "fields": fields, **scores})
        write_json(path, trials)
    best = best_of(trials)
    if best is None:
        tried = ", ".join(entry.name_with(tried) for tried in settings)
        raise UserError(f"all trials diverged ({tried}): try lower learning rates")
    on_first_process(lambda: _take(folder, best))
    return settings[best], trials


def retrain(
    setup: Setup, entry: MethodEntry, settings: dict[str, Any], run: Run, console: Console
) -> Any:
    """The outcome of `foretune.retrain` on the seen tasks of a repeat, with a progress bar."""
    record, label = entry.record(settings), f"{entry.name_with(settings)}, seed {run.seed}"
    with console.bar(label, rounds=1 + record.chooses) as progress:
        outcome = foretune.retrain(
            setup.model,
            setup.seen,
            record,
            run,
            tokenizer=setup.tokenizer,
            held_out=held_out_of(setup, record),
            progress=progress,
        )
    return outcome


def say_score(setup: Setup, name: str, outcome: Any, console: Console) -> None:
    """Says how long a retraining took, and its score on the tasks that it was validated by."""
    from foretune.evaluation.wording import counted

    score = outcome.validation_score
    if score is None:
        validation = ""
    elif setup.held_out is None:
        validation = f", validation score {score:.4f}"
    else:
        tasks = counted(len(setup.held_out), "held-out task")
        validation = f", {score:.4f} after adapting to {tasks}"
    seconds = f"{total_cost(outcome)['seconds']:.0f} s"
    console.say(f"{name}, seed {outcome.run.seed}: {seconds}{validation}")


def total_cost(outcome: Any) -> dict[str, Any]:
    """The cost of a retraining, including the trials of a method that chooses among others."""
    cost: dict[str, Any] = dict(outcome.cost)
    if outcome.choice is not None:
        for key, value in outcome.choice["cost"].items():
            cost[key] = cost.get(key, 0) + value
    return cost


def _scores(
    setup: Setup, entry: MethodEntry, settings: dict[str, Any], run: Run, console: Console
) -> dict[str, Any]:
    try:
        outcome = retrain(setup, entry, settings, run, console)
    except DivergedError as error:
        console.say(f"{entry.name_with(settings)}: {error}")
        return {"score": None, "by_task": None}
    say_score(setup, entry.name_with(settings), outcome, console)
    return {"score": outcome.validation_score, "by_task": outcome.held_out_scores}


def _rate_and_fields(settings: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
    fields = {key: value for key, value in settings.items() if key != "learning_rate"}
    return settings.get("learning_rate"), fields


def best_of(trials: list[dict[str, Any]]) -> int | None:
    """Number of the trial to take; None if all diverged.

    A later trial takes the place of an earlier one only if it is better by more than one standard
    error of their difference over the held-out tasks: what is not told apart is decided by the
    order of the recipe, not by luck.
    """
    from foretune.training.adapted_scores import is_level

    best: int | None = None
    for number, trial in enumerate(trials):
        if trial["score"] is None:
            continue
        if best is not None:
            current = trials[best]
            by_task, current_by_task = trial.get("by_task"), current.get("by_task")
            if trial["score"] <= current["score"]:
                continue
            if by_task and current_by_task and is_level(current_by_task, by_task):
                continue
        best = number
    return best


def _remove_all_but(folder: Path, *numbers: int | None) -> None:
    """Removes what other trials have left in the folder."""
    names = {f"{TRIAL}{number}" for number in numbers}
    for trial in folder.glob(f"{TRIAL}*"):
        if trial.name not in names:
            remove(trial)


def _take(folder: Path, number: int) -> None:
    """Makes a trial the result in the folder, and removes the others.

    After a kill the rest is moved: the record of the run comes last.
    """
    trial = folder / f"{TRIAL}{number}"
    if trial.is_dir():
        record_files(trial, [folder / path.relative_to(trial) for path in all_files(trial)])
        for path in sorted(trial.iterdir(), key=lambda path: path.name == RUN_FILE):
            put_in_place(path, folder / path.name)
    _remove_all_but(folder)
