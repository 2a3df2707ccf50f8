"""The command line: each command parses its arguments, calls one function and prints the result.

Nothing here imports torch, transformers or peft before a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from foretune.cli import signals


def main() -> None:
    """The `foretune` program."""
    signals.install()  # first of all: what follows takes time, and may be interrupted
    # Otherwise waiting OpenMP threads spin and take time from the working ones on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("DO_NOT_TRACK", "true")  # the usage statistics of libraries
    from foretune.allocator import keep_freed_memory

    keep_freed_memory()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed, as a shell does by `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal or file that cannot encode "−" or "é"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from foretune.cli.commands import app

    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from foretune.cli.commands import app

        return app
    raise AttributeError(name)
