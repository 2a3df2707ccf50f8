"""`foretune run reproduce-…`: its recipe, the files that it writes, and how it resumes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from foretune.errors import UserError
from foretune.recipes.schema import load_any
from foretune.recipes.yaml_io import parse_yaml
from foretune.theory import linear_panels
from foretune.theory.experiment import FORMAT, panels_of
from foretune.theory.recipe import (
    PANELS,
    ShallowRecipe,
    parse_experiment,
)
from format_checks import assert_versions_by_command

SMALL = ["seeds=2", "outer_steps=30", "draws=1", "num_problems=2", "problems=[{d: 4, k: 1, T: 3}]"]
SMALL += ["num_tasks=[3]", "shots=[100]", "ranks_for=[1]", "vary={d: [5], T: [2]}"]
TINY = ["seeds=1", "retrain_epochs=3", "adapt_epochs=2", "vary={d: [5], T: [2]}"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_any(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["reproduce-linear", "reproduce-shallow"])
def test_recipe_round_trips(name: str) -> None:
    recipe = load_any(name)
    assert parse_experiment(parse_yaml(recipe.to_yaml(), "again"), "again") == recipe


@pytest.mark.parametrize("experiment", PANELS)
def test_the_recipe_lists_the_panels_that_exist(experiment: str) -> None:
    assert [panel.name for panel in panels_of(experiment)] == PANELS[experiment]


def test_scale_sets_what_is_left_open_and_nothing_else() -> None:
    recipe = load_any("reproduce-shallow", ["scale=paper", "seeds=3"])
    assert isinstance(recipe, ShallowRecipe)
    assert (recipe.seeds, recipe.retrain_epochs, recipe.adapt_epochs) == (3, 40_000, 15_000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sedes=3", 'unknown key "sedes" on the command line. Did you mean "seeds"?'),
        ("vary.q=[1]", "vary.q"),
        ("problems=[{d: 3, k: 1, T: 3, N: 2}]", 'unknown key "problems.0.N"'),
        ("scale=big", "'pocket' or 'paper'"),
        ("experiment=liner", 'Did you mean "linear"?'),
        ("panels=[rank]", 'no panel "rank"'),
        ("shots=[5]", "must be above d, which goes up to 20; got 5"),
        ("seeds=0", "must not be below 1"),
        ("vary.d=[0]", "at least 1"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    assert message in refusal("reproduce-linear", override)


@pytest.mark.parametrize(
    "command", [["plan", "reproduce-linear"], ["retrain", "reproduce-shallow"]]
)
def test_other_commands_say_what_would_do(command: list[str]) -> None:
    result = call(*command)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert f"foretune run {command[1]}" in line


def test_a_bad_recipe_is_refused_without_torch() -> None:
    code = (
        "import sys; from foretune.recipes.schema import load_any\n"
        "try: load_any('reproduce-linear', ['sedes=1'])\n"
        "except Exception: print('torch' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "False\n"


@pytest.mark.slow
def test_run_leaves_tables_numbers_and_figures(folder: Path) -> None:
    result = call("run", "reproduce-linear", *SMALL, "--out", "here")
    assert result.exit_code == 0, result.stderr
    assert "Rank that the unseen task needs" in result.stdout
    stored = json.loads((folder / "here/result.json").read_text("utf-8"))
    assert list(stored["panels"]) == PANELS["linear"]
    page = (folder / "here/README.md").read_text("utf-8")
    assert page.count("**The paper.**") == page.count("**Result.**") == len(PANELS["linear"])
    for panel in panels_of("linear"):
        figure = folder / "here/figures" / f"{panel.name}.svg"
        assert figure.is_file() == (panel.figure is not None)
    assert json.loads((folder / "here/run.json").read_text("utf-8"))["environment"]["versions"]


def test_the_shallow_one_runs_and_prints_json() -> None:
    result = call("run", "reproduce-shallow", *TINY, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["panels"]["error"]["rows"]
    assert [(row["d"], row["T"], row["rank"]) for row in rows] == [
        (5, 3, 1),
        (10, 2, 1),
        (10, 2, 3),
    ]


def test_the_same_run_gives_the_same_files(folder: Path) -> None:
    panels = "panels=[rank-at-test, rate]"
    for out in ("one", "two"):
        assert call("run", "reproduce-linear", *SMALL, panels, "--out", out).exit_code == 0
    for name in ("figures/rank-at-test.svg", "figures/rate.svg"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


def test_a_killed_run_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_any("reproduce-linear", [*SMALL, "panels=[singular-values, two-tasks]"])

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    broken = [
        dataclasses.replace(panel, rows=killed) if panel.name == "two-tasks" else panel
        for panel in linear_panels.PANELS
    ]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(linear_panels, "PANELS", broken)
        recipe.run()
    done = recipe.folder / "panels/singular-values.json"
    before = done.stat().st_mtime_ns
    with pytest.raises(UserError, match="--resume"):
        recipe.run()
    result = recipe.run(resume=True)
    assert list(result["panels"]) == ["singular-values", "two-tasks"]
    assert done.stat().st_mtime_ns == before


def test_results_of_a_newer_version_are_refused(folder: Path) -> None:
    args = ("run", "reproduce-shallow", *TINY)
    assert call(*args, "--out", "here").exit_code == 0
    assert json.loads((folder / "here/result.json").read_text("utf-8"))["format"] == FORMAT
    file = folder / "here/panels/error.json"
    assert_versions_by_command(file, FORMAT, *args, "--out", "here", "--resume")


def test_another_recipe_does_not_resume(folder: Path) -> None:
    assert call("run", "reproduce-shallow", *TINY).exit_code == 0
    result = call("run", "reproduce-shallow", *TINY, "noise=0.2", "--resume")
    assert result.exit_code == 2
    assert "noise" in result.stderr
    assert call("run", "reproduce-shallow", *TINY, "noise=0.2", "--overwrite").exit_code == 0
