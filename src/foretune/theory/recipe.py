"""`TheoryRecipe`: a recipe with `experiment:`, which generates its data and needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from foretune.errors import UserError, did_you_mean
from foretune.recipes.blocks import Block
from foretune.recipes.console import SILENT, Console
from foretune.recipes.folder import run_folder, write_run_record
from foretune.recipes.messages import user_error
from foretune.recipes.yaml_io import dump_yaml

Count = Field(ge=1)
SCALES: dict[str, dict[str, dict[str, int]]] = {
    "linear": {
        "pocket": {"num_problems": 30, "draws": 10},
        "paper": {"num_problems": 200, "draws": 100},
    },
    "shallow": {
        "pocket": {"seeds": 5, "retrain_epochs": 12_000, "adapt_epochs": 6000},
        "paper": {"seeds": 10, "retrain_epochs": 40_000, "adapt_epochs": 15_000},
    },
}

PANELS = {
    "linear": [
        *("sweep", "curves", "rank-at-test", "singular-values", "rate", "two-tasks", "offsets"),
        *("symmetry", "recovery"),
    ],
    "shallow": ["error"],
}


class TheoryRecipe(Block):
    """The keys that both experiments share.

    Args:
        name: Title of the page, and part of the default folder.
        experiment: "linear" or "shallow".
        scale: "pocket" takes minutes, "paper" is the full protocol; keys that are left out or null
            take the scale's value.
        panels: Tables to make; None for all.
        seeds: Number of random problems, each with its own ground truth.
        noise: Standard deviation of the noise on the outputs.
        vary: Values of each varied key; one key is varied at a time.
        out: Folder of the results; `{name}` stands for the name.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    experiment: Literal["linear", "shallow"]
    scale: Literal["pocket", "paper"] = "pocket"
    panels: list[str] | None = Field(default=None, min_length=1)
    seeds: int = Count
    noise: float = Field(ge=0)
    vary: dict[Any, list[int]]
    out: str = "runs/{name}"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_scale(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        scales = SCALES.get(str(raw.get("experiment")), {"pocket": {}})
        scale = scales.get(str(raw.get("scale")), scales["pocket"])
        return {**scale, **{key: value for key, value in raw.items() if value is not None}}

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.out.replace("{name}", self.name))

    def check(self) -> None:
        """Check what the types do not express.

        Raises:
            UserError: A panel is unknown, or a list has a number below 1.
        """
        names = PANELS[self.experiment]
        for name in self.panels or ():
            if name not in names:
                hint = did_you_mean(name, names)
                raise UserError(f'no panel "{name}"; there are {", ".join(names)}.{hint}')
        _check_positive({f"vary.{key}": values for key, values in self.vary.items()})

    def run(
        self,
        *,
        resume: bool = False,
        overwrite: bool = False,
        console: Console = SILENT,
    ) -> dict[str, Any]:
        """Run the experiment, or with `resume` the panels that are not done yet.

        Args:
            resume: Continue the run in the recipe's folder.
            overwrite: Replace an earlier result in that folder.
            console: Receives progress.

        Returns:
            The content of result.json.

        Raises:
            UserError: The folder is not empty and may be neither continued nor replaced.
        """
        from foretune.theory.experiment import run_panels

        config = self.to_yaml()
        with run_folder(
            self.folder, "experiment", resume=resume, overwrite=overwrite, config=config
        ) as out:
            result = run_panels(self.model_dump(mode="json"), out, console.say)
            write_run_record(out)
        return result

    def tables(self, result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
        """(title, header, rows, finding) of each table of a result."""
        from foretune.theory.experiment import tables

        return [
            (panel.title, cells.header, cells.rows, finding)
            for panel, cells, finding in tables(result)
        ]

    def to_yaml(self) -> str:
        """The recipe as YAML, including defaults; parsing it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


class Case(Block):
    """One kind of random problem.

    Args:
        d: Dimension of inputs and outputs.
        k: Rank of the offsets.
        T: Number of seen tasks.
    """

    d: int = Count
    k: int = Count
    T: int = Count


class LinearRecipe(TheoryRecipe):
    """The linear experiment.

    Args:
        outer_steps: Outer gradient steps of PEFT-ML.
        ranks_for: Values of k in the panel `rank-at-test`.
        shots: Values of n in the panel `rate`.
        draws: Draws of the shots in the panel `rate`.
        num_tasks: Values of T in the panel `offsets`.
        problems: Kinds of random problems in the panel `recovery`.
        num_problems: Random problems of each kind.
    """

    experiment: Literal["linear"]
    seeds: int = Field(default=5, ge=1)
    noise: float = Field(default=0.01, ge=0)
    outer_steps: int = Field(default=3000, ge=1)
    vary: dict[Literal["d", "T", "N", "n", "k"], list[int]] = Field(min_length=1)
    ranks_for: list[int] = Field(min_length=1)
    shots: list[int] = Field(min_length=1)
    draws: int = Count
    num_tasks: list[int] = Field(min_length=1)
    problems: list[Case] = Field(min_length=1)
    num_problems: int = Count

    def check(self) -> None:
        """Check what the types do not express.

        Raises:
            UserError: As in `TheoryRecipe.check`, or there are not more examples than dimensions.
        """
        super().check()
        _check_positive({"ranks_for": self.ranks_for, "num_tasks": self.num_tasks})
        largest_d = max([10, *self.vary.get("d", [])])
        counts = [*self.shots, *self.vary.get("n", []), *self.vary.get("N", [])]
        if min(counts) <= largest_d:
            raise UserError(
                f"shots, vary.n and vary.N must be above d, which goes up to {largest_d}; "
                f"got {min(counts)}"
            )


class ShallowRecipe(TheoryRecipe):
    """The shallow-network experiment.

    Args:
        retrain_epochs: Full-batch epochs of retraining.
        adapt_epochs: Full-batch epochs of fine-tuning.
    """

    experiment: Literal["shallow"]
    noise: float = Field(default=0.1, ge=0)
    vary: dict[Literal["d", "T"], list[int]] = Field(min_length=1)
    retrain_epochs: int = Count
    adapt_epochs: int = Count


KINDS: dict[str, type[TheoryRecipe]] = {"linear": LinearRecipe, "shallow": ShallowRecipe}


def parse_experiment(
    raw: dict[str, Any], where: str, overridden: set[str] | None = None
) -> TheoryRecipe:
    """Validate the mapping of a recipe with `experiment:`.

    Args:
        raw: The parsed YAML.
        where: Name of the recipe in error messages.
        overridden: Dotted keys that came from the command line.

    Raises:
        UserError: The recipe is invalid.
    """
    kind = KINDS.get(str(raw.get("experiment")))
    if kind is None:
        hint = did_you_mean(str(raw.get("experiment")), KINDS)
        raise UserError(f'"experiment" in {where} must be {" or ".join(KINDS)}.{hint}')
    try:
        recipe = kind.model_validate(raw)
    except ValidationError as error:

        def keys_at(path: Sequence[str]) -> list[str]:
            if path[:1] == ("vary",):
                return ["d", "T"] if kind is ShallowRecipe else ["d", "T", "N", "n", "k"]
            return list((Case if path[:1] == ("problems",) else kind).model_fields)

        one_line = user_error(error.errors(), raw, where, overridden or set(), keys_at)
        raise one_line from None
    try:
        recipe.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def _check_positive(lists: dict[Any, list[int]]) -> None:
    """Check that each list has numbers, all at least 1.

    Raises:
        UserError: A list does not.
    """
    for key, values in lists.items():
        if not values or min(values) < 1:
            raise UserError(f"{key} must hold numbers of at least 1, got {values}")
