"""`Console`: receives the progress of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int, int, dict[str, Any]], None]  # (update, updates, latest figures)


class Console:
    """A console that prints nothing; the command line has a subclass that prints."""

    def say(self, line: str) -> None:
        """Reports that a stage begins or ends."""

    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        """A progress bar for the duration of the block.

        Args:
            label: What is being done.
            rounds: Number of training runs inside the block.

        Yields:
            The callback of the training runs, called after every update; None for no bar.
        """
        yield None


SILENT = Console()
