"""The command group: turns errors of any command into one line on stderr and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from foretune.cli import signals
from foretune.errors import ForetuneError, LostProcessError
from foretune.printable import printable
from foretune.processes import process_rank

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
LONGEST = 1000  # characters of an error
ALONE_S = 5.0  # seconds within which the launcher ends a job that failed


class Group(TyperGroup):
    """The `foretune` command; `--debug` anywhere on the command line shows tracebacks."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Runs a command line and exits: 0 done, 1 failed, 2 user error, 130 interrupted."""
        args = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in args
        args = [arg for arg in args if arg != "--debug"]
        if not debug:  # what libraries say to developers
            warnings.simplefilter("ignore", FutureWarning)
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        extra.update(standalone_mode=False)
        extra["prog_name"] = "foretune"
        try:
            code = super().main(args, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe (`foretune ls | head`): do not flush the rest at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = FAILED
        except Exception as error:
            if debug:
                traceback.print_exc()
            if signals.received:  # the error is what came of it while the command was unwinding
                signals.leave(signals.received[0])
            sys.last_value = error  # as where nobody catches it; see `process_group._disconnect`
            line, code = explain(error)
            if line:
                _print_error(line, error)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; Ctrl-C becomes an error like the others.

        Raises:
            InterruptedRunError: Ctrl-C was pressed.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedRunError from None


class InterruptedRunError(Exception):
    """A run was interrupted by Ctrl-C."""


def _print_error(line: str, error: Exception) -> None:
    """Prints an error, only once where several processes fail alike.

    A user error ends all processes. The first one reports it and the launcher ends the others,
    which wait for that and report the error only if they are still running afterwards.
    """
    rank = process_rank()
    if rank > 0 and not isinstance(error, LostProcessError):
        time.sleep(ALONE_S)
    text = printable(f"process {rank}: {line}" if rank else line)
    if len(text) > LONGEST:  # a name or a value from a file
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    print(text, file=sys.stderr, flush=True)


def explain(error: Exception) -> tuple[str, int]:
    """The line on stderr and the exit code of an error.

    >>> explain(ForetuneError("the disk is full"))
    ('error: the disk is full', 1)
    """
    if isinstance(error, InterruptedRunError):
        return signals.message(signal.SIGINT), INTERRUPTED
    if isinstance(error, ForetuneError):
        return f"error: {_one_line(error)}", error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error
        return _usage(error)
    if _is_out_of_memory(error):
        return (
            "error: out of memory; lower retrain.token_budget, adapt.token_budget or "
            "adapt.tasks_per_wave, or set gradient_checkpointing: true"
        ), FAILED
    if isinstance(error, OSError) or "No space left on device" in str(error):
        return f"error: {_one_line(error)}", FAILED
    return (
        f"error: {type(error).__name__}: {_one_line(error)} (this is a bug; --debug shows where)"
    ), FAILED


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # On the CPU torch raises a RuntimeError.
    return isinstance(error, RuntimeError) and "you tried to allocate" in str(error)


def _usage(error: Any) -> tuple[str, int]:
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error), MISTAKE
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "foretune"
    message = _one_line(error.format_message()).rstrip(".?")
    ending = "?" if "Did you mean" in message else "."
    return f"error: {message}{ending} See {path} --help", int(error.exit_code)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
