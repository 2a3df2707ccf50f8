"""What follows a run besides the console: its journal, and the trackers of the recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from foretune.processes import process_rank
from foretune.recipes.console import Console, Consoles
from foretune.recipes.folder import flat
from foretune.recipes.journal import Journal
from foretune.recipes.schema import Recipe
from foretune.recipes.trackers import TrackerConsole, as_settings


@contextlib.contextmanager
def observed(console: Console, recipe: Recipe, folder: Path) -> Iterator[Console]:
    """A console that also writes the journal of a run and passes its figures on to trackers.

    Args:
        console: The console of the run.
        recipe: The recipe, with the names of the trackers.
        folder: Folder of the run, which is claimed.

    Yields:
        The console to report to; of several processes only the first is followed.
    """
    if process_rank() > 0:
        yield console
        return
    settings = as_settings(flat(recipe.model_dump(mode="json")))
    with contextlib.ExitStack() as closing:
        observers: list[Console] = [console, Journal(folder)]
        for name in dict.fromkeys(recipe.trackers):
            tracker = TrackerConsole(name, recipe.name, settings, folder, console)
            closing.push(partial(_close, tracker))
            observers.append(tracker)
        yield Consoles(observers)


def _close(tracker: TrackerConsole, error: type[BaseException] | None, *_: object) -> None:
    """Ends a tracker's run, which has failed if an error ended the block."""
    tracker.close(failed=error is not None)
