"""Progress on stderr: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from foretune.printable import printable
from foretune.processes import process_rank
from foretune.recipes.console import Console, Progress, Rounds

LINE_INTERVAL_S = 10.0  # minimum time between two plain lines of one bar


class StderrConsole(Console):
    """Reports on stderr; of several processes only the first reports."""

    @override
    def say(self, line: str) -> None:
        if process_rank() == 0:
            print(printable(line), file=sys.stderr, flush=True)

    @override
    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        if process_rank() > 0:
            yield None
            return
        label = printable(label)
        bar = _rich_bar if sys.stderr.isatty() else _plain_bar
        with bar(label, Rounds(rounds)) as progress:
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
    last_line_at = time.monotonic()

    def progress(step: int, steps: int, figures: dict[str, Any]) -> None:
        nonlocal last_line_at
        share = rounds.share(step, steps)
        if time.monotonic() - last_line_at >= LINE_INTERVAL_S:
            last_line_at = time.monotonic()
            line = f"{label}: {share:.0%} {_figures(figures)}".rstrip()
            print(line, file=sys.stderr, flush=True)

    yield progress


def _figures(figures: dict[str, Any]) -> str:
    doing = [printable(figures["doing"])] if "doing" in figures else []
    numbers = {
        name: value
        for name, value in figures.items()
        if isinstance(value, float) and name != "learning_rate"  # known before the run
    }
    return " ".join([*doing, *(f"{name} {value:.3g}" for name, value in numbers.items())])
