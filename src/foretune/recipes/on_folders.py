"""`foretune adapt` and `foretune compare` for bases that were saved in folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

import foretune
from foretune.errors import UserError
from foretune.files import RUN_FILE
from foretune.formats import RUN, read_json
from foretune.manifest import read_manifest
from foretune.models.loading_code import class_name, folder_code
from foretune.models.precision import Precision, precision_of
from foretune.recipes.adapt_words import compare_words, loading_words
from foretune.recipes.blocks import AdaptBlock, TasksBlock
from foretune.recipes.console import SILENT, Console
from foretune.recipes.entries import adapt_record, run_of
from foretune.recipes.folder import run_folder
from foretune.recipes.merge import merge_repeats
from foretune.recipes.overrides import override_keys
from foretune.recipes.runner import finish
from foretune.recipes.saved_base import SavedBase, find_base, named
from foretune.recipes.schema import parse_block
from foretune.recipes.setup import check_sides, check_tokenizer, with_tokenizer
from foretune.run import Run
from foretune.tasks.rows import CLASSES
from foretune.tasks.shard import Shard
from foretune.tasks.sources import Source, load_tasks

if TYPE_CHECKING:
    from foretune.training.adapt_plan import AdaptPlan, Setting
    from foretune.training.outcome import Adapted


class _RunRecord(TypedDict, total=False):
    cost: dict[str, Any] | None


# Keys of a recipe's `adapt:` block that mean nothing where one set of bases is adapted.
RECIPE_ONLY = {
    "shots": "use --shots",
    "draws": "only `compare` draws its shots several times, with --seeds",
    "methods": "how to adapt is chosen by `foretune run` only; set method",
    "search_tasks": "how to adapt is chosen by `foretune run` only",
}
# Keys of `tasks:` that say how a row is read.
READ_BY = ("columns", "messages", "task_column")
# Settings that say how much fits at once, not how to adapt.
OF_THE_MACHINE = ("tasks_per_wave", "token_budget", "gradient_checkpointing")


def adapt_folder(
    base: Path,
    tasks: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    objective: str | None = None,
    base_name: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    replace: bool = False,
    shard: Shard | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts a base to every task of a source and saves one adapter folder per task in `out`.

    Without changes that say how, it is adapted as held-out tasks chose when it was retrained, by
    the number of rows of each task. Tasks join those that `out` holds already.

    Args:
        base: Folder of the base.
        tasks: A path or a dataset, as `tasks.source` in a recipe.
        out: Output folder.
        changes: `key=value` for keys of the `adapt:` block of a recipe, `tasks.key=value` for keys
            of its `tasks:` block.
        objective: Kind of objective; None for that of the base.
        base_name: What the adapters call their base, such as the name under which it is served;
            None for its folder.
        shots: Training examples per task (per class for classification); None for all.
        seed: Random seed of the draw of shots and of the fresh adapters.
        replace: Adapt tasks of `out` again whose rows have changed; the earlier adapters go to
            `versions`.
        shard: Adapt only its tasks, in its folder beside `out`; None for all tasks.
        resume: Keep what is in `out`, as is done anyway where it holds adapters.
        overwrite: Replace an earlier result in `out`.
        console: Receives the progress.

    Returns:
        Scores and training examples per task, which tasks were there already or were replaced, the
        mean score, how the tasks were adapted (if that was chosen by held-out tasks), the cost, and
        Python code that loads the first adapter.

    Raises:
        UserError: The folder is not a base, or the data, a setting or `out` is not acceptable.
    """
    from foretune.evaluation.wording import rows_drawn
    from foretune.training.shots import draw_shots

    out = out if shard is None else shard.folder(out)
    block, source = settings(tasks, changes)
    saved, run = find_base(base), run_of(block, seed=seed)
    method = (None if says_how(changes) else saved.plan) or fixed_record(block)
    kind = objective or saved.kind
    if kind is None:
        saved.objective(None, None)  # raises
    reads: list[Path | str] = [base, saved.folder, *read_by(source)]
    resume = resume or (holds_adapters(out) and not overwrite)
    with run_folder(out, "adapt", resume=resume, overwrite=overwrite, reads=reads) as folder:
        collection, _ = load_tasks(source, str(kind))
        fitted = saved.objective(objective, None).fit(collection)
        model, tokenizer = saved.load(fitted, collection)
        if base_name is not None and hasattr(model, "name_or_path"):
            model.name_or_path = base_name
        check_tokenizer(saved.folder, tokenizer, fitted, collection)
        fitted = with_tokenizer(fitted, tokenizer)
        collection = collection.with_objective(fitted)
        check_sides(model, collection, None, console)
        names = collection.names if shard is None else shard.names(collection.names)
        if shard is not None:
            console.say(f"shard {shard}: {len(names)} of {len(collection)} tasks, in {out}")
        with console.bar(f"adapting {saved.folder} to {len(names)} tasks") as progress:
            adapted = foretune.adapt(
                model,
                collection,
                method,
                run.replace(out=folder),
                shots=shots,
                replace=replace,
                shard=shard,
                progress=progress,
            )
    scores = {task: score for (task, _), score in adapted.scores.items()}
    drawn = draw_shots([collection[name] for name in names], fitted.kind, shots, 1, seed)
    num_train = {slot.task: len(slot.train) for slot in drawn}
    unit = "rows per class" if fitted.kind in CLASSES else "rows"
    return {
        "out": str(out),
        "shard": None if shard is None else str(shard),
        "metric": fitted.metric,
        "scores": scores,
        "num_train": num_train,
        "there": [name for name in names if (name, 0) not in adapted.num_train],
        "replaced": [task for task, draw in adapted.earlier if draw == 0],
        "adapting": [
            {**setting.to_dict(), "tasks": names} for setting, names in _by_setting(adapted)
        ],
        "drawn": rows_drawn({shots: num_train.values()}, unit) if shots and names else [],
        "mean": sum(scores.values()) / len(scores) if scores else None,
        "num_labels": adapted.num_labels,
        "code": folder_code(
            class_name(model),
            saved.folder,
            out / adapted.folders[names[0], 0],
            adapted.num_labels,
        )
        if names
        else [],
        "cost": adapted.cost,
    }


def holds_adapters(folder: Path) -> bool:
    """Whether `adapt` has written a folder."""
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
        return manifest is not None and manifest.kind == "adapt" and (folder / RUN_FILE).is_file()
    except OSError:  # which claiming the folder will say
        return False


def _by_setting(adapted: Adapted) -> list[tuple[Setting, list[str]]]:
    """The settings of a plan, and the tasks that were adapted by each in this call."""
    groups: dict[str, tuple[Setting, list[str]]] = {}
    for (task, _), setting in adapted.settings.items():
        groups.setdefault(repr(setting), (setting, []))[1].append(task)
    return list(groups.values())


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

    Without changes that say how, each is adapted as held-out tasks chose when it was retrained.

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
    method, run = fixed_record(block), run_of(block)
    bases = named([find_base(folder) for folder in folders])
    plans = {} if says_how(changes) else _plans(bases, method, run, console)
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
                plans=plans or None,
                progress=progress,
            ).to_dict()
        for base in comparison["bases"]:
            _describe(base, bases[base["name"]])
        comparison = merge_repeats([comparison])  # a new verdict that knows the controls
        comparison["title"] = out.resolve().name
        held = precision_of(None, None)
        comparison["held_in"] = {"dtype": str(held.dtype), "quantize": held.quantize}
        if held != Precision():
            comparison["title"] += f" (bases in {held.quantize or held.dtype})"
        # The folders of the bases do not record which tasks they were retrained on.
        counts = {k: v for k, v in comparison["collection"].items() if v is not None}
        comparison["collection"] = counts
        comparison["data"] = tasks
        comparison["adapt_with"] = [*loading_words(objective), *changes]
        comparison["command"] = compare_words(folders, tasks, changes, shots, draws, objective)
        finish(folder, comparison)
    return comparison


def read_by(source: Source) -> list[str]:
    """The files and folders, or names on the hub, that a source reads."""
    return [text for text in (source.source, source.unseen) if isinstance(text, str)]


def says_how(changes: Sequence[str]) -> bool:
    """Whether settings say how to adapt, instead of what was chosen for the base."""
    keys = {key for key in override_keys(changes) if not key.startswith("tasks.")}
    return bool(keys - {*OF_THE_MACHINE})


def fixed_record(block: AdaptBlock) -> Any:
    """The adapt method of settings.

    Raises:
        UserError: They have several learning rates.
    """
    if len(block.rates) > 1:
        raise UserError(
            "learning_rates are searched on seen tasks, which only a recipe has: set a single "
            "learning_rate"
        )
    return adapt_record(block)


def _plans(
    bases: Mapping[str, SavedBase], method: Any, run: Run, console: Console
) -> dict[str, AdaptPlan]:
    """The plans that the bases bring; says by what the others are adapted, if any has one."""
    plans = {name: plan for name, base in bases.items() if (plan := base.plan) is not None}
    others = [name for name in bases if name not in plans]
    if plans and others:
        console.say(
            f"{', '.join(others)}: no way to adapt was chosen; adapting by {method.name}, learning "
            f"rate {method.learning_rate:g}, {run.steps} steps"
        )
    return plans


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


def rows_source(rows: str, changes: Sequence[str]) -> Source:
    """Where rows without answers are, and how they are read.

    Args:
        rows: A file, a folder or a dataset.
        changes: `tasks.key=value` for keys of the `tasks:` block of a recipe.

    Raises:
        UserError: Another key, or a bad value.
    """
    for change in changes:
        if not change.startswith("tasks."):
            raise UserError(
                f"{change}: only tasks.KEY=VALUE is a setting here, how the rows are read"
            )
        key = change.removeprefix("tasks.").partition("=")[0].partition(".")[0]
        if key not in READ_BY:
            raise UserError(
                f"tasks.{key} is not used here, where rows are only read: {', '.join(READ_BY)} are"
            )
    data = parse_block(
        TasksBlock, [f"source={json.dumps(rows)}", *(c.removeprefix("tasks.") for c in changes)]
    )
    return Source(**data.model_dump(exclude={"rotate"}))


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
