"""How a base is best adapted: chosen on the repeat's held-out tasks, recorded beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from foretune.files import CARD_FILE, write_whole
from foretune.formats import ADAPTING, read_json, stamped
from foretune.recipes.console import Console
from foretune.recipes.entries import adapt_methods
from foretune.recipes.folder import on_first_process, write_json
from foretune.recipes.schema import Recipe
from foretune.recipes.setup import Setup

if TYPE_CHECKING:
    from torch import nn

    from foretune.training.held_out import HeldOut

ADAPTING_FILE = "adapting.json"  # the search of how to adapt, in the folder of the base
CARD_HEADING = "## Adapting"
VALIDATION_STEPS = 32  # at most so many of adapting in a validation of a retraining
# Adapters that make the basis of a base without its own are trained so many times longer than those
# of new tasks: PEFT-ML's have had a whole retraining, and a basis of unfinished ones is a handicap.
BASIS_STEPS_FACTOR = 5


class Adapting(TypedDict):
    """The content of adapting.json: the plan, all trials and the cost of the search."""

    plan: dict[str, Any]
    trials: list[dict[str, Any]]
    search: dict[str, Any]


def choose_adapting(
    setup: Setup, name: str, seed: int, folder: Path, console: Console
) -> dict[str, Any] | None:
    """Searches how to adapt the base in `folder/base`, and records the choice beside it.

    Args:
        setup: The tasks of the repeat; the held-out ones choose.
        name: Name of the base.
        seed: Random seed of the repeat.
        folder: Folder of the retraining.
        console: Receives the progress, and what was chosen.

    Returns:
        The content of adapting.json; None where the recipe fixes how to adapt.
    """
    from foretune.evaluation.wording import adapting_phrase

    if setup.held_out is None or not setup.recipe.adapt.searches:
        return None
    path = folder / ADAPTING_FILE
    if path.is_file():
        adapting: dict[str, Any] = {**read_json(path, Adapting, ADAPTING)}
    else:
        adapting = _search(setup, name, seed, folder / "base", console)
        write_json(path, stamped(adapting, ADAPTING))
    chosen = adapting_phrase(adapting["plan"]["settings"], setup.shots_unit)
    on_first_process(lambda: _record(folder, adapting["plan"], chosen))
    console.say(f"{name}, seed {seed}: adapts {chosen}")
    return adapting


def _record(folder: Path, plan: dict[str, Any], chosen: str) -> None:
    """Writes the choice into the record of the base, and into its model card."""
    from foretune.models.base_record import record_adapting

    record_adapting(folder / "base", plan)
    card = folder / CARD_FILE
    text = card.read_text("utf-8").partition(CARD_HEADING)[0].rstrip()
    section = (
        f"Held-out tasks chose how it is adapted: {chosen}. `foretune adapt base --tasks "
        "NEW.jsonl` adapts new tasks in this way."
    )
    write_whole(card, f"{text}\n\n{CARD_HEADING}\n\n{section}\n")


def _search(setup: Setup, name: str, seed: int, base: Path, console: Console) -> dict[str, Any]:
    from foretune.evaluation.adapt_search import search
    from foretune.models.loading import load_base

    recipe = setup.recipe
    assert setup.held_out is not None  # checked by `choose_adapting`
    model, _ = load_base(base, trust_remote_code=recipe.model.trust_remote_code)
    methods = candidates_of(recipe)
    if any(method.name == "basis" for method in methods):
        _add_basis(setup, name, seed, base, model, console)
    run, shots = recipe.adapt_run(seed=seed), recipe.adapt.row_counts
    with console.bar(f"{name}, seed {seed}: how to adapt", rounds=len(shots)) as progress:
        result = search(model, setup.held_out, methods, run, shots, progress=progress)
    assert result.plan is not None  # there are several candidates
    return {"plan": result.plan.to_dict(), "trials": result.trials, "search": result.cost}


def _add_basis(
    setup: Setup, name: str, seed: int, base: Path, model: nn.Module, console: Console
) -> None:
    """Gives a base without one the basis of adapters to the seen tasks, and saves it beside it."""
    from foretune.adapters.basis_file import basis_of, save_basis, set_basis
    from foretune.evaluation.adapt_candidates import candidates
    from foretune.training.fit_basis import fit_basis
    from foretune.training.verbs import objective_of

    if basis_of(model) is not None or len(setup.seen) < 2:
        return
    block = setup.recipe.adapt
    objective = objective_of(setup.seen).fit(setup.seen).bind(model)
    kind = "lora" if objective.common_labels() is None else "head"
    plain = candidates([kind], block.rates, block.lora)
    run = setup.recipe.adapt_run(seed=seed)
    run = run.replace(steps=BASIS_STEPS_FACTOR * run.steps)
    with console.bar(f"{name}, seed {seed}: adapting to the seen tasks for a basis"):
        basis = fit_basis(model, setup.seen, plain[(len(plain) - 1) // 2], run)
    set_basis(model, basis)
    on_first_process(lambda: save_basis(basis, base))


def candidates_of(recipe: Recipe) -> list[Any]:
    """The adapt methods among which held-out tasks choose, the simplest first."""
    from foretune.evaluation.adapt_candidates import candidates

    items = [{name: fields} for name, fields in adapt_methods(recipe.adapt)]
    return candidates(items, recipe.adapt.rates, recipe.adapt.lora)


def held_out_of(setup: Setup, record: Any) -> HeldOut | None:
    """The held-out tasks that a retraining is validated by, with a short way to adapt to them."""
    from foretune.evaluation.adapt_candidates import candidates, validation_method
    from foretune.evaluation.held_out import num_draws
    from foretune.recipes.entries import adapt_record
    from foretune.training.held_out import HeldOut

    if setup.held_out is None:
        return None
    block, run = setup.recipe.adapt, setup.recipe.adapt_run()
    if block.searches:
        plain = [(name, fields) for name, fields in adapt_methods(block) if name != "basis"]
        items = [{name: fields} for name, fields in plain or [("head", {}), ("lora", {})]]
        method = validation_method(candidates(items, block.rates, block.lora), record)
        run = run.replace(steps=min(run.steps, VALIDATION_STEPS))
    else:
        method = adapt_record(block)
    finite = [shots for shots in block.row_counts if shots is not None]
    return HeldOut(
        tasks=setup.held_out,
        method=method,
        run=run,
        shots=max(finite, default=None),
        draws=num_draws(len(setup.held_out)) if finite else 1,
    )
