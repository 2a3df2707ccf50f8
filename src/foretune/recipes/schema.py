"""`Recipe`: all that a run is told, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from foretune import methods
from foretune.errors import UserError, did_you_mean
from foretune.methods import METHODS
from foretune.recipes.blocks import (
    AdaptBlock,
    Block,
    ModelBlock,
    RetrainBlock,
    SpectrumBlock,
    TasksBlock,
)
from foretune.recipes.messages import user_error
from foretune.recipes.objective_blocks import OBJECTIVES, ObjectiveBlock
from foretune.recipes.overrides import apply_overrides, override_keys
from foretune.recipes.yaml_io import dump_yaml, parse_yaml
from foretune.run import Run, check_list
from foretune.tasks.sources import Source

B = TypeVar("B", bound=Block)


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One item of `retrain.methods`.

    Args:
        name: The name that is shown, unique within the recipe.
        method: The registered method.
        fields: What the recipe sets of the method's fields.
        rates: Learning rates to try; empty: the method's own default.
    """

    name: str
    method: str
    fields: dict[str, Any]
    rates: list[float]

    def record(self, learning_rate: float | None = None) -> Any:
        """The method's record, at this learning rate."""
        fields = dict(self.fields)
        if learning_rate is not None:
            fields["learning_rate"] = learning_rate
        return methods.make(self.method, **fields)


class Recipe(Block):
    """All that a run is told. See the packaged recipes and `foretune init` for examples.

    Args:
        name: Title of the report, and the default folder.
        data: Where the data is to be had, for a recipe that leaves `tasks.source` open.
        seeds: Whole repeats: retraining and the draw of shots.
        out: Folder of the results; `{name}` stands for the name.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    data: str | None = None
    model: ModelBlock
    tasks: TasksBlock
    objective: Annotated[ObjectiveBlock, Field(discriminator="kind")]
    retrain: RetrainBlock
    adapt: AdaptBlock = AdaptBlock()
    spectrum: SpectrumBlock | None = None
    seeds: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None
    out: str = "runs/{name}"

    @property
    def folder(self) -> Path:
        return Path(self.out.replace("{name}", self.name))

    @property
    def entries(self) -> list[MethodEntry]:
        """The items of `retrain.methods`."""
        found = [_entry(item, self.retrain.rates) for item in self.retrain.methods]
        return [self._choosing(e, found) if e.method == "auto" else e for e in found]

    def with_method(self, name: str) -> MethodEntry:
        """An entry for a method that the recipe does not list, with the method's own defaults."""
        entry = MethodEntry(name=name, method=name, fields={}, rates=self.retrain.rates)
        return self._choosing(entry, self.entries) if name == "auto" else entry

    def _choosing(self, auto: MethodEntry, entries: list[MethodEntry]) -> MethodEntry:
        """`auto` adapts as the recipe does, and chooses among its other methods if told no others.

        A candidate for which several rates are searched stands there once for each.
        """
        given = auto.fields.get("candidates")
        if given is not None and not isinstance(given, list):
            raise UserError(f"auto: candidates is a list as retrain.methods is, got {given!r}")
        among = [e for e in entries if e.method != "auto"]
        if given is not None:
            among = [_entry(item, self.retrain.rates) for item in given]
        candidates = []
        for entry in among:
            fields = {"name": entry.method, "as": entry.name, **entry.fields}
            rates = entry.rates if entry.method in METHODS and takes_rate(entry.method) else []
            for rate in rates:
                name = entry.name if len(rates) == 1 else f"{entry.name} {rate:g}"
                candidates.append({**fields, "as": name, "learning_rate": rate})
            if not rates:
                candidates.append(fields)
        adapting: dict[str, Any] = {
            "adapt": {"name": self.adapt.method, **_fields(self.adapt)},
            "adapt_run": {k: v for k, v in self.adapt_run().to_dict().items() if k != "out"},
            "adapt_rates": self.adapt.rates,
            "shots": self.adapt.row_counts,
            "group_column": self.tasks.group_column,
        }
        chosen = {**adapting, **auto.fields, "candidates": candidates}
        return dataclasses.replace(auto, fields=chosen, rates=[])

    @property
    def searches(self) -> bool:
        """Whether a rate of a retraining is searched."""
        return any(len(entry.rates) > 1 and takes_rate(entry.method) for entry in self.entries)

    def source(self, repeat: int = 0) -> Source:
        """The `tasks:` block as what `load_tasks` takes in that repeat."""
        turn = repeat if self.tasks.rotate else None
        return Source(**self.tasks.model_dump(exclude={"rotate"}), turn=turn)

    def objective_fields(self) -> dict[str, Any]:
        """The `objective:` block without its kind."""
        return self.objective.model_dump(exclude={"kind"})

    def adapt_record(self, learning_rate: float | None = None) -> Any:
        """The adapting method's record."""
        return adapt_record(self.adapt, learning_rate)

    def retrain_run(self, **changes: Any) -> Run:
        """The `retrain:` block as a `Run`."""
        return run_of(self.retrain, precision=self.precision, device=self.device, **changes)

    def adapt_run(self, **changes: Any) -> Run:
        """The `adapt:` block as a `Run`."""
        return run_of(self.adapt, precision=self.precision, device=self.device, **changes)

    def to_yaml(self) -> str:
        """The recipe with every default written out; reading it gives the recipe back."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        name_or_path: A packaged recipe's name, or a YAML file.
        overrides: `dotted.key=value`, values in YAML.

    Raises:
        UserError: There is no such recipe, or something in it is wrong.

    >>> load_recipe("quickstart", ["seeds=2"]).seeds
    2
    """
    text, where = read_recipe(name_or_path)
    raw = parse_yaml(text, where)
    if not isinstance(raw, dict):
        raise UserError(f"{where} is no recipe: it must hold keys such as model, tasks, retrain")
    if "experiment" in raw:
        raise UserError(
            f"{where} is an experiment, of which there is nothing to plan, retrain or adapt: "
            f"foretune run {name_or_path}"
        )
    return parse_recipe(apply_overrides(raw, overrides), where, override_keys(overrides))


def parse_recipe(raw: dict[str, Any], where: str, overridden: set[str] | None = None) -> Recipe:
    """Checks the mapping that a recipe holds.

    Args:
        raw: The mapping.
        where: What to call the recipe in an error.
        overridden: Dotted keys that came from the command line.
    """
    tasks = raw.get("tasks")
    if raw.get("data") and (tasks is None or (isinstance(tasks, dict) and "source" not in tasks)):
        raise UserError(f"{where} needs tasks.source=PATH. {' '.join(str(raw['data']).split())}")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        known = _known_keys(raw)
        raise user_error(error.errors(), raw, where, overridden or set(), known) from None
    _check(recipe, where)
    return recipe


def parse_block(block: type[B], overrides: Sequence[str]) -> B:
    """One block from `key=value` on the command line alone.

    >>> parse_block(AdaptBlock, ["steps=10", "lora.r=4"]).steps
    10
    """
    raw = apply_overrides({}, overrides)
    try:
        return block.model_validate(raw)
    except ValidationError as error:
        keys = list(block.model_fields)
        raise user_error(
            error.errors(), raw, "the settings", override_keys(overrides), lambda path: keys
        ) from None


def packaged_recipes() -> dict[str, str]:
    """Name → text of the recipes that come with foretune."""
    folder = resources.files("foretune.recipes")
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in sorted(files, key=str)}


def read_recipe(name_or_path: str | Path) -> tuple[str, str]:
    """(text, what to call it in an error) of a recipe."""
    path, packaged = Path(name_or_path), packaged_recipes()
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)], f"recipe {name_or_path}"
    if path.is_file():
        try:
            return path.read_text("utf-8"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"{path} is no recipe: it is not a text file") from None
    hint = did_you_mean(str(name_or_path), packaged) or f" Packaged: {', '.join(packaged)}."
    raise UserError(f'no recipe "{name_or_path}": no such file, and no such packaged recipe.{hint}')


def _known_keys(raw: dict[str, Any]) -> Any:
    blocks: dict[str, type[Block]] = {
        "model": ModelBlock,
        "tasks": TasksBlock,
        "retrain": RetrainBlock,
        "adapt": AdaptBlock,
        "spectrum": SpectrumBlock,
    }
    objective = raw.get("objective")
    if isinstance(objective, dict) and objective.get("kind") in OBJECTIVES:
        blocks["objective"] = OBJECTIVES[objective["kind"]]

    def known(path: Sequence[str]) -> list[str]:
        block = blocks.get(path[0]) if path else Recipe
        return list(block.model_fields) if block else []

    return known


def _entry(item: Any, rates: list[float]) -> MethodEntry:
    if isinstance(item, str):
        return MethodEntry(name=item, method=item, fields={}, rates=rates)
    fields = next(iter(item.values()), None) if isinstance(item, dict) else None
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(fields, (dict, type(None))):
        raise UserError(
            "an item of retrain.methods is a name, or one name with its fields "
            f"({{peft-ml: {{penalty: 0.1}}}}); got {item!r}"
        )
    [method] = item
    fields = dict(fields or {})
    name = fields.pop("as", method)
    own = check_list(f"{name}.learning_rates", fields.pop("learning_rates", None) or [])
    if "learning_rate" in fields:
        own = [fields.pop("learning_rate")]
    return MethodEntry(name=str(name), method=method, fields=fields, rates=own or rates)


def _check(recipe: Recipe, where: str) -> None:
    """What needs the methods' records: names, fields, values."""
    checks: dict[str, Callable[[], object]] = {
        "": lambda: _check_methods(recipe),
        "retrain.": recipe.retrain_run,
        "adapt.": recipe.adapt_run,
        "tasks.": recipe.source,
    }
    for prefix, check in checks.items():
        try:
            check()
        except UserError as error:
            raise UserError(f"{where}: {prefix}{error}") from None


def _check_methods(recipe: Recipe) -> None:
    names: set[str] = set()
    for entry in recipe.entries:
        _check_verb(entry.method, "retrain", "retrain.methods")
        if entry.name in names:
            raise UserError(
                f'retrain.methods names "{entry.name}" twice: give one another name, '
                f"as {{{entry.method}: {{as: another}}}}"
            )
        names.add(entry.name)
        for rate in entry.rates if takes_rate(entry.method) else ():
            entry.record(rate)
        entry.record()
    _check_verb(recipe.adapt.method, "adapt", "adapt.method")
    for rate in recipe.adapt.rates:
        recipe.adapt_record(rate)
    recipe.adapt_record()


def takes_rate(method: str) -> bool:
    """Whether the method has a learning rate at all ("none" has not)."""
    return "learning_rate" in class_of(method).__dataclass_fields__


def class_of(method: str) -> Any:
    """The record class of a method, with its class attributes."""
    return methods.method_class(method)


def _check_verb(method: str, verb: str, key: str) -> None:
    found = class_of(method).verb
    if found != verb:
        right = [n for n in methods.METHODS if class_of(n).verb == verb]
        raise UserError(
            f'{key} wants a method to {verb} with ({", ".join(right)}); "{method}" is to {found}'
        )


def adapt_record(block: AdaptBlock, learning_rate: float | None = None) -> Any:
    """The adapting method's record; without a learning rate, at its own default."""
    fields = _fields(block)
    if learning_rate is not None:
        fields["learning_rate"] = learning_rate
    return methods.make(block.method, **fields)


def _fields(block: AdaptBlock) -> dict[str, Any]:
    lora = {} if block.lora is None else {"lora": block.lora}
    return {**lora, **block.fields}


def run_of(block: RetrainBlock | AdaptBlock, **more: Any) -> Run:
    """A block as a `Run`.

    Args:
        block: The block.
        **more: Other fields of `Run`.
    """
    names = set(Run.__dataclass_fields__)
    return Run(**{**block.model_dump(include=names), **more})
