"""`ScratchFile`: data too large for memory, in an unnamed temporary file."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from foretune.errors import ForetuneError

# Unlike /tmp it is always on disk, never in memory.
DISK = Path("/var/tmp")


class ScratchFile:
    """A file that only this process can see and that vanishes with it, even after a crash.

    Bytes are appended and, once flushed, can be read at any position, also by forked processes.

    Raises:
        ForetuneError: The file cannot be created.
    """

    def __init__(self) -> None:
        self._folder = scratch_folder()
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, lives as long as this
        except OSError as error:
            raise self._failed(error) from error
        self._number = self._file.fileno()

    def append(self, content: bytes) -> None:
        """Append bytes.

        Raises:
            ForetuneError: The disk is full, or the folder cannot be written to.
        """
        try:
            self._file.write(content)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Make appended bytes readable.

        Raises:
            ForetuneError: The disk is full, or the folder cannot be written to.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def read(self, start: int, length: int) -> bytes:
        """Read `length` bytes from position `start`."""
        # No seek, since forked processes share the position; no mapping, since its pages count as
        # this process's memory.
        return os.pread(self._number, length, start)

    def _failed(self, error: OSError) -> ForetuneError:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return ForetuneError(
            f"rows too large for memory could not be written to {self._folder}: {why}; "
            "set TMPDIR to a folder with room for a copy of the data"
        )


def scratch_folder() -> str:
    """TMPDIR if it is set, else /var/tmp if it is writable, else the system's default."""
    chosen = "TMPDIR" in os.environ or not os.access(DISK, os.W_OK)
    return tempfile.gettempdir() if chosen else str(DISK)
