"""`run_recipe`: retrain with every method, adapt to the unseen tasks, compare, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import foretune
from foretune.errors import UserError, did_you_mean
from foretune.processes import num_processes, process_rank
from foretune.recipes.console import SILENT, Console
from foretune.recipes.folder import check_inputs, check_place, prepare_folder
from foretune.recipes.merge import merge_repeats
from foretune.recipes.model_card import model_card
from foretune.recipes.schema import MethodEntry, Recipe
from foretune.recipes.setup import Setup, need_unseen, set_up
from foretune.recipes.stages import (
    base_folder,
    read_json,
    retrain,
    retrain_stage,
    search_rate,
    whole_cost,
    write_json,
)


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Runs a recipe from start to end, or from where it was.

    Args:
        recipe: What to do.
        resume: Continue what is in the recipe's folder.
        overwrite: Empty that folder first.
        console: Is told how it goes.

    Returns:
        The comparison, as it stands in `comparison.json`.

    Raises:
        UserError: The folder, the data or the model is not what the recipe needs.
    """
    if recipe.spectrum is not None and num_processes() > 1:
        raise UserError(
            "the spectrum is measured in one process: leave out spectrum, or launch one"
        )
    place: Any = {"resume": resume, "overwrite": overwrite, "config": recipe.to_yaml()}
    check_place(recipe.folder, **place)
    first = setup = set_up(recipe, console)
    tasks = [*first.known, *need_unseen(first)]
    # Only now, when data and model are there, may what is in the folder go.
    out = prepare_folder(recipe.folder, **place)
    check_inputs(out, first.model, tasks)
    repeats: list[dict[str, Any]] = []
    for seed in range(recipe.seeds):
        if seed and recipe.tasks.rotate:
            setup = set_up(recipe, console, repeat=seed)
        stages = retrain_all(setup, out, seed, console)
        repeats.append(compare_repeat(setup, out, seed, stages, console))
    comparison = merge_repeats(repeats, first.turns)
    comparison |= {
        "title": recipe.name,
        "recipe": recipe.to_yaml(),
        "collection": _counts(first),
        "spectrum": spectrum_stage(first, out, adapt_rates(repeats[0]), console),
    }
    finish(out, comparison)
    return comparison


def retrain_all(setup: Setup, out: Path, seed: int, console: Console) -> dict[str, dict[str, Any]]:
    """Every method under one seed: {name: what its stage says}."""
    stages = {}
    for entry in setup.recipe.entries:
        # Tasks that take turns must not choose a rate for a turn in which they are unseen.
        turn = f"turn-{seed}" if setup.recipe.tasks.rotate else ""
        rate, searched = search_rate(setup, entry, out / "bases" / entry.name / turn, console)
        stages[entry.name] = retrain_stage(setup, entry, seed, out, rate, searched, console)
    return stages


def retrain_one(
    recipe: Recipe,
    name: str,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """`foretune retrain`: one method of a recipe, its base straight in `out/base`.

    Args:
        recipe: What to do.
        name: The name of one of its methods.
        out: Where.
        resume: Continue what is in `out`.
        overwrite: Empty `out` first.
        console: Is told how it goes.
    """
    entry = find_entry(recipe, name)
    config = recipe.to_yaml()
    check_place(out, resume=resume, overwrite=overwrite, config=config)
    setup = set_up(recipe, console)
    prepare_folder(out, resume=resume, overwrite=overwrite, config=config)
    check_inputs(out, setup.model, setup.known)
    rate, searched = search_rate(setup, entry, out, console)
    record = entry.record(rate)
    run = recipe.retrain_run(out=out, resume=True)
    outcome = retrain(setup, setup.seen, record, run, console, name)
    return {
        "base": str(out / "base"),
        "method": record.to_dict(),
        "validation_score": outcome.validation_score,
        "searched": searched,
        "cost": whole_cost(outcome),
    }


def find_entry(recipe: Recipe, name: str) -> MethodEntry:
    """The recipe's entry of this name; a method that it does not list, with its own defaults."""
    from foretune.methods import METHODS

    for entry in recipe.entries:
        if entry.name == name:
            return entry
    if name in METHODS:
        return recipe.with_method(name)
    names = [entry.name for entry in recipe.entries]
    raise UserError(
        f'no method "{name}" in the recipe ({", ".join(names)}) or in foretune ls.'
        + did_you_mean(name, [*names, *METHODS])
    )


def compare_repeat(
    setup: Setup,
    out: Path,
    seed: int,
    stages: Mapping[str, dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Adapts the bases of one seed to the unseen tasks: the comparison of this repeat.

    Rates of adapting are searched in each repeat anew, so that the luck of the search is a part of
    what repeats differ by.

    Args:
        setup: Tasks and model.
        out: The run's folder.
        seed: Of this repeat.
        stages: What each retraining says of itself.
        console: Is told how it goes.
    """
    path = out / "repeats" / f"seed-{seed}.json"
    if path.is_file():
        console.say(f"adapting, seed {seed}: already done")
        done: dict[str, Any] = read_json(path)
        return done
    block = setup.recipe.adapt
    entries = setup.recipe.entries
    trials = len(block.rates) if len(block.rates) > 1 else 0
    with console.bar(
        f"adapting {len(entries)} bases, seed {seed}",
        rounds=len(entries) * len(block.shots) * (1 + trials),
    ) as progress:
        comparison: dict[str, Any] = foretune.compare(
            SavedBases(out, entries, seed),
            need_unseen(setup),
            adapt=setup.recipe.adapt_record(),
            run=setup.recipe.adapt_run(seed=seed),
            shots=tuple(block.row_counts),
            draws=block.draws,
            seen=setup.search,
            learning_rates=tuple(block.rates),
            keep=out / "adapters" if seed == 0 else None,
            progress=progress,
        ).to_dict()
    for base in comparison["bases"]:
        base |= {**stages[base["name"]], "adapt": base["adapt"]}
    write_json(path, comparison)
    return comparison


def adapt_rates(repeat: Mapping[str, Any]) -> dict[str, float]:
    """The learning rate with which each base of a repeat was adapted."""
    return {base["name"]: base["adapt"]["learning_rate"] for base in repeat["bases"]}


def spectrum_stage(
    setup: Setup, out: Path, rates: Mapping[str, float], console: Console
) -> dict[str, Any] | None:
    """The adaptability spectrum of the first seed's bases, when the recipe asks for it."""
    block = setup.recipe.spectrum
    if block is None:
        return None
    path = out / "spectrum.json"
    if path.is_file():
        console.say("spectrum: already done")
        done: dict[str, Any] = read_json(path)
        return done
    from foretune.evaluation import spectrum
    from foretune.methods import make

    lora = setup.recipe.adapt.lora
    trainings = len(block.ranks) + min(spectrum.FULL_TASKS, len(need_unseen(setup)))
    with console.bar("spectrum", rounds=len(setup.recipe.entries) * trainings) as progress:
        measured = spectrum.measure(
            SavedBases(out, setup.recipe.entries, 0),
            need_unseen(setup),
            adapt=make("lora", **({} if lora is None else {"lora": lora})),
            full=make("full"),
            run=setup.recipe.adapt_run(),
            shots=block.shots,
            ranks=tuple(block.ranks),
            rates=rates if setup.recipe.adapt.method == "lora" else None,
            progress=progress,
        )
    write_json(path, measured)
    return measured


class SavedBases(Mapping[str, Any]):
    """Name → retrained model, read from its folder when asked for: one in memory at a time."""

    def __init__(self, out: Path, entries: list[MethodEntry], seed: int) -> None:
        self.folders = {e.name: base_folder(out, e, seed) / "base" for e in entries}

    def __getitem__(self, name: str) -> Any:
        from foretune.models.loading import load_base

        model, _ = load_base(self.folders[name])
        return model

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)


def _counts(setup: Setup) -> dict[str, Any]:
    unseen = need_unseen(setup)
    counts = {
        "num_seen": len(setup.seen),
        "num_unseen": len(unseen),
        "rows_seen": sum(map(len, setup.seen)),
        "rows_unseen": sum(map(len, unseen)),
    }
    return counts if setup.turns == 1 else {**counts, "turns": setup.turns}


def finish(out: Path, comparison: dict[str, Any]) -> None:
    """Writes what people and machines read: comparison.json, report.html, README.md, run.json."""
    if process_rank() > 0:
        return
    from foretune.evaluation.report import write_report
    from foretune.training.record import environment

    write_json(out / "comparison.json", comparison)
    write_report(comparison, out)
    (out / "README.md").write_text(model_card(comparison), encoding="utf-8")
    write_json(out / "run.json", {"finished": True, "environment": environment()})
