"""`run_recipe`: retrain with all methods, adapt to the unseen tasks, compare, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import foretune
from foretune.errors import UserError, did_you_mean
from foretune.files import CARD_FILE, COMPARISON_FILE, write_whole
from foretune.formats import COMPARISON, SPECTRUM, damage_named, read_json, stamped
from foretune.processes import num_processes, process_rank
from foretune.recipes.adapt_words import adapt_with
from foretune.recipes.adapting import candidates_of, choose_adapting
from foretune.recipes.conflict import conflict_record, recipe_conflict
from foretune.recipes.console import SILENT, Console
from foretune.recipes.entries import MethodEntry, adapt_record
from foretune.recipes.folder import check_inputs, run_folder, write_json, write_run_record
from foretune.recipes.forgetting import forgetting_stage
from foretune.recipes.merge import merge_repeats
from foretune.recipes.model_card import model_card
from foretune.recipes.observers import observed
from foretune.recipes.schema import Recipe
from foretune.recipes.setup import Setup, need_unseen, set_up
from foretune.recipes.stages import base_folder, base_stage, make_base
from foretune.recipes.trials import total_cost

if TYPE_CHECKING:
    from foretune.training.adapt_plan import AdaptPlan

SPECTRUM_FILE = "spectrum.json"


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reads: Sequence[Path | str] = (),
    console: Console = SILENT,
) -> dict[str, Any]:
    """Runs a recipe from the start, or from where it was interrupted.

    Args:
        recipe: The recipe.
        resume: Continue the run in the recipe's folder.
        overwrite: Replace an earlier result in that folder.
        reads: What else must not be replaced, such as the recipe's file.
        console: Receives the progress.

    Returns:
        The content of `comparison.json`.

    Raises:
        UserError: The folder, the data or the model does not fit the recipe.
    """
    if recipe.spectrum is not None and num_processes() > 1:
        raise UserError(
            "the spectrum is measured in a single process: remove spectrum, or launch one process"
        )
    with (
        run_folder(
            recipe.folder,
            "run",
            resume=resume,
            overwrite=overwrite,
            config=recipe.to_yaml(),
            reads=[*recipe.reads, *reads],
        ) as out,
        observed(console, recipe, out) as observers,
    ):
        return _run_in(out, recipe, observers)


def _run_in(out: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    first = set_up(recipe, console)
    check_inputs(out, first.model, [*first.all_seen, *need_unseen(first)], first.tokenizer)
    conflict = recipe_conflict(first, console)
    repeats: list[dict[str, Any]] = []
    for seed, setup in enumerate(_setups(first, console)):
        stages = {e.name: base_stage(setup, e, seed, out, console) for e in recipe.entries}
        repeats.append(compare_repeat(setup, out, seed, stages, console))
    with damage_named(out / "repeats"):
        comparison = merge_repeats(repeats, first.turns)
    comparison |= {
        "title": recipe.name,
        "recipe": recipe.to_yaml(),
        "base_model": recipe.base_model,
        "datasets": recipe.datasets,
        "collection": _counts(first),
        "adapt_with": adapt_with(recipe),
        "conflict": conflict_record(conflict),
        "spectrum": spectrum_stage(first, out, lora_rates(repeats[0]), console),
    }
    forgetting = forgetting_stage(
        recipe.forgetting,
        first.model,
        first.tokenizer,
        SavedBases(recipe, out, 0),
        out,
        console,
    )
    if forgetting is not None:
        comparison["forgetting"] = forgetting
    finish(out, comparison)
    console.results(comparison)
    return comparison


def _setups(first: Setup, console: Console) -> Iterator[Setup]:
    """The setup of each repeat, after that of the first."""
    seeds = range(1, first.recipe.seeds)
    if first.recipe.tasks.rotate:
        yield first
        for seed in seeds:
            yield set_up(first.recipe, console, turn=seed)
        return
    # All at once, so that mistakes are reported before anything is trained.
    yield from [first, *(first.for_repeat(seed) for seed in seeds)]


def retrain_one(
    recipe: Recipe,
    name: str,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reads: Sequence[Path | str] = (),
    console: Console = SILENT,
) -> dict[str, Any]:
    """`foretune retrain`: retrains with one method of a recipe and saves the base in `out/base`.

    Args:
        recipe: The recipe.
        name: Name of one of its methods, or of a registered method.
        out: Output folder.
        resume: Continue the run in `out`.
        overwrite: Replace an earlier result in `out`.
        reads: What else must not be replaced, such as the recipe's file.
        console: Receives the progress.

    Returns:
        Folder of the base, method, validation score, trials of the search and cost.

    Raises:
        UserError: `name`, `out`, the data or the model does not fit the recipe.
    """
    entry = find_entry(recipe, name)
    with (
        run_folder(
            out,
            "retrain",
            resume=resume,
            overwrite=overwrite,
            config=recipe.to_yaml(),
            reads=[*recipe.reads, *reads],
        ) as folder,
        observed(console, recipe, folder) as observers,
    ):
        setup = set_up(recipe, observers)
        check_inputs(folder, setup.model, setup.all_seen, setup.tokenizer)
        outcome, _, trials = make_base(setup, entry, 0, folder, observers)
        choose_adapting(setup, name, 0, folder, observers)
    return {
        "base": str(out / "base"),
        "method": outcome.method.to_dict(),
        "validation_score": outcome.validation_score,
        "searched": trials,
        "cost": total_cost(outcome),
    }


def find_entry(recipe: Recipe, name: str) -> MethodEntry:
    """The entry of this name in the recipe, or an unlisted method with its defaults.

    Raises:
        UserError: There is no such entry or method, or the method is not one to retrain with.
    """
    from foretune.methods import METHODS, method_class_of

    for entry in recipe.entries:
        if entry.name == name:
            return entry
    if name in METHODS:
        method_class_of(name, "retrain")
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
    """The comparison of one repeat: adapts the bases of one random seed to the unseen tasks.

    Each base is adapted as the held-out tasks of its repeat chose, so that the variance between
    repeats includes that of the choice.

    Args:
        setup: Tasks and model.
        out: Folder of the run.
        seed: Random seed of this repeat.
        stages: Record of each retraining by name.
        console: Receives the progress.
    """
    path = out / "repeats" / f"seed-{seed}.json"
    if path.is_file():
        console.say(f"adapting, seed {seed}: already done")
        return stamped(read_json(path, dict[str, Any], COMPARISON), COMPARISON)
    block = setup.recipe.adapt
    entries = setup.recipe.entries
    plans = plans_of(stages)
    with console.bar(
        f"adapting {len(entries)} bases, seed {seed}", rounds=len(entries) * len(block.shots)
    ) as progress:
        comparison: dict[str, Any] = foretune.compare(
            SavedBases(setup.recipe, out, seed),
            need_unseen(setup),
            adapt=adapt_record(block) if plans is None else candidates_of(setup.recipe),
            run=setup.recipe.adapt_run(seed=seed),
            shots=tuple(block.row_counts),
            draws=block.draws,
            plans=plans,
            keep=out / "adapters" if seed == 0 else None,
            progress=progress,
        ).to_dict()
    for base in comparison["bases"]:
        stage = {**stages[base["name"]]}
        searched = stage.pop("adapting", {})
        searched.pop("plan", None)
        base |= {**stage, "adapt": {**base["adapt"], **searched}}
    write_json(path, comparison)
    return comparison


def plans_of(stages: Mapping[str, dict[str, Any]]) -> dict[str, AdaptPlan] | None:
    """How to adapt each base, as was chosen; None where the recipe fixes it."""
    from foretune.training.adapt_plan import AdaptPlan

    plans = {
        name: AdaptPlan.from_dict(stage["adapting"]["plan"])
        for name, stage in stages.items()
        if "adapting" in stage
    }
    return plans or None


def lora_rates(repeat: Mapping[str, Any]) -> dict[str, float]:
    """The learning rate of LoRA on each base of a repeat that is adapted by LoRA."""
    rates = {}
    for base in repeat["bases"]:
        fixed = {**base["adapt"], "method": repeat["adapt"]["method"]}
        for row in base["adapt"].get("by_shots", [fixed]):
            if row["method"] == "lora":
                rates[base["name"]] = row["learning_rate"]
    return rates


def spectrum_stage(
    setup: Setup, out: Path, rates: Mapping[str, float], console: Console
) -> dict[str, Any] | None:
    """The adaptability spectrum of the bases of the first seed; None if it is not in the recipe."""
    block = setup.recipe.spectrum
    if block is None:
        return None
    path = out / SPECTRUM_FILE
    if path.is_file():
        console.say("spectrum: already done")
        return read_json(path, dict[str, Any], SPECTRUM)
    from foretune.evaluation import spectrum
    from foretune.methods import make

    lora = setup.recipe.adapt.lora
    trainings = len(block.ranks) + min(spectrum.FULL_TASKS, len(need_unseen(setup)))
    with console.bar("spectrum", rounds=len(setup.recipe.entries) * trainings) as progress:
        measured = spectrum.measure(
            SavedBases(setup.recipe, out, 0),
            need_unseen(setup),
            adapt=make("lora", **({} if lora is None else {"lora": lora})),
            full=make("full"),
            run=setup.recipe.adapt_run(),
            shots=block.shots,
            ranks=tuple(block.ranks),
            rates=rates,
            progress=progress,
        )
    write_json(path, stamped(measured, SPECTRUM))
    return measured


class SavedBases(Mapping[str, Any]):
    """Name → retrained model, loaded from its folder on access: one in memory at a time."""

    def __init__(self, recipe: Recipe, out: Path, seed: int) -> None:
        self.folders = {e.name: base_folder(out, e, seed) / "base" for e in recipe.entries}
        self.trust_remote_code = recipe.model.trust_remote_code

    def __getitem__(self, name: str) -> Any:
        from foretune.models.loading import load_base

        model, _ = load_base(self.folders[name], trust_remote_code=self.trust_remote_code)
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
    """Writes comparison.json, README.md, report.html with what lies beside it, and run.json."""
    if process_rank() > 0:
        return
    from foretune.evaluation.report import write_report

    write_json(out / COMPARISON_FILE, comparison)
    write_whole(out / CARD_FILE, model_card(comparison, out))
    write_report(comparison, out)
    write_run_record(out)
