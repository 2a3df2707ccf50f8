"""Ctrl-C and SIGTERM end the program at any moment, with one line and 128 + the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from foretune.processes import process_rank

RESUMABLE = ("run", "retrain", "adapt", "compare")  # commands that have --resume
AGAIN_S = 1.0  # seconds after which an exception that was swallowed is raised again
received: list[int] = []  # signals that came while a folder was claimed


def install() -> None:
    """Takes over both signals, except where the caller has them ignored (`nohup`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def message(number: int) -> str:
    """What the program says when a signal ends it."""
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    command = next((arg for arg in sys.argv[1:] if not arg.startswith("-")), None)
    if command not in RESUMABLE:
        return word
    return f"{word}; --resume continues from the last checkpoint, if there is one"


def _end(number: int, _frame: FrameType | None) -> None:
    """Unwinds if a folder is claimed, so that nothing unfinished stays in it; else ends at once.

    An exception alone would not do: raised within an import or a callback, it may be swallowed. So
    it is raised again until the folder is being given back.

    Raises:
        KeyboardInterrupt: A folder is claimed.
    """
    claims = sys.modules.get("foretune.claims")
    if claims is not None and claims.held() and not received:
        received.append(number)
        signal.signal(signal.SIGALRM, _again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
        raise KeyboardInterrupt
    leave(number)


def _again(_number: int, _frame: FrameType | None) -> None:
    claims = sys.modules.get("foretune.claims")
    if claims is not None and claims.held():
        raise KeyboardInterrupt


def leave(number: int) -> NoReturn:
    """Says which signal ends the program, and ends it without any more Python code.

    At a regular end, Python may kill itself by the signal instead of returning the exit code.
    """
    if process_rank() == 0:
        with contextlib.suppress(OSError):
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            os.write(2, f"{show_cursor}{message(number)}\n".encode())
    os._exit(128 + number)
