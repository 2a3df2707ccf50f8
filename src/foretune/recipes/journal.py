"""`progress.jsonl` of a run: what it said and how far it is, so that others can follow it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import override

from foretune.errors import UserError
from foretune.files import PROGRESS_FILE, disk_errors
from foretune.manifest import record_files
from foretune.recipes.console import Console, Progress, Rounds

INTERVAL_S = 1.0  # minimum time between two lines on the progress of one bar


class Journal(Console):
    """Writes a line of JSON for everything that a run reports.

    {"time": seconds since 1970, and one of
     "say": a line, "begin": what is being done, "share": how much of it is done with its "figures",
     "end": what was being done}

    Args:
        folder: Folder of the run. What an earlier part of the run wrote stays.

    Raises:
        UserError: The journal may not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROGRESS_FILE
        if self.path.is_symlink():
            raise UserError(f"{self.path} is a symbolic link, which foretune does not follow")
        with disk_errors(self.path):
            record_files(self.path, [self.path])
            self.path.touch()

    @override
    def say(self, line: str) -> None:
        self._write({"say": line})

    @override
    @contextlib.contextmanager
    def bar(self, label: str, rounds: int = 1) -> Iterator[Progress | None]:
        shares, latest = Rounds(rounds), 0.0

        def progress(update: int, updates: int, figures: dict[str, Any]) -> None:
            nonlocal latest
            share = shares.share(update, updates)
            if time.monotonic() - latest >= INTERVAL_S or share == 1.0:
                latest = time.monotonic()
                self._write({"share": share, "figures": figures})

        self._write({"begin": label})
        yield progress
        self._write({"end": label})

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False)
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class JournalReader:
    """Reads the events of a journal as they are written.

    Args:
        path: The journal. It may be renamed meanwhile, as a run is that replaces an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.torn = b""

    def events(self) -> Iterator[dict[str, Any]]:
        """The events since the last call. A damaged line, as a kill leaves one, is passed over."""
        *lines, self.torn = (self.torn + self.file.read()).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
