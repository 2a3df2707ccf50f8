"""Whether Python code that comes with a model may be executed: only where the user asked for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from foretune.errors import UserError

_ASKED: ContextVar[bool] = ContextVar("trusted_code", default=False)
_EXECUTED: set[Path] = set()  # files that the user had this process execute

HOW = "--trust-remote-code (in Python: trust_remote_code=True)"


@contextlib.contextmanager
def trusted_code(asked: bool) -> Iterator[None]:
    """Inside the block models may bring code, if the user asked for it (`asked`)."""
    token = _ASKED.set(asked or _ASKED.get())
    try:
        yield
    finally:
        _ASKED.reset(token)


def is_trusted(asked: bool) -> bool:
    """Whether code may be executed: asked for at this call, or by `trusted_code` around it."""
    return asked or _ASKED.get()


def remember(file: Path) -> None:
    """Notes a Python file that the user had executed; bases built from it need no further word."""
    _EXECUTED.add(file.resolve())


def check_named_file(record: Path, file: Path, *, asked: bool) -> None:
    """Checks that a Python file that a folder names may be executed.

    Args:
        record: The file that names it.
        file: The Python file.
        asked: Whether the user asked for it at this call.

    Raises:
        UserError: It is not there, or the user has not asked for it.
    """
    if not file.is_file():
        raise UserError(
            f"{record} names the Python file {file}, which builds the model and is not there: put "
            f'it back, or write where it is now as "file" in {record.name}'
        )
    if not is_trusted(asked) and file.resolve() not in _EXECUTED:
        raise UserError(
            f"{record} names the Python file {file}, which would be executed: read it, then allow "
            f"it with {HOW}"
        )
