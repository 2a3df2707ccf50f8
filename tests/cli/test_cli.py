"""The command line: exit codes, one-line errors, JSON, and that it answers fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foretune
from command_line import call
from foretune.methods import METHODS
from foretune.recipes.schema import load_recipe, packaged_recipes
from foretune.recipes.templates import TEMPLATES

HEAVY = ("torch", "transformers", "peft", "pandas", "datasets", "accelerate")


def the_error(result: Any, code: int = 2) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "args",
    [["--help"], ["run", "--help"], ["ls"], ["show", "peft-ml"], ["run", "quickstart", "seedz=1"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(args: list[str]) -> None:
    code = (
        "import sys\nfrom foretune.cli import app\n"
        f"try: app({args!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "foretune.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"foretune {foretune.__version__}\n"


def test_help_names_every_command() -> None:
    shown = call("--help").stdout
    assert "..." not in shown.partition("Commands:")[2], "a summary is cut"
    for command in ("run", "init", "plan", "retrain", "adapt", "compare", "report", "ls", "show"):
        assert f"\n  {command} " in shown


def test_unknown_command_is_guessed() -> None:
    assert "Did you mean 'run'?" in the_error(call("rnu"))


def test_unknown_option_is_one_line() -> None:
    assert "--foo" in the_error(call("run", "quickstart", "--foo"))


def test_missing_argument_is_one_line() -> None:
    assert "foretune run --help" in the_error(call("run"))


def test_unknown_recipe_is_guessed() -> None:
    assert 'Did you mean "quickstart"?' in the_error(call("run", "quikstart"))


def test_unknown_key_names_key_and_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    text = packaged_recipes()["quickstart"]
    assert "  steps:" in text
    path.write_text(text.replace("  steps:", "  stepz:", 1))
    line = the_error(call("run", str(path)))
    assert line == f'error: unknown key "retrain.stepz" in {path}. Did you mean "retrain.steps"?'


def test_bad_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: x\nmodel: {name: minilm\ntasks: 3\n")
    assert f"{path}, line 3: bad YAML" in the_error(call("run", str(path)))


def test_convai2_says_where_the_data_is() -> None:
    line = the_error(call("run", "convai2"))
    assert "tasks.source=PATH" in line
    assert "valid_self_original" in line
    assert '"response"' in line


def test_missing_data_file_is_the_users_mistake(tmp_path: Path) -> None:
    missing = f"tasks.source={tmp_path / 'none.jsonl'}"
    result = call("run", "convai2", missing, f"out={tmp_path / 'out'}")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "retrain"])
def test_used_folder_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    line = the_error(call(command, "quickstart", "--out", str(tmp_path)))
    assert "--resume" in line
    assert "--overwrite" in line
    assert (tmp_path / "thesis.txt").exists()


def test_overwrite_spares_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    the_error(call("run", "quickstart", "--overwrite", "--out", str(tmp_path)))
    assert (tmp_path / "thesis.txt").exists()


def test_resume_refuses_another_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_recipe("quickstart", ["retrain.steps=7"]).to_yaml())
    (tmp_path / "bases").mkdir()
    line = the_error(call("run", "quickstart", "--resume", "--out", str(tmp_path)))
    assert "retrain.steps=7" in line


@pytest.mark.parametrize("template", TEMPLATES)
def test_init_writes_a_recipe_that_parses(tmp_path: Path, template: str) -> None:
    path = tmp_path / "mine.yaml"
    result = call("init", str(path), "--template", template)
    assert result.exit_code == 0
    assert load_recipe(path).name == "mine"


def test_init_refuses_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert "--overwrite" in the_error(call("init", str(path)))
    assert path.read_text() == "mine"


def test_unknown_template_is_guessed(tmp_path: Path) -> None:
    line = the_error(call("init", str(tmp_path / "x.yaml"), "--template", "choise"))
    assert 'Did you mean "choice"?' in line


def test_ls_lists_methods_and_recipes() -> None:
    shown = call("ls").stdout
    assert all(name in shown for name in [*METHODS, *packaged_recipes()])


def test_ls_takes_one_kind() -> None:
    assert list(json.loads(call("ls", "methods", "--json").stdout)) == ["methods"]
    assert 'Did you mean "methods"?' in the_error(call("ls", "metods"))


@pytest.mark.parametrize("method", METHODS)
def test_show_gives_every_field(method: str) -> None:
    shown = json.loads(call("show", method, "--json").stdout)
    assert shown["summary"]
    assert shown["help"].keys() == shown["fields"].keys()
    assert call("show", method).exit_code == 0


def test_show_prints_a_recipe_to_copy(tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(call("show", "quickstart").stdout)
    assert load_recipe(path) == load_recipe("quickstart")


def test_cite_prints_bibtex() -> None:
    shown = call("cite", "peft-ml").stdout
    assert shown.startswith("@article{block2025provable,")
    assert "eprint = {2410.22264}" in shown


def test_cite_without_a_paper_says_so() -> None:
    assert 'method "full" has no paper to cite' in the_error(call("cite", "full"))


@pytest.mark.parametrize(
    "args", [["ls"], ["show", "lora"], ["show", "quickstart"], ["cite", "peft-ml"]]
)
def test_json_is_all_there_is_on_stdout(args: list[str]) -> None:
    result = call(*args, "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)


def test_report_needs_a_comparison(tmp_path: Path) -> None:
    assert "comparison.json" in the_error(call("report", str(tmp_path)))


def test_adapt_needs_a_base(tmp_path: Path) -> None:
    line = the_error(call("adapt", str(tmp_path / "none"), "--tasks", "x.jsonl"))
    assert "no such folder" in line


@pytest.mark.parametrize("setting", ["shots=[2,4]", "draws=3", "search_tasks=2"])
@pytest.mark.parametrize("command", ["adapt", "compare"])
def test_a_setting_that_only_recipes_have_is_not_passed_over(command: str, setting: str) -> None:
    line = the_error(call(command, "minilm", setting, "--tasks", "x.jsonl"))
    assert f"{setting.split('=')[0]} is a setting of recipes" in line


def test_compare_refuses_odd_shots() -> None:
    assert "--shots" in the_error(call("compare", "a", "--tasks", "x.jsonl", "--shots", "1,x"))


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("odd\nthing"), 1, "RuntimeError: odd thing (this is a bug"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
    ],
    ids=["bug", "disk", "interrupt", "memory"],
)
def test_what_escapes_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("foretune.recipes.schema.load_recipe", fail)
    result = call("run", "quickstart")
    assert result.exit_code == code
    [line] = result.stderr.splitlines()
    assert says in line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr("foretune.recipes.schema.load_recipe", fail)
    assert "Traceback" in call("run", "quickstart", "--debug").stderr


def test_doctor_reports_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretune.cli.doctor.reachable", lambda: False)
    result = json.loads(call("doctor", "--json").stdout)
    names = {check["name"] for check in result["checks"]}
    assert {"python", "torch", "threads", "memory", "disk", "minilm", "hub"} <= names
    assert result["ready"]
