"""The command line as a user types it."""

from __future__ import annotations

import functools
import json
from typing import Any

import typer.testing
from typer.testing import CliRunner, Result

from foretune.cli import app

# Building the commands anew for each call takes longer than most commands that are refused.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def call(*args: object, stdin: str | None = None) -> Result:
    """What a command line gives."""
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def the_json(*args: object, stdin: str | None = None) -> Any:
    """What `--json` gives where all goes well."""
    result = call(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def the_error(*args: object) -> str:
    """The one line on stderr of a user's mistake."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line
