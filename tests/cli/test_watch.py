"""`foretune watch` follows a run that another process makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import call, the_error, the_json
from foretune.claims import output_folder
from foretune.cli.watch import Replay
from foretune.errors import ForetuneError
from foretune.files import PROGRESS_FILE, write_whole
from foretune.manifest import is_claimed
from foretune.recipes.console import Console, Consoles
from foretune.recipes.journal import Journal, JournalReader
from foretune.recipes.templates import template_text

SMALL = (
    *("name=my", "model.tower=[6]", "tasks.unseen=2", "retrain.methods=[none, standard]"),
    *("retrain.steps=4", "retrain.learning_rate=1e-2", "retrain.learning_rates=null"),
    *("adapt.methods=null", "adapt.method=lora", "adapt.learning_rate=1e-2", "adapt.steps=3"),
    *("adapt.shots=[2]", "seeds=1"),
)
# A run that another process has begun, and that says one more line when it is told to go on.
RUNNING = """
import sys
from pathlib import Path
from foretune.claims import output_folder
from foretune.recipes.folder import write_run_record
from foretune.recipes.journal import Journal
with output_folder(Path("run"), "run", overwrite={overwrite}) as folder:
    journal = Journal(folder)
    journal.say("tasks: 3 seen")
    (folder / "base").mkdir()
    print("begun", flush=True)
    sys.stdin.readline()
    journal.say("and done")
    {last}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    task = np.repeat([f"t{i}" for i in range(5)], 40)
    np.savez("data.npz", task=task, x=x, y=(x[:, 0] > 0).astype(np.int64))
    Path("my.yaml").write_text(template_text("arrays"))
    return tmp_path / "my.yaml"


def test_a_finished_run_shows_what_it_said_and_its_result(recipe: Path) -> None:
    run = call("run", "my.yaml", *SMALL)
    assert run.exit_code == 0, run.output
    watched = call("watch", "runs/my")
    assert watched.exit_code == 0
    assert watched.stderr == run.stderr
    table, _, _ = run.stdout.partition("\n\nReport:")
    assert watched.stdout.startswith(table)
    assert (
        the_json("watch", "runs/my")["verdict"]
        == the_json("run", "my.yaml", *SMALL, "--resume")["verdict"]
    )
    # The journal is of use to nobody once it is damaged, and harms nobody.
    with Path("runs/my", PROGRESS_FILE).open("ab") as file:
        file.write(b'{"time": 1, "say": "to\n\xff\xfe\n[]\n{"share": "x"}\n{"time')
    assert call("watch", "runs/my").exit_code == 0


def test_a_run_has_many_names(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run", "my.yaml", *SMALL).exit_code == 0
    shown = call("watch", "runs/my")
    assert "loading PyTorch" not in shown.stderr
    Path("link").symlink_to("runs/my")
    for name in ("runs/my/", "link", "runs/my/figures/.."):
        assert call("watch", name).stderr == shown.stderr
    monkeypatch.chdir("runs/my")
    assert call("watch", ".").stderr == shown.stderr
    # A journal that leads elsewhere is not written.
    Path(PROGRESS_FILE).unlink()
    Path(PROGRESS_FILE).symlink_to(recipe)
    monkeypatch.chdir(recipe.parent)
    assert "is a symbolic link" in call("run", "my.yaml", *SMALL, "--resume").stderr
    assert recipe.read_text() == template_text("arrays")


def test_a_retraining_can_be_watched(recipe: Path) -> None:
    assert call("retrain", "my.yaml", "--method", "standard", "--out", "ml", *SMALL).exit_code == 0
    watched = call("watch", "ml")
    assert watched.exit_code == 0
    assert watched.stdout == "finished: ml\n"
    assert "standard, seed 0" in watched.stderr
    record = json.loads(Path("ml/run.json").read_text())
    Path("ml/run.json").write_text(json.dumps({**record, "finished": False}))  # as if killed
    watched = call("watch", "ml")
    assert watched.exit_code == 1
    assert "the run in ml has stopped before its end" in watched.stderr


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if overwrite:
        with output_folder(Path("run"), "run") as folder:
            Journal(folder).say("the earlier one")
            write_whole(folder / "report.html", "")
    code = RUNNING.format(overwrite=overwrite, last="write_run_record(folder)")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        place = tmp_path / (".unfinished-run" if overwrite else "run")
        assert is_claimed(place)
        with subprocess.Popen(
            [sys.executable, "-m", "foretune", "watch", "run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as watching:
            assert watching.stderr is not None and watching.stdout is not None
            assert watching.stderr.readline() == "tasks: 3 seen\n"
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert watching.stderr.readline() == "and done\n"
            assert watching.stdout.read() == "finished: run\n"
            assert watching.stderr.read() == ""
        assert watching.returncode == 0
    assert not is_claimed(place)


def test_a_run_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = RUNNING.format(
        overwrite=False, last="import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], input="\n", text=True, check=False)
    result = call("watch", "run")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "tasks: 3 seen",
        "and done",
        "error: the run in run has stopped before its end: start it again with --resume",
    ]


def test_there_is_nothing_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder" in the_error("watch", "nowhere")
    assert "there is no such folder" in the_error("watch", "a" * 300)
    for name in ("", "."):
        assert f"it holds no {PROGRESS_FILE}" in the_error("watch", name)
    Path("a").mkdir()
    assert f"it holds no {PROGRESS_FILE}" in the_error("watch", "a")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.path = Path("/dev/full")
    with pytest.raises(ForetuneError, match="the disk is full: could not write /dev/full"):
        journal.say("tasks: 3 seen")


class Recorder(Console):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def say(self, line: str) -> None:
        self.events.append(line)


def test_the_journal_holds_what_every_console_is_told(tmp_path: Path) -> None:
    recorder = Recorder()
    console = Consoles([recorder, Journal(tmp_path)])
    console.say("fünf tasks")
    with console.bar("standard", rounds=2) as progress:
        assert progress is not None
        for update in (1, 2, 1, 2):
            progress(update, 2, {"loss": 0.5})
    reader = JournalReader(tmp_path / PROGRESS_FILE)
    events = [*reader.events()]
    assert [*reader.events()] == []
    reader.close()
    assert [e.get("say") or e.get("begin") or e.get("end") or e["share"] for e in events] == [
        *("fünf tasks", "standard", 0.25, 1.0, "standard"),
    ]
    assert json.dumps(events).count('"loss": 0.5') == 2
    again = Recorder()
    replay = Replay(again)
    for event in events:
        replay.show(event)
    replay.close()
    assert again.events == recorder.events
