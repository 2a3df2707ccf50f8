"""The work of `foretune forecast`: pretrain and adapt forecasters stored as folders."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foretune.claims import output_folder
from foretune.errors import UserError, did_you_mean
from foretune.forecasting.config import ForecastMAEConfig
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
# Without `steps`, training ends when the held-out scenes have not got better five times in a row.
UNTIL_CONVERGED = {"schedule": "constant", "patience": 5}
PRETRAIN_UNTIL = {"steps": 10_000, "eval_every": 200, "warmup": 0.01, **UNTIL_CONVERGED}
ADAPT_UNTIL = {"steps": 2_000, "eval_every": 50, "warmup": 0.02, **UNTIL_CONVERGED}
RUN_FIELDS = tuple(
    f.name for f in dataclasses.fields(Run) if f.name not in ("seed", "out", "resume", "overwrite")
)


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The checked settings of `foretune forecast pretrain`."""

    sizes: ForecastMAEConfig
    learning_rate: float
    run: Run


def pretrain_settings(changes: Sequence[str], seed: int) -> PretrainSettings:
    """Check the settings of `foretune forecast pretrain`, without importing torch.

    Without a number of steps, pretraining ends when the held-out scenes get no better. Where the
    settings do not say how many scenes each validation scores, these take at most a tenth of the
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
        **({} if "steps" in run else PRETRAIN_UNTIL),
    }
    checked = Run(**(defaults | run), seed=seed)
    if "eval_rows" not in run and checked.eval_every != 0:
        period = checked.eval_every or math.ceil(checked.steps / 10)
        affordable = int(VALIDATED / FORWARD_SHARE * checked.batch_size * period)
        checked = checked.replace(eval_rows=max(1, min(affordable, checked.eval_rows or 1)))
    return PretrainSettings(ForecastMAEConfig(**sizes), learning_rate, checked)


def adapt_settings(name: str, changes: Sequence[str], seed: int) -> tuple[Any, Run]:
    """Check the settings of `foretune forecast adapt`, without importing torch.

    Without a number of steps, a task ends when its held-out scenes get no better.

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
    defaults: dict[str, Any] = {"schedule": "cosine", "batch_size": 16, "weight_decay": 1e-4}
    if "steps" not in run:
        defaults |= {"eval_rows": 128, **ADAPT_UNTIL}
    return make(name, **fields), Run(**(defaults | run), seed=seed)


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
        The folder, counts of tasks, scenes and parameters, the steps taken, the validation loss and
        the cost.

    Raises:
        UserError: The scenes cannot be read or do not fit the sizes, or the folder is in use.
    """
    check_exist(scenes)

    import foretune
    from foretune.forecasting.choosing import with_held_out
    from foretune.forecasting.model import ForecastMAE, save_forecast_mae

    kind = "forecast-pretrain"
    with output_folder(out, kind, overwrite=overwrite, at_once=True, reads=[scenes]) as folder:
        sizes = settings.sizes
        objective = foretune.SceneReconstruction(**steps_of(sizes))
        tasks = load_for(scenes, sizes).with_objective(objective)
        if not any(task.validation for task in tasks):
            tasks = with_held_out(tasks)
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
    steps = outcome.history[-1]["step"] if outcome.history else settings.run.steps
    return {
        "out": str(out),
        "tasks": len(tasks),
        "scenes": sum(len(task.train) for task in tasks),
        "steps": steps,
        "notes": _notes_on_steps({"the model": steps}, settings.run),
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
    best_of: int | None = None,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapt a pretrained model to each task, choose, and save the results as one folder per task.

    For each task its forecaster or constant velocity is chosen, by scenes that are held out.

    Args:
        base: Folder of the pretrained model.
        method: `ForecastPEFT`, or `Full`, which fine-tunes the encoder with an MLP head.
        run: Steps, batch size and the like.
        scenes: A file or a folder of scenes.
        out: Folder of the task folders.
        shots: Training scenes per task; None for all.
        best_of: A forecaster is judged by the best of so many of its likeliest modes; None for all.
        overwrite: Replace adapted forecasters already in the folder.
        console: Receives progress.

    Returns:
        The folder, the minFDE of each task's test scenes in m, what was measured on its held-out
        scenes, the steps it took, the largest number of steps and the cost.

    Raises:
        UserError: The base or the scenes cannot be read or do not fit, or the folder is in use.
    """
    check_exist(base, scenes)
    import torch

    import foretune
    from foretune.forecasting.choosing import FORECASTER, choose, with_held_out
    from foretune.forecasting.forecasters import add_head, load_forecast_mae
    from foretune.forecasting.model import save_forecast_mae
    from foretune.training.outcome import folder_names

    reads: list[Path | str] = [base, scenes]
    with output_folder(
        out, "forecast-adapt", overwrite=overwrite, at_once=True, reads=reads
    ) as part:
        model = load_forecast_mae(base)
        objective = foretune.Forecast(**steps_of(model.sizes), best_of=best_of)
        tasks = with_held_out(load_for(scenes, model.sizes).with_objective(objective))
        if method.name == "full":
            with torch.random.fork_rng():
                seed_generators(run.seed)
                add_head(model, spread=True)  # modes that start equal stay equal
        with console.bar(f"adapting to {len(tasks)} tasks", rounds=len(tasks)) as progress:
            adapted = foretune.adapt(model, tasks, method, run, shots=shots, progress=progress)
        names = folder_names((task.name, 0) for task in tasks)
        folders = {task.name: names[task.name, 0] for task in tasks}
        held_out = {
            task.name: dataclasses.asdict(
                choose(adapted.models[task.name, 0], task.validation, objective)
            )
            for task in tasks
        }
        summary = {
            "format": FORMAT,
            "base": str(base.resolve()),
            "method": method.to_dict(),
            "folders": folders,
            "best_of": best_of,
            "held_out": held_out,
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
    steps = {name: adapted.stopped.get((name, 0), run.steps) for name in folders}
    straight = [name for name, choice in held_out.items() if choice["chosen"] != FORECASTER]
    notes = _notes_on_steps(steps, run)
    if straight:
        notes.append(
            f"Constant velocity is taken for {', '.join(straight)}: on held-out scenes the "
            "forecaster is not clearly ahead."
        )
    return {
        "out": str(out),
        "minFDE": scores,
        "held_out": held_out,
        "steps": steps,
        "notes": notes,
        "cost": adapted.cost,
    }


def _notes_on_steps(steps: Mapping[str, int], run: Run) -> list[str]:
    """Whether training ended by held-out scenes, or went on to its largest number of steps."""
    if not run.patience:
        return []
    stopped = sorted(number for number in steps.values() if number < run.steps)
    notes = []
    if stopped:
        shown = " to ".join(f"{number:,}" for number in dict.fromkeys((stopped[0], stopped[-1])))
        notes.append(f"Training ended after {shown} steps: held-out scenes got no better.")
    if len(stopped) < len(steps):
        names = ", ".join(name for name, number in steps.items() if number == run.steps)
        notes.append(
            f"Not converged after {run.steps:,} steps: {names}. Try steps={2 * run.steps} "
            f"patience={run.patience} schedule=constant."
        )
    return notes


def check_exist(*paths: Path) -> None:
    """Check that files or folders exist, before torch is imported: a mistyped path fails at once.

    Raises:
        UserError: A path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")


def steps_of(sizes: ForecastMAEConfig) -> dict[str, Any]:
    """The fields that the objectives share with a model's sizes."""
    return {
        "history_steps": sizes.history_steps,
        "future_steps": sizes.future_steps,
        "radius": sizes.radius,
    }


def load_for(scenes: Path, sizes: ForecastMAEConfig) -> Any:
    """The scenes as a collection without an objective."""
    from foretune.forecasting.readers import load_scenes

    return load_scenes(
        scenes,
        history_steps=sizes.history_steps,
        future_steps=sizes.future_steps,
        lane_points=sizes.lane_points,
    )
