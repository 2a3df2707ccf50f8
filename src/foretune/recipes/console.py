"""`Console`: receives the progress of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

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

    def results(self, comparison: Mapping[str, Any]) -> None:
        """Receives the comparison at the end of a run, the content of `comparison.json`."""


class Consoles(Console):
    """Several consoles as one.

    Args:
        consoles: What each report is passed on to, in order.
    """

    def __init__(self, consoles: Sequence[Console]) -> None:
        self.consoles = consoles

    @override
    def say(self, line: str) -> None:
        for console in self.consoles:
            console.say(line)

    @override
    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        with contextlib.ExitStack() as bars:
            all_bars = [bars.enter_context(console.bar(label, rounds)) for console in self.consoles]
            callbacks = [callback for callback in all_bars if callback is not None]

            def progress(update: int, updates: int, figures: dict[str, Any]) -> None:
                for callback in callbacks:
                    callback(update, updates, figures)

            yield progress if callbacks else None

    @override
    def results(self, comparison: Mapping[str, Any]) -> None:
        for console in self.consoles:
            console.results(comparison)


class Rounds:
    """Progress over several trainings that run one after another.

    Args:
        rounds: Number of trainings.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds, self.round, self.last = rounds, 0, 0

    def share(self, step: int, steps: int) -> float:
        """The share completed, from 0 to 1, after `step` of the `steps` of the current training.

        >>> rounds = Rounds(2)
        >>> [rounds.share(step, 2) for step in (1, 2, 1, 2)]
        [0.25, 0.5, 0.75, 1.0]
        """
        if step <= self.last:
            self.round += 1
        self.last = step
        return min(1.0, (self.round + step / steps) / max(self.rounds, self.round + 1))


SILENT = Console()
