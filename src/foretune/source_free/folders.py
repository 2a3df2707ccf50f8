"""`foretune sfda`: prepare a source model, adapt it to unlabelled windows, score both models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.claims import output_folder
from foretune.errors import DivergedError, UserError
from foretune.models.seeding import seed_generators
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import method_and_run
from foretune.run import Run, check_int, check_positive
from foretune.source_free import MODEL_FILE, STATE_WEIGHTS_FILE
from foretune.source_free.sampling import factor_of, resampled
from foretune.source_free.subspace_sfda import SubspaceSFDA
from foretune.source_free.windows import read_windows
from foretune.tasks.task import Task, TaskCollection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foretune.source_free.tucker_format import Metadata
    from foretune.source_free.unlabelled import Unlabelled

NEW = "new"  # a freshly initialised TimeSeriesCNN
RUN_FIELDS = (
    "steps",
    "batch_size",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "device",
)
ADAPT_DEFAULTS = {"steps": 100, "batch_size": 32, "weight_decay": 0.0}


def settings(changes: Sequence[str], seed: int) -> tuple[SubspaceSFDA, Run]:
    """The method and the run that `field=value` settings describe.

    Raises:
        UserError: An unknown field, or a value out of range.
    """
    fields = [f.name for f in dataclasses.fields(SubspaceSFDA)]
    method, run = method_and_run(changes, SubspaceSFDA.name, fields, RUN_FIELDS)
    adapt_run = Run(seed=seed, eval_every=0, **(ADAPT_DEFAULTS | run))
    check_int("steps", adapt_run.steps, 1)
    return SubspaceSFDA(**method), adapt_run


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
    sizes: Mapping[str, int] | None = None,
    rate: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Trains a source model, factorises it and fine-tunes the factors.

    Args:
        model: "new" for a `TimeSeriesCNN`, or the folder of a base.
        rows: Labelled windows of the source.
        out: Folder of the prepared model.
        domain: The domain to use; may be None if `rows` has only one.
        rank_factor: RF: a mode of C channels gets rank C // RF.
        layers: "convolutions", "linear" or "all".
        steps: Training steps before factorising; None for 300 with a new model, 0 with a base.
        epochs: Training epochs after factorising (the paper: 2 to 3).
        learning_rate: Learning rate of both training stages.
        batch_size: Windows per batch.
        imputer: Whether to train the imputer that loss mapu needs.
        sizes: Of a new model: kernel_size, stride, mid and features of `TimeSeriesCNN`.
        rate: Samples per second of the windows, which a target's are compared with; None if
            unknown.
        seed: Random seed of the initial weights and the order of the windows.
        overwrite: Whether to replace a prepared model in `out`.
        console: Reports the progress.

    Returns:
        out, model, domain, labels, shape (of a window), rank_factor, ranks, parameters and macs
        (each before and after factorising), core (number of core parameters), and accuracy on the
        source's test windows (before and after), None without test windows.

    Raises:
        UserError: `out` may not be written, or the windows or the model do not fit.
    """
    if rate is not None:
        check_positive("--rate", rate)
    if sizes and model != NEW:
        raise UserError(f"{', '.join(sizes)} are sizes of a new model, but {model} has its own")
    reads: list[Path | str] = [rows, *([] if model == NEW else [model])]
    with output_folder(out, "sfda-prepare", overwrite=overwrite, at_once=True, reads=reads) as part:
        task = _read_training(rows, domain, labelled=True)
        from foretune.tasks.objectives.classification import Classification

        fitted = Classification().fit(TaskCollection((task,)))
        run = Run(seed=seed, batch_size=batch_size, eval_every=0, weight_decay=0.0)
        source_steps = (300 if model == NEW else 0) if steps is None else steps
        original = _source_model(model, task, fitted, seed, sizes or {})
        fitted = fitted.bind(original)  # a base's outputs are in an order of their own
        source = TaskCollection((task,), fitted)
        label = "training the source model"
        original = _trained(original, source, run, source_steps, learning_rate, console, label)
        import copy

        from foretune.source_free.learner import add_imputer
        from foretune.source_free.tucker import core_parameters, tuckerize
        from foretune.source_free.tucker_format import write_tucker

        prepared = copy.deepcopy(original)
        ranks = tuckerize(prepared, rank_factor=rank_factor, layers=layers)
        factor_steps = epochs * math.ceil(len(task.train) / batch_size)
        label = "training the factors"
        prepared = _trained(prepared, source, run, factor_steps, learning_rate, console, label)
        if imputer:
            console.say("training the imputer")
            imputer_run = run.replace(steps=max(factor_steps, 1))
            add_imputer(prepared, source, imputer_run, learning_rate=learning_rate)
        models = (original, prepared)
        result: dict[str, Any] = {
            "model": model,
            "domain": task.name,
            "labels": list(fitted.space or ()),
            "shape": list(task.train[0]["x"].shape),
            "rate": rate,
            "rank_factor": rank_factor,
            "parameters": [sum(p.numel() for p in m.parameters()) for m in models],
            "macs": [_macs(m, task) for m in models],
            "core": sum(p.numel() for p in core_parameters(prepared).values()),
            "accuracy": [_report(m, task.test, fitted.space or ())["accuracy"] for m in models],
        }
        write_tucker(prepared, part, result)
    return {"out": str(out), **result, "ranks": {k: list(v) for k, v in ranks.items()}}


def adapt_folder(
    base: Path,
    rows: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    domain: str | None = None,
    max_rows: int | None = None,
    rate: float | None = None,
    resample: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts a prepared model to windows of a target; their labels, if any, are not read.

    Args:
        base: Folder written by `prepare_folder`.
        rows: Windows of the target; the split train is adapted to.
        out: Folder of the adapted state.
        changes: Settings of `SubspaceSFDA` and of the run, such as `loss=nrc`, `steps=200`.
        domain: The domain to use; may be None if `rows` has only one.
        max_rows: Maximum number of windows, drawn with the seed; None for all.
        rate: Samples per second of the windows; None if unknown.
        resample: Whether to bring windows of another sampling rate to the source's.
        seed: Random seed of the draw and the order of the windows.
        overwrite: Whether to replace an adapted state in `out`.
        console: Reports the progress.

    Returns:
        out, base, domain, stretched (by how much windows were resampled; 1 for not at all), rows
        (windows adapted to), tuned (number of trained parameters),
        parameters (of the model) and bytes (of the state).

    Raises:
        UserError: A bad setting, `out` may not be written, or windows and model do not fit.
    """
    method, run = settings(changes, seed)
    reads: list[Path | str] = [base, rows]
    with output_folder(out, "sfda-adapt", overwrite=overwrite, at_once=True, reads=reads) as part:
        if not base.is_dir():
            raise UserError(f"no prepared model in {base}: no such folder")
        task = _read_training(rows, domain, labelled=False)
        import foretune
        from foretune.source_free.core_state import record_stretch
        from foretune.source_free.tucker_format import load_tucker

        model, metadata = load_tucker(base)
        objective = _objective(base, metadata)
        _check_fits(model, base, metadata, task, rows)
        source_shape = metadata["shape"]
        factor = factor_of(
            rows,
            task.train[0]["x"].shape[-1],
            source_shape[-1],
            rate=rate,
            source_rate=metadata.get("rate"),
            resample=resample,
        )
        task = resampled(task, factor)
        tasks = TaskCollection((Task(task.name, task.train),), objective)
        with console.bar(f"adapting to {task.name}") as progress:
            result = foretune.adapt(model, tasks, method, run, shots=max_rows, progress=progress)
        adapted = result.models[task.name, 0]
        result.learners[task.name, 0].write(part, None)
        record_stretch(part, factor)
    return {
        "out": str(out),
        "base": str(base),
        "domain": task.name,
        "stretched": factor,
        "rows": min(max_rows or len(task.train), len(task.train)),
        "tuned": result.cost["trainable_parameters"],
        "parameters": sum(p.numel() for p in adapted.parameters()),
        "bytes": (out / STATE_WEIGHTS_FILE).stat().st_size,
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
    """Scores a prepared model before and after adaptation, in total and per class.

    Args:
        folder: Folder written by `adapt_folder`.
        rows: Labelled windows.
        base: Folder of the prepared model; None for the one recorded in `folder`.
        domain: The domain to use; may be None if `rows` has only one.
        split: The split to score.
        report: HTML file to write a figure and a table to; None for none.

    Returns:
        folder, domain, split, before and after, the last two as in `class_report`.

    Raises:
        UserError: No adapted state, no prepared model, or no labelled windows that fit it.
    """
    from foretune.source_free.core_state import load_core, read_metadata
    from foretune.source_free.shift import write_shift
    from foretune.source_free.tucker_format import load_tucker

    record = read_metadata(folder)
    recorded_base = record["base"]
    if base is None and not recorded_base:
        raise UserError(f"{folder} does not record the model it was adapted from; pass --base")
    task = resampled(read_windows(rows, domain, labelled=True), record.get("stretched", 1.0))
    windows = task.split(split)
    if not windows:
        raise UserError(f"{rows} has no {split} windows of {task.name}; choose another --split")
    base = base or Path(recorded_base)
    model, metadata = load_tucker(base)
    objective = _objective(base, metadata)
    _check_fits(model, base, metadata, task, rows)
    objective.fit(TaskCollection((Task(task.name, (), (), windows),)))
    adapted = load_core(model, folder)
    before, after = (_report(m, windows, metadata["labels"]) for m in (model, adapted))
    if report is not None:
        write_shift(report, f"{task.name}: before and after adaptation", before, after)
    return {
        "folder": str(folder),
        "domain": task.name,
        "split": split,
        "before": before,
        "after": after,
    }


def _read_training(rows: str, domain: str | None, *, labelled: bool) -> Task:
    task = read_windows(rows, domain, labelled=labelled)
    if not task.train:
        raise UserError(f"{rows} has no training windows of {task.name}: none has split train")
    return task


def _source_model(
    name: str, task: Task, objective: Any, seed: int, sizes: Mapping[str, int]
) -> nn.Module:
    if name != NEW:
        from foretune.models.loading import load_base
        from foretune.models.quantised import refuse_quantised
        from foretune.training.model_copies import fresh_copy

        model = load_base(name)[0]
        refuse_quantised(model, "preparing a source model", "give the original")
        return fresh_copy(model, objective.bind(model), seed)
    import torch

    from foretune.source_free.time_series_cnn import TimeSeriesCNN

    shape = task.train[0]["x"].shape
    if len(shape) != 2:
        raise UserError(
            f'model "new" takes windows x of shape (channels, length), got x of shape {shape}'
        )
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        return TimeSeriesCNN(shape[0], objective.num_outputs(), **sizes)


def _trained(
    model: nn.Module,
    source: TaskCollection,
    run: Run,
    steps: int,
    learning_rate: float,
    console: Console,
    label: str,
) -> nn.Module:
    if not steps:
        return model
    import foretune

    method = foretune.Standard(learning_rate=learning_rate)
    with console.bar(label) as progress:
        outcome = foretune.retrain(
            model, source, method, run.replace(steps=steps), progress=progress
        )
    trained: nn.Module = outcome.model.cpu()  # factorising and scoring run on the CPU
    return trained


def _objective(folder: Path, metadata: Metadata) -> Unlabelled:
    from foretune.source_free.unlabelled import Unlabelled
    from foretune.tasks.objectives.classification import Classification

    missing = [name for name in ("labels", "domain", "shape") if name not in metadata]
    if missing:
        raise UserError(f"{folder / MODEL_FILE} is damaged: {missing[0]}: field required")
    space = tuple(metadata["labels"])
    return Unlabelled(source=Classification(labels={metadata["domain"]: space}, space=space))


def _check_fits(model: nn.Module, folder: Path, metadata: Metadata, task: Task, rows: str) -> None:
    """Checks a prepared model against the windows, and against its own labels.

    Raises:
        UserError: The channels differ, or the model has more or fewer outputs than labels.
    """
    first = next(window for split in (task.train, task.validation, task.test) for window in split)
    if first["x"].shape[0] != metadata["shape"][0]:
        raise UserError(
            f"{rows} has windows of {first['x'].shape[0]} channels, but the source's have "
            f"{metadata['shape'][0]}; x must be (channels, length)"
        )
    num_outputs, num_labels = _logits(model, [first]).shape[1], len(metadata["labels"])
    num_distinct = len({str(label) for label in metadata["labels"]})
    if num_outputs != num_labels or num_distinct != num_labels:
        raise UserError(
            f"{folder / MODEL_FILE} is damaged: labels: {num_labels}, of which {num_distinct} "
            f"differ, for a model with {num_outputs} outputs"
        )


def _logits(model: nn.Module, windows: Sequence[Any]) -> Tensor:
    """(n, C) logits of n windows, in eval mode.

    Raises:
        DivergedError: An output is NaN.
    """
    import numpy as np
    import torch

    from foretune.models.calls import eval_no_grad
    from foretune.tasks.objectives.text import logits_of

    x = np.stack([window["x"] for window in windows]).astype(np.float32)
    with eval_no_grad(model):
        logits: Tensor = logits_of(model(torch.from_numpy(x)))
    if logits.isnan().any():
        raise DivergedError("the model's outputs are nan, so its windows have no class")
    return logits


def _report(model: nn.Module, windows: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    from foretune.source_free.classes import class_report
    from foretune.tasks.labels import label_of, label_places
    from foretune.tasks.objectives.accuracy import picks

    picked: list[list[float]] = []
    for start in range(0, len(windows), 64):
        picked += picks(_logits(model, windows[start : start + 64])).tolist()
    truth = [label_places(tuple(labels))[label_of(window)] for window in windows]
    return class_report(truth, picked, labels)


def _macs(model: nn.Module, task: Task) -> int:
    import numpy as np
    import torch

    from foretune.source_free.tucker import count_macs

    x = torch.from_numpy(np.asarray(task.train[0]["x"], dtype=np.float32))[None]
    return sum(count_macs(model, x).values())
