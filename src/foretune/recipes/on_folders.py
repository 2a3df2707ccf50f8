"""`foretune adapt` and `foretune compare` for bases that were saved in folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

import foretune
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, BASE_FILE, CONFIG_FILE, MODULE_FILE, RUN_FILE
from foretune.formats import RUN, read_json
from foretune.models.base_record import read_base_record
from foretune.models.loading_code import class_name, loading_code
from foretune.recipes.blocks import AdaptBlock, TasksBlock
from foretune.recipes.console import SILENT, Console
from foretune.recipes.folder import run_folder
from foretune.recipes.merge import merge_repeats
from foretune.recipes.objective_blocks import OBJECTIVES
from foretune.recipes.overrides import override_keys
from foretune.recipes.runner import finish
from foretune.recipes.schema import adapt_record, parse_block, run_of
from foretune.recipes.setup import check_sides, check_tokenizer, head_of, with_tokenizer
from foretune.tasks.file_formats import one_line
from foretune.tasks.objectives import make_objective
from foretune.tasks.rows import CLASSES
from foretune.tasks.sources import Source, load_tasks


class _RunRecord(TypedDict, total=False):
    cost: dict[str, Any] | None


# Keys of a recipe's `adapt:` block that mean nothing where one set of bases is adapted.
RECIPE_ONLY = {
    "shots": "use --shots",
    "draws": "only `compare` draws its shots several times, with --seeds",
    "search_tasks": "learning rates are searched by `foretune run` only",
}


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
    if not folder.is_dir() and str(folder) == "minilm":
        from foretune.models.loading import locate

        return SavedBase("minilm", Path(locate("minilm")), {})
    if not folder.is_dir():
        raise UserError(f"no base in {folder}: no such folder")
    place = folder / "base" if (folder / "base").is_dir() else folder
    if not any((place / file).is_file() for file in (CONFIG_FILE, MODULE_FILE, BASE_FILE)):
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


def adapt_folder(
    base: Path,
    tasks: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    objective: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts a base to every task of a source and saves one adapter folder per task in `out`.

    Args:
        base: Folder of the base.
        tasks: A path or a dataset, as `tasks.source` in a recipe.
        out: Output folder.
        changes: `key=value` for keys of the `adapt:` block of a recipe, `tasks.key=value` for keys
            of its `tasks:` block.
        objective: Kind of objective; None for that of the base.
        shots: Training examples per task (per class for classification); None for all.
        seed: Random seed of the draw of shots and of the fresh adapters.
        resume: Keep what is in `out`.
        overwrite: Replace an earlier result in `out`.
        console: Receives the progress.

    Returns:
        Scores and training examples per task, the mean score, the cost, and Python code that loads
        the first adapter.

    Raises:
        UserError: The folder is not a base, or the data, a setting or `out` is not acceptable.
    """
    from foretune.evaluation.wording import rows_drawn
    from foretune.training.shots import draw_shots

    block, source = settings(tasks, changes)
    method = adapt_record(block)
    run = run_of(block, seed=seed)
    saved = find_base(base)
    kind = objective or saved.kind
    if kind is None:
        saved.objective(None, None)  # raises
    reads: list[Path | str] = [base, saved.folder, *read_by(source)]
    with run_folder(out, "adapt", resume=resume, overwrite=overwrite, reads=reads) as folder:
        collection, _ = load_tasks(source, str(kind))
        fitted = saved.objective(objective, None).fit(collection)
        model, tokenizer = saved.load(fitted, collection)
        check_tokenizer(saved.folder, tokenizer, fitted, collection)
        fitted = with_tokenizer(fitted, tokenizer)
        collection = collection.with_objective(fitted)
        check_sides(model, collection, None, console)
        with console.bar(f"adapting {saved.folder} to {len(collection)} tasks") as progress:
            adapted = foretune.adapt(
                model, collection, method, run.replace(out=folder), shots=shots, progress=progress
            )
    scores = {task: score for (task, _), score in adapted.scores.items()}
    drawn = draw_shots(collection, fitted.kind, shots, 1, seed)
    num_train = {slot.task: len(slot.train) for slot in drawn}
    unit = "rows per class" if fitted.kind in CLASSES else "rows"
    return {
        "out": str(out),
        "metric": fitted.metric,
        "scores": scores,
        "num_train": num_train,
        "drawn": rows_drawn({shots: num_train.values()}, unit) if shots else [],
        "mean": sum(scores.values()) / len(scores) if scores else None,
        "num_labels": adapted.num_labels,
        "code": loading_code(
            class_name(model),
            str(saved.folder),
            str(out / adapted.folders[collection.names[0], 0]),
            adapted.num_labels,
        ),
        "cost": adapted.cost,
    }


def compare_folders(
    folders: Sequence[Path],
    tasks: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    shots: Sequence[int | None] = (1, 5, 20),
    draws: int = 1,
    objective: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts several bases to the same unseen tasks and compares them.

    Args:
        folders: Folders of bases.
        tasks: A path or a dataset, as `tasks.source` in a recipe.
        out: Output folder of comparison.json and report.html.
        changes: `key=value` for keys of the `adapt:` block of a recipe, `tasks.key=value` for keys
            of its `tasks:` block.
        shots: Numbers of training examples per task (per class for classification); None for all.
        draws: Independent draws of the shots.
        objective: Kind of objective; None for that of the bases.
        resume: Keep what is in `out`.
        overwrite: Replace an earlier result in `out`.
        console: Receives the progress.

    Returns:
        The content of `comparison.json`.

    Raises:
        UserError: A folder is not a base, the bases cannot be compared, or the data, a setting or
            `out` is not acceptable.
    """
    block, source = settings(tasks, changes)
    method, run = adapt_record(block), run_of(block)
    bases = _named([find_base(folder) for folder in folders])
    reference = _with_objective(bases, objective)
    kind = objective or reference.kind
    if kind is None:
        reference.objective(None, None)  # raises
    reads: list[Path | str] = [*folders, *read_by(source)]
    reads += [base.folder for base in bases.values()]
    with run_folder(out, "compare", resume=resume, overwrite=overwrite, reads=reads) as folder:
        collection, _ = load_tasks(source, str(kind))
        loaded = _Loaded(bases)
        fitted = reference.objective(objective, _one_tokenizer(loaded)).fit(collection)
        collection = loaded.tasks = collection.with_objective(fitted)
        for name in bases:
            check_sides(loaded[name], collection, None, console)
        with console.bar(
            f"adapting {len(bases)} bases to {len(collection)} tasks",
            rounds=len(bases) * len(shots),
        ) as progress:
            comparison: dict[str, Any] = foretune.compare(
                loaded,
                collection,
                adapt=method,
                run=run,
                shots=tuple(shots),
                draws=draws,
                progress=progress,
            ).to_dict()
        for base in comparison["bases"]:
            _describe(base, bases[base["name"]])
        comparison = merge_repeats([comparison])  # a new verdict that knows the controls
        comparison["title"] = out.resolve().name
        # The folders of the bases do not record which tasks they were retrained on.
        counts = {k: v for k, v in comparison["collection"].items() if v is not None}
        comparison["collection"] = counts
        finish(folder, comparison)
    return comparison


def read_by(source: Source) -> list[str]:
    """The files and folders, or names on the hub, that a source reads."""
    return [text for text in (source.source, source.unseen) if isinstance(text, str)]


def _fixed_rate(block: AdaptBlock) -> float | None:
    """The learning rate of the block; None for the method's default.

    Raises:
        UserError: The block has several.
    """
    if len(block.rates) > 1:
        raise UserError(
            "learning_rates are searched on seen tasks, which only a recipe has: set a single "
            "learning_rate"
        )
    return block.rates[0] if block.rates else None


def settings(tasks: str, changes: Sequence[str]) -> tuple[AdaptBlock, Source]:
    """The `adapt:` block from `key=value` changes, and the source from `tasks.key=value` ones.

    Args:
        tasks: A path or a dataset, as `tasks.source` in a recipe.
        changes: The changes.

    Raises:
        UserError: An unknown key, a bad value, or a key that only a recipe has.
    """
    of_tasks = [c.removeprefix("tasks.") for c in changes if c.startswith("tasks.")]
    for key in ("unseen", "rotate"):
        if key in override_keys(of_tasks):
            raise UserError(
                f"tasks.{key} is not used here, because the base is adapted to all tasks: remove it"
            )
    of_block = [c for c in changes if not c.startswith("tasks.")]
    for key in override_keys(of_block) & RECIPE_ONLY.keys():
        raise UserError(f"{key} is a setting of recipes: {RECIPE_ONLY[key]}")
    block = parse_block(AdaptBlock, of_block)
    data = parse_block(TasksBlock, [f"source={json.dumps(tasks)}", *of_tasks])
    return block, Source(**data.model_dump(exclude={"rotate"}))


class _Loaded(Mapping[str, Any]):
    """Name → model, loaded from its folder on access, so that one is in memory at a time."""

    def __init__(self, bases: Mapping[str, SavedBase]) -> None:
        self.bases = bases
        self.tasks: Any = None  # with their objective, once the tokenizer is known

    def __getitem__(self, name: str) -> Any:
        return self.bases[name].load(self.tasks.objective, self.tasks)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a base, or None."""
        return self.bases[name].load()[1]


def _named(bases: Sequence[SavedBase]) -> dict[str, SavedBase]:
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


def _one_tokenizer(loaded: _Loaded) -> Any:
    """The tokenizer that all bases share.

    Raises:
        UserError: A base has another vocabulary, or a head for other labels, than the first base.
    """
    first, *others = loaded
    tokenizer = loaded.tokenizer(first)
    first_space = _label_space(loaded.bases[first])
    for name in others:
        if _vocabulary(loaded.tokenizer(name)) != _vocabulary(tokenizer):
            raise UserError(
                f"{name} has another tokenizer than {first}, but all bases get the same tokens: "
                "compare bases of the same model"
            )
        space = _label_space(loaded.bases[name])
        if None not in (first_space, space) and first_space != space:
            raise UserError(
                f"the head of {name} is for other labels than that of {first}: compare bases that "
                "were retrained on the same labels"
            )
    return tokenizer


def _label_space(base: SavedBase) -> Any:
    return base.metadata.get("objective", {}).get("space")


def _vocabulary(tokenizer: Any) -> Any:
    return None if tokenizer is None else tokenizer.get_vocab()


def _with_objective(bases: Mapping[str, SavedBase], objective: str | None) -> SavedBase:
    """The base whose objective all are compared by: the first that records one, of this kind.

    Raises:
        UserError: `objective` is None, and the bases record different ones.
    """
    kinds = {name: base.kind for name, base in bases.items() if base.kind is not None}
    if objective is None and len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UserError(
            f"the bases were retrained with different objectives ({listed}): choose one with "
            "--objective"
        )
    recorded = [bases[name] for name, kind in kinds.items() if objective in (None, kind)]
    return next(iter(recorded or bases.values()))


def _describe(base: dict[str, Any], saved: SavedBase) -> None:
    """Adds to the record of a base how it was retrained, as its folder says."""
    method = saved.metadata.get("method", {}).get("name", "unknown")
    base |= {
        "method": method,
        "label": saved.name,
        "config": saved.metadata.get("method", {}),
        "path": str(saved.folder),
    }
    record = saved.folder.parent / RUN_FILE
    if record.is_file():
        rate = base["config"].get("learning_rate")
        cost = read_json(record, _RunRecord, RUN).get("cost") or {}
        base["retrain"] = {"learning_rate": rate, "searched": [], **cost}
