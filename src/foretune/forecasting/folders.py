"""`foretune forecast`: pretrain, adapt and evaluate a forecaster of trajectories on folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.files import claim_model_folder, whole_folder, write_whole
from foretune.forecasting.config import ForecastMAEConfig
from foretune.methods import make, method_class
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import method_and_run
from foretune.run import Run, check_positive

SUMMARY = "forecasts.json"
ADAPTING = ("forecast-peft", "full")
RUN_FIELDS = tuple(
    f.name for f in dataclasses.fields(Run) if f.name not in ("seed", "out", "resume", "overwrite")
)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What `foretune forecast pretrain` was asked for, checked."""

    sizes: ForecastMAEConfig
    learning_rate: float
    run: Run


def pretraining(changes: Sequence[str], seed: int) -> Pretraining:
    """Checks the settings; imports no torch.

    Raises:
        UserError: A setting is unknown or out of range.
    """
    sizes = [f.name for f in dataclasses.fields(ForecastMAEConfig)]
    own, run = method_and_run(changes, "the model", [*sizes, "learning_rate"], RUN_FIELDS)
    rate = own.pop("learning_rate", 1e-3)
    check_positive("learning_rate", rate)
    asked = Run(**{"schedule": "cosine", "batch_size": 32, **run}, seed=seed)
    return Pretraining(ForecastMAEConfig(**own), rate, asked)


def adapting(name: str, changes: Sequence[str], seed: int) -> tuple[Any, Run]:
    """(method, run) of `foretune forecast adapt`; imports no torch.

    Raises:
        UserError: No such way to adapt, or a setting is unknown or out of range.
    """
    if name not in ADAPTING:
        raise UserError(
            f"--method is one of {', '.join(ADAPTING)}; got {name!r}.{did_you_mean(name, ADAPTING)}"
        )
    fields = [f.name for f in dataclasses.fields(method_class(name))]
    own, run = method_and_run(changes, name, fields, RUN_FIELDS)
    if name == "full":
        own = {"learning_rate": 1e-3, **own}
    usual = {"schedule": "cosine", "batch_size": 16, "weight_decay": 1e-4}
    return make(name, **own), Run(**{**usual, **run}, seed=seed)


def pretrain_folder(
    asked: Pretraining,
    scenes: Path,
    out: Path,
    *,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Pretrains a fresh Forecast-MAE on the training rows of all tasks; saves it as a folder.

    Args:
        asked: Sizes, rate and run.
        scenes: A file or a folder of scenes.
        out: Where.
        overwrite: Replace a model that is there.
        console: Is told how it goes.
    """
    _there(scenes)
    import torch

    import foretune
    from foretune.forecasting.model import CONFIG_FILE, ForecastMAE, save_forecast_mae

    claim_model_folder(out, CONFIG_FILE, overwrite=overwrite)
    sizes = asked.sizes
    objective = foretune.SceneReconstruction(**_steps(sizes))
    tasks = _load(scenes, sizes).with_objective(objective)
    torch.manual_seed(asked.run.seed)
    model = ForecastMAE(sizes)
    with console.bar(f"pretraining on {sum(len(t.train) for t in tasks)} scenes") as progress:
        outcome = foretune.retrain(
            model,
            tasks,
            make("standard", learning_rate=asked.learning_rate),
            asked.run,
            progress=progress,
        )
    pretrained: Any = outcome.model
    save_forecast_mae(pretrained, out)
    return {
        "out": str(out),
        "tasks": len(tasks),
        "scenes": sum(len(task.train) for task in tasks),
        "validation_loss": None if outcome.validation_score is None else -outcome.validation_score,
        "parameters": sum(p.numel() for p in outcome.model.parameters()),
        "cost": outcome.cost,
    }


def adapt_folder(
    base: Path,
    method: Any,
    run: Run,
    scenes: Path,
    out: Path,
    *,
    shots: int | None = None,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Adapts a pretrained model to each task; a folder of each in `out`.

    Args:
        base: A folder of `pretrain_folder`.
        method: `ForecastPEFT`, or `Full`, which puts an MLP head on the encoder.
        run: Steps, batch size.
        scenes: A file or a folder of scenes.
        out: Where.
        shots: Training scenes of each task; None for all.
        overwrite: Replace what is there.
        console: Is told how it goes.
    """
    _there(base, scenes)
    import foretune
    from foretune.forecasting.forecasters import add_head, load_forecast_mae
    from foretune.forecasting.model import save_forecast_mae
    from foretune.training.outcome import folder_name

    claim_model_folder(out, SUMMARY, overwrite=overwrite)
    model = load_forecast_mae(base)
    tasks = _load(scenes, model.sizes).with_objective(foretune.Forecast(**_steps(model.sizes)))
    if method.name == "full":
        add_head(model, spread=True)  # beginning alike, its modes stay alike
    with console.bar(f"adapting to {len(tasks)} tasks", rounds=len(tasks)) as progress:
        adapted = foretune.adapt(model, tasks, method, run, shots=shots, progress=progress)
    folders = {task.name: folder_name(task.name) for task in tasks}
    summary = {
        "base": str(base.resolve()),
        "method": method.to_dict(),
        "folders": folders,
        "cost": adapted.cost,
    }
    with whole_folder(out) as part:
        for name, folder in folders.items():
            if method.name == "full":
                adapted_model: Any = adapted.models[name, 0]
                save_forecast_mae(adapted_model, part / folder)
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
    """Measures adapted forecasters, each on its own task, beside constant velocity.

    Args:
        folder: Of `adapt_folder`, or a model with a forecaster, which is tried on all tasks.
        scenes: A file or a folder of scenes.
        split: The rows.
        base: The pretrained model, where it has moved since.
        page: An HTML file with the table and pictures; None for none.
        pictures: Scenes of each task on it.
        overwrite: Replace the page.
    """
    _there(folder, scenes)
    import foretune
    from foretune.forecasting.measures import forecast_rows, measures
    from foretune.forecasting.report import forecast_page, scene_figure
    from foretune.forecasting.scenes import in_focal_frame

    if page is not None and page.exists() and not overwrite:
        raise UserError(f"{page} is there already: --overwrite replaces it, another name leaves it")
    models = _Adapted(folder, base)
    objective = foretune.Forecast(**_steps(models.sizes))
    tasks = _load(scenes, models.sizes)
    rows, figures = [], []
    objective = objective.fit(tasks)
    for task in tasks:
        examples = task.split(split)
        model = models.of(task.name)
        if model is None or not examples:
            continue
        said = forecast_rows(model, examples, objective)
        about = {"task": task.name, "scenes": len(examples)}
        rows.append({"model": folder.name, **about, **measures(said)})
        still = measures(forecast_rows(None, examples, objective))
        keys = [key for key in rows[-1] if key not in ("model", *about)]
        rows.append(
            {"model": "constant velocity", **about}
            | {key: still[key if key in still else key.rstrip("0123456789") + "1"] for key in keys}
        )
        for i in range(min(pictures, len(examples))):
            scene = in_focal_frame(examples[i], models.sizes.history_steps, models.sizes.radius)
            drawn = scene_figure(scene, said[0][i].numpy(), said[1][i].softmax(0).numpy())
            figures.append((f"{task.name}, {split} scene {i + 1}", drawn))
    if not rows:
        raise UserError(
            f"{scenes} has no {split} scenes of a task that {folder} was adapted to "
            f"({', '.join(models.names)})"
        )
    if page is not None:
        write_whole(page, forecast_page(rows, figures, f"Forecasts of {folder.name}"))
    return {"rows": rows, "page": None if page is None else str(page)}


class _Adapted:
    """The model of each task in a folder, read when asked for."""

    def __init__(self, folder: Path, base: Path | None) -> None:
        from foretune.forecasting.forecasters import load_forecast_mae

        self.folder, self.single = folder, None
        summary = folder / SUMMARY
        if not summary.is_file():
            self.single = load_forecast_mae(folder)
            if self.single.forecaster is None:
                self.single.forecast({})  # says what is missing
            self.names, self.sizes = ["every task"], self.single.sizes
            return
        try:
            about = json.loads(summary.read_text("utf-8"))
            self.folders: dict[str, str] = about["folders"]
            self.method = make(**about["method"])
            place = base or Path(about["base"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {summary}: {error}") from error
        if not place.is_dir():
            raise UserError(f"the base {place} has moved: say where it is by --base")
        self.names = list(self.folders)
        self.base = load_forecast_mae(place)
        self.sizes = self.base.sizes

    def of(self, task: str) -> Any:
        """The task's model; None for a task that was not adapted to."""
        from foretune.forecasting.forecast_peft import load_adapted
        from foretune.forecasting.forecasters import load_forecast_mae

        if self.single is not None:
            return self.single
        if task not in self.folders:
            return None
        place = self.folder / self.folders[task]
        if self.method.name == "full":
            return load_forecast_mae(place)
        return load_adapted(place, self.base)


def _there(*paths: Path) -> None:
    """Asked first: a mistyped path must not wait for torch."""
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")


def _steps(sizes: ForecastMAEConfig) -> dict[str, Any]:
    return {
        "history_steps": sizes.history_steps,
        "future_steps": sizes.future_steps,
        "radius": sizes.radius,
    }


def _load(scenes: Path, sizes: ForecastMAEConfig) -> Any:
    from foretune.forecasting.readers import load_scenes

    return load_scenes(
        scenes,
        history_steps=sizes.history_steps,
        future_steps=sizes.future_steps,
        lane_points=sizes.lane_points,
    )
