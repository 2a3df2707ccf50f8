"""Ctrl-C and SIGTERM end the program at any moment, with one line and 128 + the signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from foretune.cli import app, signals
from recipes.killed_recipe import write_inputs

PROGRAM = "import foretune.cli, sys; print('started', flush=True); foretune.cli.main()"
LONG = (
    *("run", "kills.yaml", "retrain.steps=1000000", "retrain.methods=[peft-ml]"),
    *("retrain.learning_rates=[0.1]", "adapt.steps=3"),
)
LINE = "; --resume continues from the last checkpoint, if there is one"


def started(folder: Path, *args: str) -> subprocess.Popen[str]:
    """The program at the moment at which its own code begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_is_one_line(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()
    inputs = sorted(path.name for path in tmp_path.iterdir())
    for delay in (0.02, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0):
        with started(tmp_path, *LONG, "--out", "out", "--overwrite") as process:
            time.sleep(delay)
            process.send_signal(number)
            out, errors = process.communicate()
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert (process.returncode, out) == (128 + number, "")
        assert errors.splitlines()[-1] == f"{word}{LINE}"
        assert "Traceback" not in errors and "Exception" not in errors
        left = sorted(path.name for path in tmp_path.iterdir())
        assert [name for name in left if name not in ("out", ".unfinished-out")] == inputs


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_result_leaves_no_folder(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()
    with started(tmp_path, *LONG, "retrain.eval_every=0", "--out", "deep/out") as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("model:") for line in lines)
        assert (tmp_path / "deep" / "out").is_dir()
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1].endswith(LINE)
    assert not (tmp_path / "deep").exists()


def test_only_commands_that_resume_speak_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {
        name
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        if any("--resume" in parameter.opts for parameter in command.params)
    }
    assert commands == {*signals.RESUMABLE}
    for words, ending in ((["run", "x.yaml"], LINE), (["watch", "runs/x"], ""), ([], "")):
        monkeypatch.setattr("sys.argv", ["foretune", "--debug", *words])
        assert signals.message(signal.SIGINT) == f"interrupted{ending}"


SWALLOWED = """
import os, signal, time
from foretune import claims
from foretune.cli import signals

signals.install()
claims._held.add("a folder")
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:  # as a callback of a library does
    pass
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("again")
claims._held.clear()
time.sleep(1.5)
print("given back in peace")
"""


def test_an_interrupt_that_a_library_swallows_comes_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False
    )
    assert done.stdout == "again\ngiven back in peace\n", done.stderr
