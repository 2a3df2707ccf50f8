"""`foretune watch`: follows a run from another terminal."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from foretune.claims import place_beside
from foretune.cli.compare_report import read_comparison
from foretune.cli.output import Json, comparison_text, emit, emit_json, quiet_stdout
from foretune.cli.progress import StderrConsole
from foretune.errors import ForetuneError, UserError
from foretune.files import COMPARISON_FILE, PROGRESS_FILE, REPORT_FILE
from foretune.manifest import is_claimed
from foretune.recipes.console import Console, Progress
from foretune.recipes.folder import is_finished
from foretune.recipes.journal import JournalReader

POLL_S = 0.5  # seconds between two looks at the journal
RESOLUTION = 10_000  # parts of a bar


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a retraining.")],
    json: Json = False,
) -> None:
    """Follow a run from another terminal until it ends.

    Shows what the run has shown so far and goes on to show, then its result. It only reads: Ctrl-C
    ends watching, not the run.
    """
    console = StderrConsole()
    place = _followed(run)
    with contextlib.ExitStack() as closing:
        reader = JournalReader(place / PROGRESS_FILE)
        closing.callback(reader.close)
        replay = Replay(console)
        closing.callback(replay.close)
        while True:
            running = is_claimed(place)
            for event in reader.events():
                replay.show(event)
            if not running:
                break
            time.sleep(POLL_S)
    _check_finished(run, place)
    compared = (run / COMPARISON_FILE).is_file()
    comparison = read_comparison(run / COMPARISON_FILE) if compared else {}
    if json:
        emit_json({"out": str(run), **comparison})
    elif compared:
        with quiet_stdout(loads_torch=False):
            text = comparison_text(comparison)
        emit(f"{text}\n\nReport: {run / REPORT_FILE}")
    else:
        emit(f"finished: {run}")


class Replay:
    """Shows the events of a journal as the run itself does.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = contextlib.ExitStack()
        self.progress: Progress | None = None

    def show(self, event: dict[str, object]) -> None:
        """Shows one event; passes over what it does not know."""
        if "say" in event:
            self.console.say(str(event["say"]))
        elif "begin" in event:
            self.close()
            self.progress = self.bars.enter_context(self.console.bar(str(event["begin"])))
        elif "end" in event:
            self.close()
        elif isinstance(share := event.get("share"), float) and self.progress is not None:
            figures = event.get("figures")
            done = round(share * RESOLUTION)
            self.progress(done, RESOLUTION, figures if isinstance(figures, dict) else {})

    def close(self) -> None:
        """Ends the bar that is shown."""
        self.bars.close()
        self.progress = None


def _check_finished(run: Path, place: Path) -> None:
    """Checks that a run that no process holds any more has come to its end.

    Raises:
        ForetuneError: It has not.
    """
    if not is_finished(run) or (place != run and place.exists()):
        raise ForetuneError(
            f"the run in {run} has stopped before its end: start it again with --resume"
        )


def _followed(run: Path) -> Path:
    """The folder in which a run writes: its own, or one beside it while it replaces another.

    Raises:
        UserError: There is no run, or one of an earlier version.
    """
    place = run
    with contextlib.suppress(OSError, UserError):  # a name that is too long, or no place beside it
        beside = place_beside(run.resolve() if run.name in ("", "..") else run)
        place = beside if beside.is_dir() and is_claimed(beside) else run
    if not os.path.isdir(run) and place == run:  # noqa: PTH112  # `is_dir` fails on a long name
        raise UserError(f"no run in {run}: there is no such folder")
    if not (place / PROGRESS_FILE).is_file():
        raise UserError(f"no run to follow in {run}: it holds no {PROGRESS_FILE}")
    return place
