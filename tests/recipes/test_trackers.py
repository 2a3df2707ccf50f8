"""Trackers receive the figures of a run: read back with each tracker's own reader, offline."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from command_line import call, the_error, the_json
from foretune.recipes import trackers
from foretune.recipes.console import Console, Rounds
from foretune.recipes.observers import observed
from foretune.recipes.schema import load_recipe
from foretune.recipes.templates import template_text
from foretune.recipes.trackers import Steps, TrackerConsole, as_settings, curve_name

SMALL = (
    *("name=my", "model.tower=[6]", "tasks.unseen=2", "retrain.methods=[none, standard]"),
    *(
        "retrain.steps=6",
        "retrain.patience=null",
        "retrain.learning_rate=1e-2",
        "retrain.learning_rates=null",
    ),
    *("adapt.methods=null", "adapt.method=lora", "adapt.learning_rate=1e-2", "adapt.steps=3"),
    *("adapt.shots=[2, all]", "seeds=1"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 40, 4)).astype(np.float32)
    y = (np.einsum("tnd,td->tn", x, rng.normal(size=(5, 4))) > 0).astype(np.int64)
    task = np.repeat([f"t{i}" for i in range(5)], 40)
    np.savez("data.npz", task=task, x=x.reshape(-1, 4), y=y.reshape(-1))
    Path("my.yaml").write_text(template_text("arrays"))
    return tmp_path


def test_three_trackers_hold_the_run(folder: Path) -> None:
    comparison = the_json("run", "my.yaml", *SMALL, "trackers=[tensorboard, trackio, mlflow]")
    score = {(mean["base"], mean["shots"]): mean["mean"] for mean in comparison["means"]}
    history = comparison["bases"][1]["retrain"]["curve"]
    run = folder / "runs" / "my"
    [event_folder] = {f.parent for f in (run / "trackers" / "tensorboard").glob("events*")}
    for curves in (of_tensorboard(event_folder), of_trackio(), of_mlflow(run)):
        losses = curves["standard/seed_0/loss"]
        assert {1, 6} <= losses.keys() <= {*range(1, 7)}  # others where a fifth of a second passed
        assert losses[6] == pytest.approx(history[-1]["loss"], rel=1e-5)
        rates = curves["standard/seed_0/learning_rate"]
        assert rates[6] == pytest.approx(1e-2 * (1 - 5 / 6) / 0.9, rel=1e-5)
        assert curves["standard/seed_0/score"]
        assert curves["adapting_2_bases/seed_0/loss"]
        assert curves["adapted/standard"] == pytest.approx(
            {k: score["standard", k] for k in (0, 2)}, rel=1e-5
        )
        assert curves["all_rows/adapted/standard"][0] == pytest.approx(score["standard", None])
        pair = comparison["pairs"][0]
        assert set(curves[f"difference/{pair['a']}/over/{pair['b']}"]) == {2}


def test_the_recipe_and_the_verdict_are_there(folder: Path) -> None:
    import mlflow

    comparison = the_json("run", "my.yaml", *SMALL, "trackers=[mlflow]")
    [record] = mlflow_runs(folder / "runs" / "my")
    assert record.data.params["retrain.steps"] == "6"
    assert record.data.params["adapt.shots"] == '[2, "all"]'
    assert record.data.tags["verdict"] == comparison["verdict"]["sentence"]
    assert record.info.status == "FINISHED"
    # A run that is resumed goes on in the trackers, too; and is no obstacle to --overwrite.
    assert call("run", "my.yaml", *SMALL, "trackers=[mlflow]", "--resume").exit_code == 0
    assert len(mlflow_runs(folder / "runs" / "my")) == 1
    assert call("run", "my.yaml", *SMALL, "--resume").exit_code == 0  # trackers may differ
    assert call("run", "my.yaml", *SMALL, "--overwrite").exit_code == 0
    assert not (folder / "runs" / "my" / "trackers").exists()
    assert mlflow.active_run() is None


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for command in ("run", "plan"):
        line = the_error(command, "my.yaml", *SMALL, "trackers=[wandb]")
        assert "wandb is not installed: pip install wandb" in line
    assert not (folder / "runs").exists()


def test_an_unknown_tracker_is_a_mistake(folder: Path) -> None:
    assert "tensorboard" in the_error("run", "my.yaml", *SMALL, "trackers=[tensorbord]")


def test_a_tracker_that_does_not_start_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a-file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    result = call("run", "my.yaml", *SMALL, "trackers=[mlflow]")
    assert result.exit_code == 1
    assert "error: the tracker mlflow does not start: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_is_interrupted_has_not_finished(folder: Path) -> None:
    recipe = load_recipe("my.yaml", [*SMALL, "trackers=[mlflow]"])
    states = []
    for error in (KeyboardInterrupt, None):
        with (
            pytest.raises(error) if error else contextlib.nullcontext(),
            observed(Console(), recipe, folder) as console,
            console.bar("standard, seed 0") as progress,
        ):
            assert progress is not None
            progress(1, 2, {"loss": 0.5})
            if error:
                raise error
        [record] = mlflow_runs(folder)
        states.append(record.info.status)
    assert states == ["FAILED", "FINISHED"]


def test_mlflow_sends_no_statistics_and_does_not_wait_for_minutes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import environment_variables as variables

    for name in trackers.MLFLOW_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is removed again
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    TrackerConsole("mlflow", "my", {}, folder, Console())._make()
    assert variables.MLFLOW_DISABLE_TELEMETRY.get()
    assert variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 2
    assert variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 7  # the user's


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow"])
def test_a_recipe_may_name_any_column_and_be_long(
    folder: Path, name: Literal["tensorboard", "trackio", "mlflow"]
) -> None:
    settings = as_settings({"tasks.columns.Wert (°C)": "x", "tasks.args": ["y" * 7000]})
    console = TrackerConsole(name, "läuft", settings, folder, Console())
    with console.bar("standard, seed 0") as progress:
        assert progress is not None
        progress(1, 1, {"loss": 0.5})
    assert not console.is_over
    console.close()


class Broken:
    """A tracker that takes one figure."""

    name = "mlflow"
    logged = 0

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.logged += 1
        if self.logged > 1:
            raise OSError("the server\nis gone")

    def finish(self) -> None:
        raise OSError("it is gone")


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path: Path) -> None:
    lines: list[str] = []

    class Lines(Console):
        def say(self, line: str) -> None:
            lines.append(line)

    console = TrackerConsole("mlflow", "my", {}, tmp_path, Lines())
    console.tracker = broken = Broken()  # type: ignore[assignment]
    with console.bar("standard, seed 0") as progress:
        assert progress is not None
        for _ in range(4):
            progress(1, 1, {"loss": 0.5, "doing": "a trial", "score": None})
    console.close()
    assert broken.logged == 2
    assert lines == ["mlflow fails, the run goes on without it: OSError: the server is gone"]


def test_trainings_one_after_another_make_one_curve() -> None:
    steps = Steps()
    totals = []
    for update in (1, 2, 3, 1, 2):
        assert steps.is_due(update, 3) or update == 2
        totals.append(steps.total)
    assert totals == [1, 2, 3, 4, 5]
    assert Rounds(1).share(1, 2) == 0.5
    assert curve_name("standard, seed 0: how to adapt", "lora 1e-3") == (
        "standard/seed_0/how_to_adapt/lora_1e-3"
    )


def of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def of_trackio() -> dict[str, dict[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("my")
    curves: dict[str, dict[int, float]] = {}
    for row in SQLiteStorage.get_logs("my", run):
        for name, value in row.items():
            if isinstance(value, int | float):
                curves.setdefault(name, {})[row["step"]] = value
    return curves


def mlflow_runs(run: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient((run / "trackers" / "mlflow").as_uri())
    experiments = [e.experiment_id for e in client.search_experiments(filter_string="name='my'")]
    return list(client.search_runs(experiments))


def of_mlflow(run: Path) -> dict[str, dict[int, float]]:
    import mlflow

    client = mlflow.MlflowClient((run / "trackers" / "mlflow").as_uri())
    [record] = mlflow_runs(run)
    return {
        name: {m.step: m.value for m in client.get_metric_history(record.info.run_id, name)}
        for name in record.data.metrics
    }
