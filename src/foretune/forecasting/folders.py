"""The work of `foretune forecast`: pretrain, adapt and evaluate forecasters stored as folders."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from foretune.claims import claim_file, output_folder
from foretune.errors import UserError, did_you_mean
from foretune.files import write_whole
from foretune.forecasting.config import ForecastMAEConfig
from foretune.formats import damage_named, read_json
from foretune.methods import make, method_class
from foretune.models.seeding import seed_generators
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import method_and_run
from foretune.run import Run, check_positive
from foretune.training.methods import AdaptMethod

SUMMARY, FORMAT = "forecasts.json", "foretune-forecasts-1"
VALIDATED = 0.1  # of the time of pretraining, at most
FORWARD_SHARE = 1 / 3  # of the time of a forward and backward pass, approximately
# Scenes are padded to the one with the most agents; a step of many tasks at once takes gigabytes.
TOKENS_AT_ONCE = 2048
ADAPT_METHODS = ("forecast-peft", "full")
RUN_FIELDS = tuple(
    f.name for f in dataclasses.fields(Run) if f.name not in ("seed", "out", "resume", "overwrite")
)


class Adaptation(TypedDict):
    """The fields of `SUMMARY` that are read back."""

    base: str
    method: dict[str, Any]
    folders: dict[str, str]  # by task


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The checked settings of `foretune forecast pretrain`."""

    sizes: ForecastMAEConfig
    learning_rate: float
    run: Run


def pretrain_settings(changes: Sequence[str], seed: int) -> PretrainSettings:
    """Check the settings of `foretune forecast pretrain`, without importing torch.

    Where they do not say how many scenes each validation scores, these take at most a tenth of the
    time, and are 32 of each task at most.

    Args:
        changes: `key=value` of the model's sizes, the learning rate and the run.
        seed: Random seed of the run.

    Raises:
        UserError: A setting is unknown or out of range.
    """
    size_names = [f.name for f in dataclasses.fields(ForecastMAEConfig)]
    sizes, run = method_and_run(changes, "the model", [*size_names, "learning_rate"], RUN_FIELDS)
    learning_rate = sizes.pop("learning_rate", 1e-3)
    check_positive("learning_rate", learning_rate)
    defaults: dict[str, Any] = {
        "schedule": "cosine",
        "batch_size": 32,
        "token_budget": TOKENS_AT_ONCE,
    }
    checked = Run(**(defaults | run), seed=seed)
    if "eval_rows" not in run and checked.eval_every != 0:
        period = checked.eval_every or math.ceil(checked.steps / 10)
        affordable = int(VALIDATED / FORWARD_SHARE * checked.batch_size * period)
        checked = checked.replace(eval_rows=max(1, min(affordable, checked.eval_rows or 1)))
    return PretrainSettings(ForecastMAEConfig(**sizes), learning_rate, checked)


def adapt_settings(name: str, changes: Sequence[str], seed: int) -> tuple[Any, Run]:
    """Check the settings of `foretune forecast adapt`, without importing torch.

    Args:
        name: Name of the method.
        changes: `key=value` of the method and the run.
        seed: Random seed of the run.

    Returns:
        (method, run).

    Raises:
        UserError: The method or a setting is unknown, or a setting is out of range.
    """
    if name not in ADAPT_METHODS:
        raise UserError(
            f"--method must be one of {', '.join(ADAPT_METHODS)}; got {name!r}."
            f"{did_you_mean(name, ADAPT_METHODS)}"
        )
    field_names = [f.name for f in dataclasses.fields(method_class(name))]
    fields, run = method_and_run(changes, name, field_names, RUN_FIELDS)
    if name == "full":
        fields = {"learning_rate": 1e-3, **fields}
    run = {"schedule": "cosine", "batch_size": 16, "weight_decay": 1e-4, **run}
    return make(name, **fields), Run(**run, seed=seed)


def pretrain_folder(
    settings: PretrainSettings,
    scenes: Path,
    out: Path,
    *,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Pretrain a fresh Forecast-MAE on the training scenes of all tasks and save it as a folder.

    Args:
        settings: Sizes, learning rate and run.
        scenes: A file or a folder of scenes.
        out: Folder of the model.
        overwrite: Replace a model already in the folder.
        console: Receives progress.

    Returns:
        The folder, counts of tasks, scenes and parameters, the validation loss and the cost.

    Raises:
        UserError: The scenes cannot be read or do not fit the sizes, or the folder is in use.
    """
    _check_exist(scenes)

    import foretune
    from foretune.forecasting.model import ForecastMAE, save_forecast_mae

    kind = "forecast-pretrain"
    with output_folder(out, kind, overwrite=overwrite, at_once=True, reads=[scenes]) as folder:
        sizes = settings.sizes
        objective = foretune.SceneReconstruction(**_steps(sizes))
        tasks = _load(scenes, sizes).with_objective(objective)
        seed_generators(settings.run.seed)
        model = ForecastMAE(sizes)
        with console.bar(f"pretraining on {sum(len(t.train) for t in tasks)} scenes") as progress:
            outcome = foretune.retrain(
                model,
                tasks,
                make("standard", learning_rate=settings.learning_rate),
                settings.run,
                progress=progress,
            )
        pretrained: Any = outcome.model
        save_forecast_mae(pretrained, folder)
    return {
        "out": str(out),
        "tasks": len(tasks),
        "scenes": sum(len(task.train) for task in tasks),
        "validation_loss": None if outcome.validation_score is None else -outcome.validation_score,
        "parameters": sum(p.numel() for p in outcome.model.parameters()),
        "cost": outcome.cost,
    }


def convert_checkpoint(
    checkpoint: Path, out: Path, *, num_heads: int = 8, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint of Forecast-MAE's authors as a pretrained model's folder.

    Args:
        checkpoint: The file; see `foretune.forecasting.checkpoints`.
        out: Folder of the model.
        num_heads: Attention heads of its blocks.
        overwrite: Replace a model already in the folder.

    Returns:
        The folder and the number of parameters.

    Raises:
        UserError: The file is no such checkpoint, or the folder is in use.
    """
    from foretune.forecasting.checkpoints import read_checkpoint
    from foretune.forecasting.model import save_forecast_mae

    kind = "forecast-pretrain"
    with output_folder(out, kind, overwrite=overwrite, at_once=True, reads=[checkpoint]) as folder:
        model = read_checkpoint(checkpoint, num_heads=num_heads)
        save_forecast_mae(model, folder)
    return {"out": str(out), "parameters": sum(p.numel() for p in model.parameters())}


def adapt_folder(
    base: Path,
    method: AdaptMethod,
    run: Run,
    scenes: Path,
    out: Path,
    *,
    shots: int | None = None,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapt a pretrained model to each task and save the results as one folder per task.

    Args:
        base: Folder of the pretrained model.
        method: `ForecastPEFT`, or `Full`, which fine-tunes the encoder with an MLP head.
        run: Steps, batch size and the like.
        scenes: A file or a folder of scenes.
        out: Folder of the task folders.
        shots: Training scenes per task; None for all.
        overwrite: Replace adapted forecasters already in the folder.
        console: Receives progress.

    Returns:
        The folder, the minFDE of each task in m and the cost.

    Raises:
        UserError: The base or the scenes cannot be read or do not fit, or the folder is in use.
    """
    _check_exist(base, scenes)
    import torch

    import foretune
    from foretune.forecasting.forecasters import add_head, load_forecast_mae
    from foretune.forecasting.model import save_forecast_mae
    from foretune.training.outcome import folder_names

    reads: list[Path | str] = [base, scenes]
    with output_folder(
        out, "forecast-adapt", overwrite=overwrite, at_once=True, reads=reads
    ) as part:
        model = load_forecast_mae(base)
        tasks = _load(scenes, model.sizes).with_objective(foretune.Forecast(**_steps(model.sizes)))
        if method.name == "full":
            with torch.random.fork_rng():
                seed_generators(run.seed)
                add_head(model, spread=True)  # modes that start equal stay equal
        with console.bar(f"adapting to {len(tasks)} tasks", rounds=len(tasks)) as progress:
            adapted = foretune.adapt(model, tasks, method, run, shots=shots, progress=progress)
        names = folder_names((task.name, 0) for task in tasks)
        folders = {task.name: names[task.name, 0] for task in tasks}
        summary = {
            "format": FORMAT,
            "base": str(base.resolve()),
            "method": method.to_dict(),
            "folders": folders,
            "cost": adapted.cost,
        }
        for name, folder in folders.items():
            if method.name == "full":
                forecaster: Any = adapted.models[name, 0]
                save_forecast_mae(forecaster, part / folder)
            else:
                (part / folder).mkdir()
                adapted.learners[name, 0].write(part / folder, None)
        (part / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    scores = {task: -score for (task, _), score in adapted.scores.items()}
    return {"out": str(out), "minFDE": scores, "cost": adapted.cost}


def evaluate_folder(
    folder: Path,
    scenes: Path,
    *,
    split: str = "test",
    base: Path | None = None,
    page: Path | None = None,
    pictures: int = 4,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate adapted forecasters, each on its own task, against constant velocity.

    Args:
        folder: Folder of `adapt_folder`, or of a model with a forecaster, which is evaluated on
            all tasks.
        scenes: A file or a folder of scenes.
        split: "train", "validation" or "test".
        base: Folder of the pretrained model; None takes the one recorded in `folder`.
        page: HTML file for the table and pictures; None for none.
        pictures: Number of scenes per task to draw.
        overwrite: Replace the page.

    Returns:
        "rows", the metrics of each model and task, and "page", its path or None.

    Raises:
        UserError: The page exists, a model or the scenes cannot be read, or no task has both a
            model and scenes.
    """
    _check_exist(folder, scenes)
    import foretune
    from foretune.forecasting.measures import forecast_rows, measures
    from foretune.forecasting.report import forecast_page, scene_figure
    from foretune.forecasting.scenes import in_focal_frame

    if page is not None:
        claim_file(page, overwrite=overwrite, reads=[folder, scenes])
    models = _AdaptedModels(folder, base)
    objective = foretune.Forecast(**_steps(models.sizes))
    tasks = _load(scenes, models.sizes)
    objective = objective.fit(tasks)
    rows, figures = [], []
    for task in tasks:
        examples = task.split(split)
        model = models.model_of(task.name)
        if model is None or not examples:
            continue
        forecasts = forecast_rows(model, examples, objective)
        cell = {"task": task.name, "scenes": len(examples)}
        metrics = measures(forecasts)
        rows.append({"model": folder.name, **cell, **metrics})
        baseline = measures(forecast_rows(None, examples, objective))
        # Constant velocity has a single mode: its best of K is its only one.
        baseline_keys = {
            key: key if key in baseline else key.rstrip("0123456789") + "1" for key in metrics
        }
        rows.append(
            {"model": "constant velocity", **cell}
            | {key: baseline[baseline_key] for key, baseline_key in baseline_keys.items()}
        )
        for i in range(min(pictures, len(examples))):
            scene = in_focal_frame(examples[i], models.sizes.history_steps, models.sizes.radius)
            trajectories, probabilities = forecasts[0][i], forecasts[1][i].softmax(0)
            svg = scene_figure(scene, trajectories.numpy(), probabilities.numpy())
            figures.append((f"{task.name}, {split} scene {i + 1}", svg))
    if not rows:
        raise UserError(
            f"{scenes} has no {split} scenes of the tasks that {folder} was adapted to "
            f"({', '.join(models.names)})"
        )
    if page is not None:
        write_whole(page, forecast_page(rows, figures, f"Forecasts of {folder.name}"))
    return {"rows": rows, "page": None if page is None else str(page)}


class _AdaptedModels:
    """The models of a folder's tasks, each loaded on request."""

    def __init__(self, folder: Path, base: Path | None) -> None:
        from foretune.forecasting.forecasters import load_forecast_mae

        self.folder, self.single = folder, None
        summary = folder / SUMMARY
        if not summary.is_file():
            self.single = load_forecast_mae(folder)
            if self.single.forecaster is None:
                self.single.forecast({})  # raises: the model has no forecaster
            self.names, self.sizes = ["all tasks"], self.single.sizes
            return
        adaptation = read_json(summary, Adaptation, FORMAT)
        self.folders = adaptation["folders"]
        with damage_named(summary):
            self.method = make(**adaptation["method"])
        base_folder = base or Path(adaptation["base"])
        if not base_folder.is_dir():
            raise UserError(f"the base model is not at {base_folder}: pass its folder by --base")
        self.names = list(self.folders)
        self.base = load_forecast_mae(base_folder)
        self.sizes = self.base.sizes

    def model_of(self, task: str) -> Any:
        """The task's model; None if the folder has none."""
        from foretune.forecasting.forecast_peft import load_adapted
        from foretune.forecasting.forecasters import load_forecast_mae

        if self.single is not None:
            return self.single
        if task not in self.folders:
            return None
        task_folder = self.folder / self.folders[task]
        if self.method.name == "full":
            return load_forecast_mae(task_folder)
        return load_adapted(task_folder, self.base)


def _check_exist(*paths: Path) -> None:
    """Check that files or folders exist, before torch is imported: a mistyped path fails at once.

    Raises:
        UserError: A path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")


def _steps(sizes: ForecastMAEConfig) -> dict[str, Any]:
    """The fields that the objectives share with a model's sizes."""
    return {
        "history_steps": sizes.history_steps,
        "future_steps": sizes.future_steps,
        "radius": sizes.radius,
    }


def _load(scenes: Path, sizes: ForecastMAEConfig) -> Any:
    """The scenes as a collection without an objective."""
    from foretune.forecasting.readers import load_scenes

    return load_scenes(
        scenes,
        history_steps=sizes.history_steps,
        future_steps=sizes.future_steps,
        lane_points=sizes.lane_points,
    )
