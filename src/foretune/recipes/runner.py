"""`run_recipe`: retrain with every method, adapt to the unseen tasks, compare, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import foretune
from foretune.errors import UserError, did_you_mean
from foretune.recipes.folder import prepare_folder
from foretune.recipes.merge import merge_repeats
from foretune.recipes.model_card import model_card
from foretune.recipes.report import write_report
from foretune.recipes.schema import MethodEntry, Recipe
from foretune.recipes.setup import Say, Setup, need_unseen, set_up
from foretune.recipes.stages import (
    base_folder,
    read_json,
    retrain_stage,
    search_rate,
    write_json,
)


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs a recipe from start to end, or from where it was.

    Args:
        recipe: What to do.
        resume: Continue what is in the recipe's folder.
        overwrite: Empty that folder first.
        say: Is told each stage.
        progress: Show progress bars on stderr.

    Returns:
        The comparison, as it stands in `comparison.json`.

    Raises:
        UserError: The folder, the data or the model is not what the recipe needs.
    """
    out = prepare_folder(
        recipe.folder, resume=resume, overwrite=overwrite, config=recipe.to_yaml()
    )
    setup = set_up(recipe, say)
    need_unseen(setup)
    stages = retrain_all(setup, out, say, progress)
    repeats = [compare_repeat(setup, out, seed, stages, say, progress)
               for seed in range(recipe.seeds)]
    comparison = merge_repeats(repeats)
    comparison |= {
        "title": recipe.name,
        "recipe": recipe.to_yaml(),
        "spectrum": spectrum_stage(setup, out, say, progress),
    }
    finish(out, comparison)
    return comparison


def retrain_all(
    setup: Setup, out: Path, say: Say, progress: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """Every method under every seed: {(name, seed): what its stage says}."""
    stages = {}
    for entry in setup.recipe.entries:
        rate, searched = search_rate(setup, entry, out / "bases" / entry.name, say, progress)
        for seed in range(setup.recipe.seeds):
            stages[entry.name, seed] = retrain_stage(
                setup, entry, seed, out, rate, searched, say, progress
            )
    return stages


def retrain_one(
    recipe: Recipe,
    name: str,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> dict[str, Any]:
    """`foretune retrain`: one method of a recipe, its base straight in `out/base`.

    Args:
        recipe: What to do.
        name: The name of one of its methods.
        out: Where.
        resume: Continue what is in `out`.
        overwrite: Empty `out` first.
        say: Is told each stage.
        progress: Show progress bars on stderr.
    """
    entry = find_entry(recipe, name)
    config = recipe.to_yaml()
    prepare_folder(out, resume=resume, overwrite=overwrite, config=config)
    setup = set_up(recipe, say)
    rate, searched = search_rate(setup, entry, out, say, progress)
    run = recipe.retrain_run(out=out, resume=True, progress=progress)
    record = entry.record(rate)
    outcome = foretune.retrain(setup.model, setup.seen, record, run, tokenizer=setup.tokenizer)
    outcome.save(out)
    return {
        "base": str(out / "base"),
        "method": record.to_dict(),
        "validation_score": outcome.validation_score,
        "searched": searched,
        "cost": outcome.cost,
    }


def find_entry(recipe: Recipe, name: str) -> MethodEntry:
    """The recipe's entry of this name; a method that it does not list, with its own defaults."""
    from foretune.methods import METHODS

    for entry in recipe.entries:
        if entry.name == name:
            return entry
    if name in METHODS:
        return MethodEntry(name=name, method=name, fields={}, rates=recipe.retrain.rates)
    names = [entry.name for entry in recipe.entries]
    raise UserError(
        f'no method "{name}" in the recipe ({", ".join(names)}) or in foretune ls.'
        + did_you_mean(name, [*names, *METHODS])
    )


def compare_repeat(
    setup: Setup,
    out: Path,
    seed: int,
    stages: Mapping[tuple[str, int], dict[str, Any]],
    say: Say,
    progress: bool,
) -> dict[str, Any]:
    """Adapts the bases of one seed to the unseen tasks: the comparison of this repeat."""
    path = out / "repeats" / f"seed-{seed}.json"
    if path.is_file():
        say(f"seed {seed}: already compared")
        done: dict[str, Any] = read_json(path)
        return done
    say(f"seed {seed}: adapting {len(setup.recipe.entries)} bases to unseen tasks")
    block = setup.recipe.adapt
    comparison = foretune.compare(
        SavedBases(out, setup.recipe.entries, seed),
        need_unseen(setup),
        adapt=setup.recipe.adapt_record(block.rates[0] if len(block.rates) == 1 else None),
        run=setup.recipe.adapt_run(seed=seed, progress=progress),
        shots=tuple(None if shots == "all" else shots for shots in block.shots),
        draws=block.draws,
        seen=setup.search_tasks,
        learning_rates=tuple(block.rates) if len(block.rates) > 1 else (),
    ).to_dict()
    for base in comparison["bases"]:
        base |= {**stages[base["name"], seed], "adapt": base.get("adapt")}
    write_json(path, comparison)
    return comparison


def spectrum_stage(setup: Setup, out: Path, say: Say, progress: bool) -> dict[str, Any] | None:
    """The adaptability spectrum of the first seed's bases, when the recipe asks for it."""
    block = setup.recipe.spectrum
    if block is None:
        return None
    path = out / "spectrum.json"
    if path.is_file():
        done: dict[str, Any] = read_json(path)
        return done
    say("spectrum: the rank that an unseen task needs")
    from foretune.evaluation import spectrum

    measured: dict[str, Any] = spectrum.measure(  # type: ignore[attr-defined,unused-ignore]
        SavedBases(out, setup.recipe.entries, 0),
        need_unseen(setup),
        run=setup.recipe.adapt_run(progress=progress),
        shots=block.shots,
        ranks=tuple(block.ranks),
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


def finish(out: Path, comparison: dict[str, Any]) -> None:
    """Writes what people and machines read: comparison.json, report.html, README.md, run.json."""
    from foretune.training.record import environment

    write_json(out / "comparison.json", comparison)
    write_report(out, comparison)
    (out / "README.md").write_text(model_card(comparison), encoding="utf-8")
    write_json(out / "run.json", {"finished": True, "environment": environment()})

