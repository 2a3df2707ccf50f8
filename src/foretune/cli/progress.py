"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from foretune.processes import process_rank
from foretune.recipes.console import Console, Progress

QUIET_S = 10.0  # the least time between two plain lines of one bar


class Rounds:
    """Counts several trainings, one after the other, as one."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.round, self.last = rounds, 0, 0

    def share(self, step: int, steps: int) -> float:
        """The share that is done, from 0 to 1.

        >>> rounds = Rounds(2)
        >>> [rounds.share(step, 2) for step in (1, 2, 1, 2)]
        [0.25, 0.5, 0.75, 1.0]
        """
        if step <= self.last:
            self.round += 1
        self.last = step
        return min(1.0, (self.round + step / steps) / max(self.rounds, self.round + 1))


class StderrConsole(Console):
    """Says everything on stderr; of several processes the first does."""

    def say(self, line: str) -> None:
        if process_rank() == 0:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        if process_rank() > 0:
            yield None
            return
        shown = _rich_bar if sys.stderr.isatty() else _plain_bar
        with shown(label, Rounds(rounds)) as progress:
            yield progress


@contextlib.contextmanager
def _rich_bar(label: str, rounds: Rounds) -> Iterator[Progress]:
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=RichConsole(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(label), total=1.0, figures="")

        def progress(step: int, steps: int, figures: dict[str, Any]) -> None:
            bar.update(task, completed=rounds.share(step, steps), figures=_figures(figures))

        yield progress


@contextlib.contextmanager
def _plain_bar(label: str, rounds: Rounds) -> Iterator[Progress]:
    said = time.monotonic()

    def progress(step: int, steps: int, figures: dict[str, Any]) -> None:
        nonlocal said
        share = rounds.share(step, steps)
        if time.monotonic() - said >= QUIET_S:
            said = time.monotonic()
            line = f"{label}: {share:.0%} {_figures(figures)}".rstrip()
            print(line, file=sys.stderr, flush=True)

    yield progress


def _figures(figures: dict[str, Any]) -> str:
    known = {name: value for name, value in figures.items() if isinstance(value, float)}
    return " ".join(f"{name} {value:.3g}" for name, value in known.items())
