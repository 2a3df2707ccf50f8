"""The stage of a base: it is retrained, then held-out tasks choose how to adapt it.

A stage whose record exists is finished, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from foretune.files import RUN_FILE
from foretune.formats import STAGE, read_json, stamped
from foretune.models.base_record import record_origin
from foretune.recipes.adapting import choose_adapting
from foretune.recipes.console import Console
from foretune.recipes.entries import MethodEntry
from foretune.recipes.folder import on_first_process, write_json
from foretune.recipes.setup import Setup
from foretune.recipes.trials import best_trial, retrain, say_score, total_cost

STAGE_FILE = "stage.json"  # in the folder of a finished stage


class Stage(TypedDict):
    """The content of stage.json."""

    name: str
    method: str
    label: str
    config: dict[str, Any]
    path: str
    retrain: dict[str, Any]
    choice: NotRequired[dict[str, Any]]
    adapting: NotRequired[dict[str, Any]]


def base_folder(out: Path, entry: MethodEntry, seed: int) -> Path:
    """The folder of one retraining, with a plain model folder `base/` in it."""
    return out / "bases" / entry.name / f"seed-{seed}"


def base_stage(
    setup: Setup, entry: MethodEntry, seed: int, out: Path, console: Console
) -> dict[str, Any]:
    """Makes and saves one base of a run; returns its record for the comparison."""
    folder = base_folder(out, entry, seed)
    if (folder / STAGE_FILE).is_file():
        console.say(f"{entry.name}, seed {seed}: already done")
        return {**read_json(folder / STAGE_FILE, Stage, STAGE)}
    outcome, settings, trials = make_base(setup, entry, seed, folder, console)
    record = entry.record(settings)
    stage = {
        "name": entry.name,
        "method": entry.method,
        "label": record.label if entry.name == entry.method else entry.name,
        "config": record.to_dict(),
        "path": str((folder / "base").relative_to(out)),
        "retrain": {
            "learning_rate": record.learning_rate,
            "fields": {key: value for key, value in settings.items() if key != "learning_rate"},
            "searched": trials,
            "validation_score": outcome.validation_score,
            "curve": outcome.history,
            **total_cost(outcome),
        },
    }
    if outcome.choice is not None:
        stage["choice"] = outcome.choice
        console.say(f"{entry.name}, seed {seed}: takes {outcome.choice['chosen']}")
    adapting = choose_adapting(setup, entry.name, seed, folder, console)
    if adapting is not None:
        stage["adapting"] = adapting
    write_json(folder / STAGE_FILE, stamped(stage, STAGE))
    return stage


def make_base(
    setup: Setup, entry: MethodEntry, seed: int, folder: Path, console: Console
) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """Retrains with the best of an entry's settings and saves the base in `folder/base`.

    Returns:
        (outcome, the settings, all trials of the search).
    """
    settings, trials = best_trial(setup, entry, seed, folder, console)
    name = entry.name_with(settings)
    if trials:
        console.say(f"{entry.name}, seed {seed}: takes {name}")
    # The best trial lies in the folder already, if it was made with all steps.
    is_finished = (folder / RUN_FILE).is_file()
    run = setup.recipe.retrain_run(seed=seed, out=folder, resume=True)
    outcome = retrain(setup, entry, settings, run, console)
    recipe = setup.recipe
    on_first_process(lambda: record_origin(folder / "base", recipe.base_model, recipe.datasets))
    if not is_finished:
        say_score(setup, name, outcome, console)
    return outcome, settings, trials
