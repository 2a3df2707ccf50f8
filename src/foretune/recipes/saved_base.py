"""A base that was saved in a folder, and how it is named beside others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError
from foretune.files import (
    ADAPTER_CONFIG_FILE,
    BASE_FILE,
    CONFIG_FILE,
    MODULE_FILE,
    PIPELINE_FILE,
)
from foretune.formats import damage_named
from foretune.models.base_record import read_base_record
from foretune.models.named import folder_of, is_named, short_name
from foretune.recipes.objective_blocks import OBJECTIVES
from foretune.recipes.setup import head_of, with_tokenizer
from foretune.tasks.file_formats import one_line
from foretune.tasks.objectives import make_objective

if TYPE_CHECKING:
    from foretune.training.adapt_plan import AdaptPlan

MODEL_FILES = (CONFIG_FILE, MODULE_FILE, PIPELINE_FILE, BASE_FILE)  # one of which a base has


@dataclass(frozen=True)
class SavedBase:
    """A base on disk.

    Args:
        name: Its name in tables.
        folder: A plain model folder.
        metadata: The content of its `foretune.json` (method, objective); empty without that file.
    """

    name: str
    folder: Path
    metadata: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """The kind of objective that it was retrained with, None if unknown."""
        return self.metadata.get("objective", {}).get("kind")

    @property
    def plan(self) -> AdaptPlan | None:
        """How held-out tasks chose to adapt it; None if they did not.

        Raises:
            UserError: The record is damaged.
        """
        record = self.metadata.get("adapting")
        if record is None:
            return None
        from foretune.training.adapt_plan import AdaptPlan

        with damage_named(self.folder / BASE_FILE):
            return AdaptPlan.from_dict(record)

    def objective(self, kind: str | None, tokenizer: Any) -> Any:
        """Its own objective, or one of another `kind` with default fields; not yet fitted.

        Raises:
            UserError: `kind` is None and the folder does not name its objective.
        """
        if kind is not None and kind != self.kind:
            return make_objective(kind, tokenizer)
        if self.kind is None:
            raise UserError(
                f"{self.folder} does not name its objective (no {BASE_FILE}): add --objective with "
                f"one of {', '.join(OBJECTIVES)}"
            )
        try:
            objective = make_objective(tokenizer=None, **self.metadata["objective"])
        except (UserError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.folder / BASE_FILE} is damaged: objective: {one_line(error)}"
            ) from error
        return with_tokenizer(objective, tokenizer)

    def load(self, objective: Any = None, tasks: Any = None) -> tuple[Any, Any]:
        """(model, tokenizer), read from the folder; the tokenizer may be None.

        Args:
            objective: The fitted objective of the tasks; a classification gives an encoder without
                a head a fresh one. None loads the model as it was saved.
            tasks: The tasks, beside an objective.
        """
        from foretune.models.loading import has_classifier, load_base, load_model

        if objective is None or objective.kind != "classification" or has_classifier(self.folder):
            return load_base(self.folder)
        return load_model(
            self.folder, head=head_of(objective, tasks), num_labels=objective.num_outputs()
        )


def find_base(folder: Path) -> SavedBase:
    """The base in a folder: the folder itself, or its `base/`.

    Raises:
        UserError: There is no such folder, or it is not a base.
    """
    if not folder.is_dir() and is_named(folder):
        return SavedBase(short_name(folder), folder_of(folder), {})
    if not folder.is_dir():
        raise UserError(f"no base in {folder}: no such folder")
    place = folder / "base" if (folder / "base").is_dir() else folder
    if not any((place / file).is_file() for file in MODEL_FILES):
        raise UserError(_no_base(place))
    name = folder.resolve().parent.name if folder.name == "base" else folder.resolve().name
    return SavedBase(name, place, dict(read_base_record(place) or {}))


def _no_base(folder: Path) -> str:
    """Why a folder is not a base, and which folder may have been meant."""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return f"{folder} is an adapter: give the base that it belongs to"
    inside = sorted(path.parent for path in folder.glob(f"**/base/{BASE_FILE}"))
    hint = f"; did you mean {inside[0]}?" if inside else ""
    return f"{folder} is not a base: it has neither {CONFIG_FILE} nor {BASE_FILE}{hint}"


def named(bases: Sequence[SavedBase]) -> dict[str, SavedBase]:
    """The bases by name; if names are equal, by the shortest ends of their paths that differ.

    Raises:
        UserError: A folder is given twice.
    """
    paths = [base.folder.resolve().parts for base in bases]
    for path, base in zip(paths, bases, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{base.folder} is given twice")
    names = [base.name for base in bases]
    if len(set(names)) < len(names):
        # bases/peft-ml/seed-0/base and bases/none/seed-0/base differ in the last three parts.
        depth = next(d for d in itertools.count(1) if len({p[-d:] for p in paths}) == len(paths))
        names = ["/".join(p for p in path[-depth:] if p != "base") for path in paths]
    return {
        name: dataclasses.replace(base, name=name) for name, base in zip(names, bases, strict=True)
    }
