"""`Recipe`: the configuration of a run, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, ValidationError

from foretune import methods
from foretune.entry_points import entry_point
from foretune.errors import UserError, did_you_mean
from foretune.files import check_file_name, same_on_disk
from foretune.models.hub_card import hub_id
from foretune.models.named import WHEELS
from foretune.recipes.blocks import (
    AdaptBlock,
    Block,
    ForgettingBlock,
    ModelBlock,
    RetrainBlock,
    SpectrumBlock,
    TasksBlock,
)
from foretune.recipes.console import Console
from foretune.recipes.entries import (
    MethodEntry,
    adapt_methods,
    class_of,
    parse_entry,
    run_of,
    takes_rate,
)
from foretune.recipes.messages import user_error
from foretune.recipes.objective_blocks import OBJECTIVES, ObjectiveBlock
from foretune.recipes.overrides import apply_overrides, override_keys
from foretune.recipes.trackers import Tracker
from foretune.recipes.yaml_io import dump_yaml, parse_recipe_yaml
from foretune.run import Run, check_int
from foretune.tasks.sources import Source

B = TypeVar("B", bound=Block)

# A wing's recipes lie in its package; a top-level key of theirs says who parses them.
PACKAGES = (
    "foretune.recipes",
    "foretune.theory",
)
AFTER_A_RUN: dict[str, str] = {
    "answers": "foretune.decoding.answers:answer_unseen",
}
"""Key of a recipe → what does its work after a run, from the recipe and the comparison."""
WRITES_TEXT: dict[str, str] = {
    "causal-lm": "foretune.decoding.generation:generate_texts",
}
"""Kind of objective → what writes the answers to prompts."""
ENCODES_PROMPTS: dict[str, str] = {
    "causal-lm": "foretune.decoding.generation:encode",
}
"""Kind of objective → what makes inputs of prompts."""
EXPERIMENTS = {
    "experiment": "foretune.theory.recipe:parse_experiment",
}


class Experiment(Protocol):
    """A recipe that makes its own data and needs no model; it can only be run."""

    name: str

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        ...

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """A copy with other values of some fields."""
        ...

    def run(self, *, resume: bool, overwrite: bool, console: Console) -> dict[str, Any]:
        """Runs the experiment, or what is left of it."""
        ...

    def tables(self, result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
        """(title, header, rows, finding) of each table of a result."""
        ...


class Recipe(Block):
    """The configuration of a run. See the packaged recipes and `foretune init` for examples.

    Args:
        name: Title of the report, and name of the default folder.
        data: How to get the data, for a recipe that does not set `tasks.source`.
        answers: Questions of unseen tasks that the model before retraining and an adapter answer
            at the end, side by side; for conversations (`messages`).
        seeds: Number of repeats of retraining, adapting and the draw of shots.
        trackers: What follows the figures of a run: tensorboard, trackio, wandb or mlflow.
        out: Output folder; `{name}` is replaced by the name.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    data: str | None = None
    model: ModelBlock
    tasks: TasksBlock
    objective: Annotated[ObjectiveBlock, Field(discriminator="kind")]
    retrain: RetrainBlock
    adapt: AdaptBlock = AdaptBlock()
    spectrum: SpectrumBlock | None = None
    forgetting: ForgettingBlock | None = None
    answers: int = Field(default=0, ge=0)
    seeds: int = Field(default=1, ge=1)
    trackers: list[Tracker] = Field(default=[])
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None
    out: str = "runs/{name}"

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out.replace("{name}", self.name))

    @property
    def reads(self) -> list[str]:
        """The files and folders, or names on the hub, that the recipe reads."""
        source = self.source()
        texts = [source.source, source.unseen, self.model.name, self.model.file]
        if self.forgetting is not None:
            texts += [self.forgetting.source, *self.forgetting.benchmarks]
        return [text for text in texts if isinstance(text, str)]

    @property
    def entries(self) -> list[MethodEntry]:
        """The items of `retrain.methods`.

        Raises:
            UserError: An item is not a name, or a name with its fields.
        """
        entries = [parse_entry(item, self.retrain.rates) for item in self.retrain.methods]
        return [self._choosing(e, entries) if e.method == "auto" else e for e in entries]

    @property
    def base_model(self) -> str | None:
        """Where the pretrained model is on the Hub; None where it came from elsewhere."""
        name = self.model.name
        return WHEELS[name].hub_id if name in WHEELS else hub_id(name)

    @property
    def datasets(self) -> list[str]:
        """The data sets of the Hub that the tasks are from."""
        source = self.source()
        texts = [text for text in (source.source, source.unseen) if isinstance(text, str)]
        names = (hub_id(text.partition(":")[0]) for text in texts if not Path(text).exists())
        return [name for name in dict.fromkeys(names) if name is not None]

    def with_method(self, name: str) -> MethodEntry:
        """An entry for a method that the recipe does not list, with the method's defaults."""
        entry = MethodEntry(name=name, method=name, fields={}, rates=self.retrain.rates)
        return self._choosing(entry, self.entries) if name == "auto" else entry

    def _choosing(self, auto: MethodEntry, entries: list[MethodEntry]) -> MethodEntry:
        """`auto` with the adapt settings of the recipe and, by default, its other methods.

        A candidate is repeated for each of its trials.

        Raises:
            UserError: The candidates are not a list of methods.
        """
        items = auto.fields.get("candidates")
        if items is not None and not isinstance(items, list):
            raise UserError(f"auto: candidates must be a list like retrain.methods, got {items!r}")
        pool = [e for e in entries if e.method != "auto"]
        if items is not None:
            pool = [parse_entry(item, self.retrain.rates) for item in items]
        candidates = []
        for entry in pool:
            class_of(entry.method)  # raises for an unknown one
            for settings in entry.trials:
                fields = entry.fields_with(settings)
                candidates.append({"name": entry.method, "as": entry.name_with(settings), **fields})
        methods = adapt_methods(self.adapt)
        fixed = {"name": methods[0][0], **methods[0][1]}
        adapting: dict[str, Any] = {
            "adapt": [{name: of} for name, of in methods] if self.adapt.searches else fixed,
            "adapt_run": {k: v for k, v in self.adapt_run().to_dict().items() if k != "out"},
            "adapt_rates": self.adapt.rates,
            "shots": self.adapt.row_counts,
            "group_column": self.tasks.model_dump()["group_column"],
        }
        chosen = {**adapting, **auto.fields, "candidates": candidates}
        return dataclasses.replace(auto, fields=chosen, rates=[])

    @property
    def holds_out(self) -> bool:
        """Whether seen tasks are held out to choose retrainings, their ends or how to adapt."""
        searched = any(len(entry.trials) > 1 for entry in self.entries)
        return searched or self.adapt.searches or self.retrain_run().patience is not None

    def source(self, repeat: int = 0) -> Source:
        """The `tasks:` block as a `Source`, for `load_tasks` in this repeat."""
        turn = repeat if self.tasks.rotate else None
        return Source(**self.tasks.model_dump(exclude={"rotate"}), turn=turn)

    def objective_fields(self) -> dict[str, Any]:
        """The `objective:` block without its kind."""
        return self.objective.model_dump(exclude={"kind"})

    def retrain_run(self, **changes: Any) -> Run:
        """The `retrain:` block as a `Run`."""
        return run_of(self.retrain, precision=self.precision, device=self.device, **changes)

    def adapt_run(self, **changes: Any) -> Run:
        """The `adapt:` block as a `Run`."""
        return run_of(self.adapt, precision=self.precision, device=self.device, **changes)

    def to_yaml(self) -> str:
        """The recipe with all defaults written out; reading it gives the recipe back."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name_or_path: Name of a packaged recipe, or path of a YAML file.
        overrides: `dotted.key=value` with YAML values.

    Raises:
        UserError: There is no such recipe, or it is invalid.

    >>> load_recipe("quickstart", ["seeds=2"]).seeds
    2
    """
    text, where = read_recipe(name_or_path)
    raw = parse_recipe_yaml(text, where)
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a recipe: it must have keys such as model, tasks, retrain")
    if EXPERIMENTS.keys() & raw:
        raise UserError(
            f"{where} is an experiment recipe; it can only be run: foretune run {name_or_path}"
        )
    return parse_recipe(apply_overrides(raw, overrides), where, override_keys(overrides))


def load_any(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Experiment:
    """Reads and checks a recipe, or the recipe of an experiment.

    Args:
        name_or_path: Name of a packaged recipe, or path of a YAML file.
        overrides: `dotted.key=value` with YAML values.

    Raises:
        UserError: There is no such recipe, or it is invalid.

    >>> load_any("quickstart", ["seeds=2"]).seeds
    2
    """
    text, where = read_recipe(name_or_path)
    raw = parse_recipe_yaml(text, where)
    for key, parser in EXPERIMENTS.items():
        if isinstance(raw, dict) and key in raw:
            changed = apply_overrides(raw, overrides)
            experiment: Experiment = entry_point(parser)(changed, where, override_keys(overrides))
            return experiment
    return load_recipe(name_or_path, overrides)


def parse_recipe(raw: dict[str, Any], where: str, overridden: set[str] | None = None) -> Recipe:
    """The recipe in a mapping, checked.

    Args:
        raw: The mapping.
        where: Name of the recipe in error messages.
        overridden: Dotted keys that were set on the command line.

    Raises:
        UserError: A key or a value is invalid.
    """
    tasks = raw.get("tasks")
    if raw.get("data") and (tasks is None or (isinstance(tasks, dict) and "source" not in tasks)):
        raise UserError(f"{where} needs tasks.source=PATH. {' '.join(str(raw['data']).split())}")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        mistake = user_error(error.errors(), raw, where, overridden or set(), _key_lookup(raw))
        raise mistake from None
    _check(recipe, where)
    return recipe


def parse_block(block: type[B], overrides: Sequence[str]) -> B:
    """One block from `key=value` overrides alone.

    Raises:
        UserError: A key or a value is invalid.

    >>> parse_block(AdaptBlock, ["steps=10", "lora.r=4"]).steps
    10
    """
    raw = apply_overrides({}, overrides)
    try:
        return block.model_validate(raw)
    except ValidationError as error:
        keys = list(block.model_fields)
        mistake = user_error(
            error.errors(), raw, "the settings", override_keys(overrides), lambda path: keys
        )
        raise mistake from None


def packaged_recipes() -> dict[str, str]:
    """Name → text of the recipes that come with foretune."""
    files = [file for package in PACKAGES for file in resources.files(package).iterdir()]
    recipes = sorted((f for f in files if f.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in recipes}


def read_recipe(name_or_path: str | Path) -> tuple[str, str]:
    """(text of a recipe, its name in error messages).

    Raises:
        UserError: There is no such recipe.
    """
    path, packaged = Path(name_or_path), packaged_recipes()
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)], f"recipe {name_or_path}"
    if path.is_file():
        try:
            return path.read_text("utf-8"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a recipe: it is not a text file") from None
    hint = did_you_mean(str(name_or_path), packaged) or f" Packaged: {', '.join(packaged)}."
    raise UserError(f'no recipe "{name_or_path}": neither a file nor a packaged recipe.{hint}')


def _key_lookup(raw: dict[str, Any]) -> Callable[[Sequence[str]], list[str]]:
    """A function from a path of keys to the valid keys of the block there."""
    blocks: dict[str, type[Block]] = {
        "model": ModelBlock,
        "tasks": TasksBlock,
        "retrain": RetrainBlock,
        "adapt": AdaptBlock,
        "spectrum": SpectrumBlock,
        "forgetting": ForgettingBlock,
    }
    objective = raw.get("objective")
    kind = objective.get("kind") if isinstance(objective, dict) else None
    if isinstance(kind, str) and kind in OBJECTIVES:
        blocks["objective"] = OBJECTIVES[kind]

    def valid_keys(path: Sequence[str]) -> list[str]:
        block = blocks.get(path[0]) if path else Recipe
        return list(block.model_fields) if block else []

    return valid_keys


def _check(recipe: Recipe, where: str) -> None:
    """Checks that need the methods, `Run` and `Source`: names, fields and ranges of values.

    Raises:
        UserError: A check fails.
    """
    checks: dict[str, Callable[[], object]] = {
        "": lambda: _check_methods(recipe),
        "answers": lambda: _check_answers(recipe),
        "model.": lambda: recipe.model.check_serves(recipe.objective),
        "retrain.": lambda: check_int("steps", recipe.retrain_run().steps, 1),
        "adapt.": recipe.adapt_run,
        "tasks.": recipe.source,
    }
    for prefix, check in checks.items():
        try:
            check()
        except UserError as error:
            raise UserError(f"{where}: {prefix}{error}") from None


def _check_answers(recipe: Recipe) -> None:
    if recipe.answers and (recipe.objective.kind != "causal-lm" or recipe.model.name is None):
        raise UserError(
            f"={recipe.answers} has a chat model answer, which takes objective.kind causal-lm and "
            f"model.name; got the objective {recipe.objective.kind}: set answers to 0"
        )


def _check_methods(recipe: Recipe) -> None:
    names: set[str] = set()
    for entry in recipe.entries:
        _check_verb(entry.method, "retrain", "retrain.methods")
        check_file_name("retrain.methods:", entry.name)
        if same_on_disk(entry.name) in names:
            raise UserError(
                f'retrain.methods names "{entry.name}" twice: rename one of them with '
                f"{{{entry.method}: {{as: another-name}}}} (case does not count)"
            )
        names.add(same_on_disk(entry.name))
        if entry.search and entry.method == "auto":
            raise UserError(f"{entry.name}.search: auto searches by itself; remove search")
        for settings in entry.trials:
            entry.record(settings)
    _check_adapt_methods(recipe.adapt)


def _check_adapt_methods(block: AdaptBlock) -> None:
    names: set[str] = set()
    for name, fields in adapt_methods(block):
        _check_verb(name, "adapt", "adapt.methods" if block.methods else "adapt.method")
        label = f"{name} {fields}"
        if label in names:
            raise UserError(f'adapt.methods names "{name}" twice with the same fields: remove one')
        names.add(label)
        # The values to try are checked when the candidates are made, which needs numpy and torch.
        fields = {key: value for key, value in fields.items() if key != "search"}
        for rate in block.rates if takes_rate(name) else ():
            methods.make(name, **{"learning_rate": rate, **fields})
        methods.make(name, **fields)


def _check_verb(method: str, verb: str, key: str) -> None:
    try:
        methods.method_class_of(method, verb)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
