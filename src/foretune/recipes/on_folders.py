"""`foretune adapt` and `compare`: the verbs on folders, for bases that some run has saved."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foretune
from foretune.errors import UserError
from foretune.files import MODULE_FILE
from foretune.models.loading_code import class_name, loading_code
from foretune.recipes.blocks import AdaptBlock, TasksBlock
from foretune.recipes.console import SILENT, Console
from foretune.recipes.folder import check_place, prepare_folder
from foretune.recipes.merge import merge_repeats
from foretune.recipes.runner import finish
from foretune.recipes.schema import Recipe, adapt_record, parse_block, run_of
from foretune.recipes.setup import with_tokenizer
from foretune.tasks.objectives import make_objective
from foretune.tasks.sources import Source, load_tasks

ABOUT = "foretune.json"


@dataclass(frozen=True)
class SavedBase:
    """A base on disk.

    Args:
        name: How it is called in tables.
        folder: A plain model folder.
        about: What its `foretune.json` says: method, objective; empty for a model of others.
    """

    name: str
    folder: Path
    about: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """The kind of objective that it was retrained with, if any."""
        return self.about.get("objective", {}).get("kind")

    def objective(self, kind: str | None, tokenizer: Any) -> Any:
        """Its own objective, or a plain one of the given kind; not yet fitted.

        Raises:
            UserError: Neither is known.
        """
        if kind is not None and kind != self.kind:
            return make_objective(kind, tokenizer)
        if self.kind is None:
            raise UserError(
                f"{self.folder} does not say what it was trained for (no {ABOUT}): give "
                "--objective choice, classification, causal-lm, regression, prompts or denoising"
            )
        made = make_objective(tokenizer=None, **self.about["objective"])
        return with_tokenizer(made, tokenizer)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        from foretune.models.loading import load_base

        return load_base(self.folder)


def find_base(folder: Path) -> SavedBase:
    """The base in a folder: the folder itself, or its `base/`.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no base in {folder}: no such folder")
    place = folder / "base" if (folder / "base").is_dir() else folder
    if not any((place / file).is_file() for file in ("config.json", MODULE_FILE, ABOUT)):
        raise UserError(_no_base(place))
    about = place / ABOUT
    name = folder.resolve().parent.name if folder.name == "base" else folder.resolve().name
    known = json.loads(about.read_text("utf-8")) if about.is_file() else {}
    return SavedBase(name, place, known)


def _no_base(folder: Path) -> str:
    """Why a folder is no base, and which one may be meant."""
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter: give the base that it belongs to"
    inside = sorted(path.parent for path in folder.glob("**/base/foretune.json"))
    meant = f"; did you mean {inside[0]}?" if inside else ""
    return f"{folder} is no base: it holds neither config.json nor {ABOUT}{meant}"


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
    """Adapts a base to every task of a source; one adapter folder a task in `out`.

    Args:
        base: The base's folder.
        tasks: A path or a dataset, as in a recipe's `tasks.source`.
        out: Where.
        changes: `key=value` for the keys of a recipe's `adapt:` block, `tasks.key=value` for those
            of its `tasks:` block.
        objective: Kind of objective, for a base that does not say.
        shots: Training rows of each task; None for all.
        seed: Seeds the draw of shots and the fresh adapters.
        resume: Keep what is in `out`.
        overwrite: Empty `out` first.
        console: Is told how it goes.
    """
    from foretune.training.outcome import folder_name

    block, source = settings(tasks, changes)
    found = find_base(base)
    known = objective or found.kind
    if known is None:
        found.objective(None, None)  # says what is missing
    collection, _ = load_tasks(source, str(known))
    model, tokenizer = found.load()
    fitted = found.objective(objective, tokenizer).fit(collection)
    run = run_of(block, seed=seed, out=out, resume=resume, overwrite=overwrite)
    with console.bar(f"adapting {found.folder} to {len(collection)} tasks") as progress:
        adapted = foretune.adapt(
            model,
            collection.with_objective(fitted),
            adapt_record(block, _fixed_rate(block)),
            run,
            shots=shots,
            progress=progress,
        )
    scores = {task: score for (task, _), score in adapted.scores.items()}
    return {
        "out": str(out),
        "metric": fitted.metric,
        "scores": scores,
        "mean": sum(scores.values()) / len(scores) if scores else None,
        "num_labels": adapted.num_labels,
        "code": loading_code(
            class_name(model),
            str(found.folder),
            str(out / folder_name(collection.names[0])),
            adapted.num_labels,
        ),
        "cost": adapted.cost,
    }


def adapt_command(recipe: Recipe, comparison: Mapping[str, Any]) -> str:
    """The `foretune adapt` that adapts a run's best base to new tasks as the run did.

    The best by the verdict; where that cannot tell, the highest mean with most rows.
    """
    verdict = comparison["verdict"]
    best = (
        verdict["best"]
        or max(
            (row for row in comparison["means"] if row["shots"] == verdict["shots"]),
            key=lambda row: row["mean"],
        )["base"]
    )
    base = next(base for base in comparison["bases"] if base["name"] == best)
    own = recipe.adapt.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"shots", "draws", "search_tasks", "learning_rates", "learning_rate"},
    )
    if base["adapt"]["learning_rate"] is not None:
        own["learning_rate"] = base["adapt"]["learning_rate"]
    of_rows = {"task_column", "group_column", "columns", "num_candidates", "candidate_pool"}
    of_rows |= {"candidates_from", "candidate_seed"}
    data = recipe.tasks.model_dump(mode="json", exclude_defaults=True, include=of_rows)
    own |= {f"tasks.{key}": value for key, value in data.items()}
    settings = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    words = [str(recipe.folder / base["path"]), "--tasks", "NEW.jsonl", "--out", "adapters"]
    return shlex.join(["foretune", "adapt", *words, *settings])


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
        tasks: A path or a dataset, as in a recipe's `tasks.source`.
        out: Where comparison.json and report.html go.
        changes: `key=value` for the keys of a recipe's `adapt:` block, `tasks.key=value` for those
            of its `tasks:` block.
        shots: Training rows of each task; None for all.
        draws: Draws of the shots.
        objective: Kind of objective, for bases that do not say.
        resume: Keep what is in `out`.
        overwrite: Empty `out` first.
        console: Is told how it goes.
    """
    block, source = settings(tasks, changes)
    bases = _named([find_base(folder) for folder in folders])
    kind = _one_kind(bases, objective)
    check_place(out, resume=resume, overwrite=overwrite)
    collection, _ = load_tasks(source, kind)
    first = next(iter(bases.values()))
    loaded = _Loaded(bases)
    fitted = first.objective(objective, _one_tokenizer(loaded)).fit(collection)
    prepare_folder(out, resume=resume, overwrite=overwrite)
    with console.bar(
        f"adapting {len(bases)} bases to {len(collection)} tasks", rounds=len(bases) * len(shots)
    ) as progress:
        comparison: dict[str, Any] = foretune.compare(
            loaded,
            collection.with_objective(fitted),
            adapt=adapt_record(block, _fixed_rate(block)),
            run=run_of(block),
            shots=tuple(shots),
            draws=draws,
            progress=progress,
        ).to_dict()
    for base in comparison["bases"]:
        _describe(base, bases[base["name"]])
    comparison = merge_repeats([comparison])  # the verdict must know which base is a control
    comparison["title"] = out.resolve().name
    # Which tasks the bases have seen is not written in their folders.
    known = {k: v for k, v in comparison["collection"].items() if v is not None}
    comparison["collection"] = known
    finish(out, comparison)
    return comparison


def _fixed_rate(block: AdaptBlock) -> float | None:
    """The one learning rate of the block; None for the method's default."""
    if len(block.rates) > 1:
        raise UserError(
            "learning_rates are searched on seen tasks, which only a recipe has: give one "
            "learning_rate"
        )
    return block.rates[0] if block.rates else None


def settings(tasks: str, changes: Sequence[str]) -> tuple[AdaptBlock, Source]:
    """What `key=value` settings say of adapting, and `tasks.key=value` ones of the data.

    Raises:
        UserError: An unknown key, or `tasks.unseen`: here every task is adapted to.
    """
    of_tasks = [c.removeprefix("tasks.") for c in changes if c.startswith("tasks.")]
    for key in ("unseen", "rotate"):
        if any(change.partition("=")[0] == key for change in of_tasks):
            raise UserError(
                f"tasks.{key} has no meaning here: every task is adapted to; leave it out"
            )
    block = parse_block(AdaptBlock, [c for c in changes if not c.startswith("tasks.")])
    data = parse_block(TasksBlock, [f"source={json.dumps(tasks)}", *of_tasks])
    return block, Source(**data.model_dump(exclude={"rotate"}))


class _Loaded(Mapping[str, Any]):
    """Name → model, read from its folder when asked for: one in memory at a time."""

    def __init__(self, bases: Mapping[str, SavedBase]) -> None:
        self.bases = bases

    def __getitem__(self, name: str) -> Any:
        return self.bases[name].load()[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a base."""
        return self.bases[name].load()[1]


def _named(bases: Sequence[SavedBase]) -> dict[str, SavedBase]:
    """The bases by name; where names are the same, with so much of their paths that they differ."""
    paths = [base.folder.resolve().parts for base in bases]
    for path, base in zip(paths, bases, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{base.folder} is given twice")
    names = [base.name for base in bases]
    if len(set(names)) < len(names):
        # `bases/peft-ml/seed-0/base` and `bases/none/seed-0/base` differ in the third from the end.
        depth = next(d for d in itertools.count(1) if len({p[-d:] for p in paths}) == len(paths))
        names = ["/".join(p for p in path[-depth:] if p != "base") for path in paths]
    return {
        name: dataclasses.replace(base, name=name) for name, base in zip(names, bases, strict=True)
    }


def _one_tokenizer(loaded: _Loaded) -> Any:
    """The tokenizer of all bases, which read the same rows.

    Raises:
        UserError: Bases have other tokens, or heads for other labels, than the first one.
    """
    first, *others = loaded
    tokenizer = loaded.tokenizer(first)
    for other in others:
        if _vocabulary(loaded.tokenizer(other)) != _vocabulary(tokenizer):
            raise UserError(
                f"{other} has another tokenizer than {first}, and all bases are given the same "
                "tokens: compare bases of one model"
            )
        spaces = [loaded.bases[n].about.get("objective", {}).get("space") for n in (first, other)]
        if None not in spaces and spaces[0] != spaces[1]:
            raise UserError(
                f"the head of {other} is for other labels than that of {first}: compare bases that "
                "were retrained on the same labels"
            )
    return tokenizer


def _vocabulary(tokenizer: Any) -> Any:
    return None if tokenizer is None else tokenizer.get_vocab()


def _one_kind(bases: Mapping[str, SavedBase], objective: str | None) -> str:
    if objective is not None:
        return objective
    kinds = {name: base.kind for name, base in bases.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UserError(f"the bases were trained for different objectives ({listed})")
    first = next(iter(bases.values()))
    if first.kind is None:
        first.objective(None, None)
    return str(first.kind)


def _describe(base: dict[str, Any], saved: SavedBase) -> None:
    """What the base's own folder says of how it was made."""
    method = saved.about.get("method", {}).get("name", "unknown")
    base |= {
        "method": method,
        "label": saved.name,
        "config": saved.about.get("method", {}),
        "path": str(saved.folder),
    }
    record = saved.folder.parent / "run.json"
    if record.is_file():
        rate = base["config"].get("learning_rate")
        cost = json.loads(record.read_text("utf-8")).get("cost") or {}
        base["retrain"] = {"learning_rate": rate, "searched": [], **cost}
