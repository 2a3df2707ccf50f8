"""Trackers of a run (TensorBoard, Trackio, W&B, MLflow), through accelerate's classes for them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from foretune.errors import ForetuneError, UserError
from foretune.files import write_whole
from foretune.manifest import final_path, record_folder
from foretune.recipes.console import Console, Progress

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
TRACKERS = "trackers"  # the folder in that of a run
ID_FILE = "id.json"  # in it: what the run is called in the trackers, so that it can be resumed
# What mlflow gets unless the user has set it: no usage statistics, and no minutes of waiting for a
# server that does not answer.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
LONGEST = 5000  # characters of a value in the settings; mlflow has a limit
INTERVAL_S = 0.2  # minimum time between two points of one curve; the first and last are logged


def check_trackers(names: list[Tracker]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        UserError: One is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed: pip install {name}")


class TrackerConsole(Console):
    """Passes the figures of a run on to a tracker.

    It starts with the first figure. Then an error ends the run; a later one ends only the tracker.

    Args:
        name: Name of the tracker.
        project: What the run belongs to.
        settings: The recipe, as names and values.
        folder: Folder of the run.
        console: Receives that a tracker has ended early.
    """

    def __init__(
        self,
        name: Tracker,
        project: str,
        settings: Mapping[str, Any],
        folder: Path,
        console: Console,
    ) -> None:
        self.name, self.project, self.settings = name, project, settings
        self.folder, self.console = folder / TRACKERS, console
        self.run_name = Path(final_path(folder)).name
        self.tracker: Any = None
        self.is_over = False
        self.steps: dict[str, Steps] = {}

    @override
    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        pending: tuple[dict[str, float], int] | None = None

        def progress(update: int, updates: int, figures: dict[str, Any]) -> None:
            nonlocal pending
            curve = curve_name(label, *([figures["doing"]] if "doing" in figures else []))
            steps = self.steps.setdefault(curve, Steps())
            due = steps.is_due(update, updates)
            numbers = {
                f"{curve}/{name}": float(value)
                for name, value in figures.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
            pending = None if due else (numbers, steps.total)
            if due:
                self._log(numbers, steps.total)

        yield progress
        if pending is not None:  # the training stopped early
            self._log(*pending)

    @override
    def results(self, comparison: Mapping[str, Any]) -> None:
        by_shots: dict[int | None, dict[str, float]] = {}
        for mean in comparison["means"]:
            figures = by_shots.setdefault(mean["shots"], {})
            figures[f"adapted/{curve_name(mean['base'])}"] = mean["mean"]
        for pair in comparison["pairs"]:
            bases = f"{curve_name(pair['a'])}/over/{curve_name(pair['b'])}"
            by_shots[pair["shots"]][f"difference/{bases}"] = pair["difference"]
        for shots, figures in by_shots.items():
            if shots is None:
                self._log({f"all_rows/{name}": value for name, value in figures.items()}, 0)
            else:
                self._log(figures, shots)
        sentence = comparison["verdict"]["sentence"]
        if self.name == "mlflow":  # whose metrics are numbers only
            self._safely(lambda tracker: _set_tag(tracker, "verdict", sentence))
        else:
            self._safely(lambda tracker: tracker.log({"verdict": sentence}, step=0))

    def close(self, *, failed: bool = False) -> None:
        """Ends the tracker's run.

        Args:
            failed: The run has not come to its end.
        """
        if self.tracker is not None:
            self._safely(lambda tracker: _finish(tracker, failed=failed))

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        if figures:
            self._safely(lambda tracker: tracker.log(dict(figures), step=step))

    def _safely(self, work: Callable[[Any], None]) -> None:
        """Works on the tracker. If that fails, the run goes on without it."""
        if self.is_over:
            return
        if self.tracker is None:
            self.tracker = self._start()
        try:
            work(self.tracker)
        except Exception as error:
            self.is_over = True
            with contextlib.suppress(Exception):
                _finish(self.tracker, failed=True)
            self.console.say(f"{self.name} fails, the run goes on without it: {_one_line(error)}")

    def _start(self) -> Any:
        record_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            from accelerate import PartialState

            PartialState()  # accelerate's trackers need it
            tracker = self._make()
            tracker.start()
            tracker.store_init_configuration(dict(self.settings))
        except Exception as error:
            raise ForetuneError(
                f"the tracker {self.name} does not start: {_one_line(error)}"
            ) from error
        if self.name == "mlflow":
            self._ids(mlflow=tracker.tracker.info.run_id)
        return tracker

    def _make(self) -> Any:
        from accelerate import tracking

        ids = self._ids()
        name = f"{self.run_name}-{ids['id']}"
        if self.name == "tensorboard":
            return tracking.TensorBoardTracker("", logging_dir=self.folder / "tensorboard")
        if self.name == "trackio":
            return tracking.TrackioTracker(self.project, name=name, resume="allow")
        if self.name == "wandb":
            return tracking.WandBTracker(
                self.project, name=name, id=ids["id"], resume="allow", dir=str(self.folder)
            )
        for variable, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(variable, value)
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri((self.folder / "mlflow").resolve().as_uri())
        return tracking.MLflowTracker(self.project, run_id=ids.get("mlflow"), run_name=name)

    def _ids(self, **new: str) -> dict[str, str]:
        """What the run is called in the trackers."""
        path = self.folder / ID_FILE
        try:
            ids = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            ids = {"id": uuid.uuid4().hex[:8]}
        ids |= new
        write_whole(path, json.dumps(ids))
        return ids


class Steps:
    """The steps of a curve on which several trainings may follow one another."""

    def __init__(self) -> None:
        self.before, self.last, self.logged_at = 0, 0, -math.inf

    def is_due(self, update: int, updates: int) -> bool:
        """Whether this update is to be logged; counts it."""
        if update <= self.last:
            self.before += self.last
        self.last = update
        due = time.monotonic() - self.logged_at >= INTERVAL_S or update in (1, updates)
        if due:
            self.logged_at = time.monotonic()
        return due

    @property
    def total(self) -> int:
        """Updates so far, of all trainings."""
        return self.before + self.last


def curve_name(*labels: str) -> str:
    """A name that every tracker takes, in parts.

    Brackets and blanks are dropped, other characters that mlflow refuses are named by their code.

    >>> curve_name("standard (learning_rate 1e-4), seed 0"), curve_name("peft-ml+")
    ('standard_learning_rate_1e-4/seed_0', 'peft-mlx2b')
    """
    parts = [part for label in labels for part in re.split(r"[,:] ", label)]
    words = [re.sub(r"[\s()\[\]{}'\",]+", "_", part).strip("_") for part in parts]
    return "/".join(re.sub(r"[^\w.-]", lambda c: f"x{ord(c[0]):x}", word) for word in words)


def as_settings(recipe: Mapping[str, object]) -> dict[str, str | int | float | bool]:
    """The values of a recipe by dotted key as every tracker takes them: lists and nulls as JSON.

    >>> as_settings({"adapt.shots": [2, None], "tasks.columns.kg/m² (dry)": "x"})
    {'adapt.shots': '[2, null]', 'tasks.columns.kg/m² _dry_': 'x'}
    """
    settings: dict[str, str | int | float | bool] = {}
    for key, value in recipe.items():
        name = re.sub(r"[^\w./ -]", "_", key)  # a column may have any name
        if isinstance(value, int | float):
            settings[name] = value
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            settings[name] = text[:LONGEST]
    return settings


def _set_tag(tracker: Any, key: str, value: str) -> None:
    import mlflow

    mlflow.MlflowClient().set_tag(tracker.tracker.info.run_id, key, value)


def _finish(tracker: Any, *, failed: bool) -> None:
    if tracker.name == "trackio":  # accelerate's `finish` does not keep it from a second one
        import trackio

        trackio.finish()
    elif failed and tracker.name == "mlflow":  # accelerate's calls each run finished
        import mlflow

        mlflow.end_run("FAILED")
    elif failed and tracker.name == "wandb":
        tracker.tracker.finish(exit_code=1)
    else:
        tracker.finish()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
