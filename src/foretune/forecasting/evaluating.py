"""The work of `foretune forecast eval`: adapted forecasters against constant velocity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from foretune.claims import claim_file
from foretune.errors import UserError
from foretune.files import write_whole
from foretune.forecasting.folders import FORMAT, SUMMARY, check_exist, load_for, steps_of
from foretune.formats import damage_named, read_json
from foretune.methods import make


class Adaptation(TypedDict):
    """The fields of `SUMMARY` that are read back."""

    base: str
    method: dict[str, Any]
    folders: dict[str, str]  # by task
    held_out: NotRequired[dict[str, dict[str, Any]]]  # a `Choice` by task


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
        "rows", the metrics of each model and task; "notes", what was chosen and where constant
        velocity is ahead; and
        "page", its path or None.

    Raises:
        UserError: The page exists, a model or the scenes cannot be read, or no task has both a
            model and scenes.
    """
    check_exist(folder, scenes)
    import foretune
    from foretune.forecasting.choosing import CONSTANT_VELOCITY, FORECASTER
    from foretune.forecasting.measures import forecast_rows, measures
    from foretune.forecasting.report import forecast_page, scene_figure
    from foretune.forecasting.scenes import in_focal_frame

    if page is not None:
        claim_file(page, overwrite=overwrite, reads=[folder, scenes])
    models = _AdaptedModels(folder, base)
    objective = foretune.Forecast(**steps_of(models.sizes))
    tasks = load_for(scenes, models.sizes)
    objective = objective.fit(tasks)
    rows, figures = [], []
    behind: dict[str, list[str]] = {}  # tasks where constant velocity is ahead, by metric
    for task in tasks:
        examples = task.split(split)
        model = models.model_of(task.name)
        if model is None or not examples:
            continue
        forecasts = forecast_rows(model, examples, objective)
        straight = forecast_rows(None, examples, objective)
        cell = {"task": task.name, "scenes": len(examples)}
        metrics, baseline = measures(forecasts), measures(straight)
        # Constant velocity has a single mode: its best of K is its only one.
        baseline = {
            key: baseline[key if key in baseline else key.rstrip("0123456789") + "1"]
            for key in metrics
        }
        chosen = models.chosen.get(task.name)
        for name, what, values in (
            (folder.name, FORECASTER, metrics),
            (CONSTANT_VELOCITY, CONSTANT_VELOCITY, baseline),
        ):
            mark = {} if not models.chosen else {"chosen": "yes" if what == chosen else ""}
            rows.append({"model": name, **cell, **values, **mark})
        for key in (key for key in metrics if key.startswith("minFDE")):
            if baseline[key] < metrics[key]:
                behind.setdefault(key, []).append(task.name)
        shown = straight if chosen == CONSTANT_VELOCITY else forecasts
        for i in range(min(pictures, len(examples))):
            scene = in_focal_frame(examples[i], models.sizes.history_steps, models.sizes.radius)
            trajectories, probabilities = shown[0][i], shown[1][i].softmax(0)
            svg = scene_figure(scene, trajectories.numpy(), probabilities.numpy())
            figures.append((f"{task.name}, {split} scene {i + 1}", svg))
    if not rows:
        raise UserError(
            f"{scenes} has no {split} scenes of the tasks that {folder} was adapted to "
            f"({', '.join(models.names)})"
        )
    if page is not None:
        write_whole(page, forecast_page(rows, figures, f"Forecasts of {folder.name}"))
    metrics_of: dict[str, list[str]] = {}  # by the tasks, several metrics often being alike
    for key, names in behind.items():
        metrics_of.setdefault(", ".join(names), []).append(key)
    tasks_by_choice: dict[str, list[str]] = {}  # tasks by what was chosen for them
    for task_name, what in models.chosen.items():
        tasks_by_choice.setdefault(what, []).append(task_name)
    notes = [
        f"Chosen on held-out scenes: {what} for {', '.join(names)}."
        for what, names in tasks_by_choice.items()
    ]
    notes += [
        f"Constant velocity is ahead by {', '.join(keys)} on {names}."
        for names, keys in metrics_of.items()
    ]
    return {"rows": rows, "notes": notes, "page": None if page is None else str(page)}


class _AdaptedModels:
    """The models of a folder's tasks, each loaded on request."""

    def __init__(self, folder: Path, base: Path | None) -> None:
        from foretune.forecasting.forecasters import load_forecast_mae

        self.folder, self.single = folder, None
        self.chosen: dict[str, str] = {}  # by task
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
            held_out = adaptation.get("held_out", {})
            self.chosen = {task: str(choice["chosen"]) for task, choice in held_out.items()}
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
