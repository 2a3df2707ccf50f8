"""`foretune sfda`: prepare a source model, adapt it to rows without labels, score both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError
from foretune.files import claim_model_folder, whole_folder
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import method_and_run
from foretune.run import Run
from foretune.source_free.subspace_sfda import SubspaceSFDA
from foretune.source_free.windows import read_windows
from foretune.tasks.task import Task, TaskCollection

if TYPE_CHECKING:
    from torch import nn

    from foretune.source_free.unlabelled import Unlabelled

NEW = "new"  # the model that stands for TimeSeriesCNN
RUN_FIELDS = (
    "steps",
    "batch_size",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "device",
)
ADAPT = {"steps": 100, "batch_size": 32, "weight_decay": 0.0}


def settings(changes: Sequence[str], seed: int) -> tuple[SubspaceSFDA, Run]:
    """The method and the run of `field=value` settings.

    Raises:
        UserError: No such field, or a value out of range.
    """
    fields = [f.name for f in dataclasses.fields(SubspaceSFDA)]
    own, run = method_and_run(changes, SubspaceSFDA.name, fields, RUN_FIELDS)
    return SubspaceSFDA(**own), Run(seed=seed, eval_every=0, **(ADAPT | run))


def prepare_folder(
    model: str,
    rows: str,
    out: Path,
    *,
    domain: str | None = None,
    rank_factor: int = 4,
    layers: str = "all",
    steps: int | None = None,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    imputer: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Trains a source model where there is none, factorises it, trains all of it a little more.

    Args:
        model: "new" for a `TimeSeriesCNN`, or the folder of a base.
        rows: Labelled windows of the source.
        out: Where the prepared model goes.
        domain: Of several in `rows`, this one.
        rank_factor: RF: a mode of C channels gets rank C // RF.
        layers: "convolutions", "linear" or "all".
        steps: Of training before factorising; 300 for a new model, 0 for one that is given.
        epochs: Over the rows after factorising (the paper: 2 to 3).
        learning_rate: Of both trainings.
        batch_size: Rows of a batch.
        imputer: Whether to train what loss mapu needs.
        seed: Of weights and order.
        overwrite: Replace a prepared model in `out`.
        console: Is told how it goes.

    Returns:
        out, model, domain, labels, ranks, parameters and macs (as given, factorised), core (its
        numbers), accuracy of the source's test rows (given, prepared), None without such rows.
    """
    claim_model_folder(out, "sfda.json", overwrite=overwrite)
    task = read_windows(rows, domain, labelled=True)
    if not task.train:
        raise UserError(f"{rows} has no training rows of {task.name}: they are of split train")
    from foretune.tasks.objectives.classification import Classification

    fitted = Classification().fit(TaskCollection((task,)))
    source = TaskCollection((task,), fitted)
    whole = _source_model(model, task, fitted, seed)
    base = Run(seed=seed, batch_size=batch_size, eval_every=0, weight_decay=0.0)
    first = (300 if model == NEW else 0) if steps is None else steps
    whole = _trained(whole, source, base, first, learning_rate, console, "training the source")
    import copy

    from foretune.source_free.learner import add_imputer
    from foretune.source_free.tucker import core_parameters, tuckerize
    from foretune.source_free.tucker_format import write_tucker

    small = copy.deepcopy(whole)
    ranks = tuckerize(small, rank_factor=rank_factor, layers=layers)
    count = epochs * math.ceil(len(task.train) / batch_size)
    small = _trained(small, source, base, count, learning_rate, console, "training the factors")
    if imputer:
        console.say("training the imputer")
        add_imputer(small, source, base.replace(steps=max(count, 1)), learning_rate=learning_rate)
    accuracy = [_report(m, task.test, fitted.space or ())["accuracy"] for m in (whole, small)]
    result: dict[str, Any] = {
        "model": model,
        "domain": task.name,
        "labels": list(fitted.space or ()),
        "shape": list(task.train[0]["x"].shape),
        "rank_factor": rank_factor,
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (whole, small)],
        "macs": [_macs(m, task) for m in (whole, small)],
        "core": sum(p.numel() for p in core_parameters(small).values()),
        "accuracy": accuracy,
    }
    with whole_folder(out) as part:
        write_tucker(small, part, result)
    return {"out": str(out), **result, "ranks": {k: list(v) for k, v in ranks.items()}}


def adapt_folder(
    base: Path,
    rows: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    domain: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts a prepared model to windows whose labels, if there are any, are not read.

    Args:
        base: What `prepare_folder` wrote.
        rows: Windows of the target; those of split train are adapted to.
        out: Where what changed goes.
        changes: Settings of `SubspaceSFDA` and of the run, such as `loss=nrc`, `steps=200`.
        domain: Of several in `rows`, this one.
        max_rows: Adapt to so many of the rows, drawn with the seed.
        seed: Of the order of the rows.
        overwrite: Replace what is in `out`.
        console: Is told how it goes.

    Returns:
        out, base, domain, rows, tuned (numbers trained), numbers and bytes (of the state).
    """
    method, run = settings(changes, seed)
    claim_model_folder(out, "core.json", overwrite=overwrite)
    if not base.is_dir():
        raise UserError(f"no prepared model in {base}: no such folder")
    task = read_windows(rows, domain)
    if not task.train:
        raise UserError(f"{rows} has no training rows of {task.name}: they are of split train")
    import foretune
    from foretune.source_free.tucker_format import load_tucker

    model, about = load_tucker(base)
    _check_shape(task, about, rows)
    tasks = TaskCollection((Task(task.name, task.train),), _objective(about))
    with console.bar(f"adapting to {task.name}") as progress:
        result = foretune.adapt(model, tasks, method, run, shots=max_rows, progress=progress)
    adapted = result.models[task.name, 0]
    with whole_folder(out) as part:
        result.learners[task.name, 0].write(part, None)
    return {
        "out": str(out),
        "base": str(base),
        "domain": task.name,
        "rows": min(max_rows or len(task.train), len(task.train)),
        "tuned": result.cost["trainable_parameters"],
        "parameters": sum(p.numel() for p in adapted.parameters()),
        "bytes": (out / "core.safetensors").stat().st_size,
    }


def eval_folder(
    folder: Path,
    rows: str,
    *,
    base: Path | None = None,
    domain: str | None = None,
    split: str = "test",
    report: Path | None = None,
) -> dict[str, Any]:
    """Scores a prepared model before and after adapting, class by class.

    Args:
        folder: What `adapt_folder` wrote.
        rows: Labelled windows.
        base: The prepared model; None for the one that the folder names.
        domain: Of several in `rows`, this one.
        split: Which rows are scored.
        report: HTML file for a picture and a table; None for none.

    Returns:
        folder, domain, split, before, after: each accuracy, macro_f1, rows and classes.
    """
    from foretune.source_free.core_state import load_core, read_about
    from foretune.source_free.shift import write_shift
    from foretune.source_free.tucker_format import load_tucker

    named = read_about(folder)["base"]
    if base is None and not named:
        raise UserError(f"{folder} does not say from which model it was adapted: give --base")
    task = read_windows(rows, domain, labelled=True)
    chosen = task.split(split)
    if not chosen:
        raise UserError(f"{rows} has no rows of split {split} of {task.name}; give another --split")
    model, about = load_tucker(base or Path(named))
    _check_shape(task, about, rows)
    _objective(about).fit(TaskCollection((Task(task.name, (), (), chosen),)))
    adapted = load_core(model, folder)
    before, after = (_report(m, chosen, about["labels"]) for m in (model, adapted))
    if report is not None:
        write_shift(report, f"{task.name}: before and after adapting", before, after)
    return {
        "folder": str(folder),
        "domain": task.name,
        "split": split,
        "before": before,
        "after": after,
    }


def _source_model(name: str, task: Task, objective: Any, seed: int) -> nn.Module:
    if name != NEW:
        from foretune.models.loading import load_base
        from foretune.models.surgery import match_head

        model = load_base(name)[0]
        match_head(model, objective.num_outputs(), seed)
        return model
    import torch

    from foretune.source_free.time_series_cnn import TimeSeriesCNN

    shape = task.train[0]["x"].shape
    if len(shape) != 2:
        raise UserError(f"model new reads windows (channels, length), got x of shape {shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimeSeriesCNN(shape[0], objective.num_outputs())


def _trained(
    model: nn.Module,
    source: TaskCollection,
    run: Run,
    steps: int,
    learning_rate: float,
    console: Console,
    what: str,
) -> nn.Module:
    if not steps:
        return model
    import foretune

    method = foretune.Standard(learning_rate=learning_rate)
    with console.bar(what) as progress:
        outcome = foretune.retrain(
            model, source, method, run.replace(steps=steps), progress=progress
        )
    trained: nn.Module = outcome.model.cpu()  # scored and factorised here, on rows in memory
    return trained


def _objective(about: Mapping[str, Any]) -> Unlabelled:
    from foretune.source_free.unlabelled import Unlabelled
    from foretune.tasks.objectives.classification import Classification

    space = tuple(about["labels"])
    return Unlabelled(source=Classification(labels={about["domain"]: space}, space=space))


def _check_shape(task: Task, about: Mapping[str, Any], rows: str) -> None:
    first = next(row for split in (task.train, task.validation, task.test) for row in split)
    if first["x"].shape[0] != about["shape"][0]:
        raise UserError(
            f"{rows} has windows of {first['x'].shape[0]} channels, the source had "
            f"{about['shape'][0]}: x is (channels, length)"
        )


def _report(model: nn.Module, rows: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    from foretune.models.calls import eval_no_grad
    from foretune.source_free.classes import class_report
    from foretune.tasks.objectives.text import logits_of

    said: list[int] = []
    with eval_no_grad(model):
        for start in range(0, len(rows), 64):
            x = np.stack([row["x"] for row in rows[start : start + 64]]).astype(np.float32)
            said += logits_of(model(torch.from_numpy(x))).argmax(1).tolist()
    return class_report([list(labels).index(row["y"]) for row in rows], said, labels)


def _macs(model: nn.Module, task: Task) -> int:
    import numpy as np
    import torch

    from foretune.source_free.tucker import count_macs

    x = torch.from_numpy(np.asarray(task.train[0]["x"], dtype=np.float32))[None]
    return sum(count_macs(model, x).values())
