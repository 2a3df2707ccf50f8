"""`ScratchFile`: bytes that are too many for memory, in a temporary file without a name."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from foretune.errors import ForetuneError

# Unlike /tmp it is on a disk everywhere, never in memory.
DISK = Path("/var/tmp")


class ScratchFile:
    """A file that is this process's alone and gone with it, also after a crash.

    Bytes are added at its end and, once flushed, read from anywhere, also by forked processes.
    """

    def __init__(self) -> None:
        self._folder = scratch_folder()
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, lives as long as this
        except OSError as error:
            raise self._failed(error) from error
        self._number = self._file.fileno()

    def append(self, content: bytes) -> None:
        """Writes at the end.

        Raises:
            ForetuneError: The disk is full, or the folder cannot be written to.
        """
        try:
            self._file.write(content)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Makes readable what was added.

        Raises:
            ForetuneError: As in `append`.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on."""
        # No seek, since forked processes share the position; no mapping, since its pages count as
        # this process's memory.
        return os.pread(self._number, length, start)

    def _failed(self, error: OSError) -> ForetuneError:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return ForetuneError(
            f"rows that memory should not hold could not be written to {self._folder}: {why}; "
            "set TMPDIR to a folder with room for a copy of the data"
        )


def scratch_folder() -> str:
    """TMPDIR where it is set, else /var/tmp where there is one, else the system's choice."""
    chosen = "TMPDIR" in os.environ or not os.access(DISK, os.W_OK)
    return tempfile.gettempdir() if chosen else str(DISK)
