"""`Console`: who is told how a run goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int, int, dict[str, Any]], None]  # (update, updates, newest figures)


class Console:
    """Says nothing. The command line has one that does."""

    def say(self, line: str) -> None:
        """A stage begins or ends."""

    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        """A bar for the block.

        Args:
            label: What is going on.
            rounds: Trainings that follow one another inside it.

        Yields:
            What the training calls after every update.
        """
        yield None


SILENT = Console()
