"""What holds for every file that carries a format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import call
from foretune.errors import UserError


def newer(current: str) -> str:
    """The name of the version after this one."""
    kind, _, number = current.rpartition("-")
    return f"{kind}-{int(number) + 1}"


def assert_versions(file: Path, current: str, read: Callable[[], object]) -> None:
    """The JSON file has this format; it is read without one, and refused with a newer one."""

    def refused() -> str:
        with pytest.raises(UserError) as error:
            read()
        return str(error.value)

    _check(file, current, read, refused)


def assert_versions_by_command(file: Path, current: str, *command: object) -> None:
    """As `assert_versions`, read by a command line, which ends with exit code 2."""

    def read() -> None:
        result = call(*command)
        assert result.exit_code == 0, result.output

    def refused() -> str:
        result = call(*command)
        assert result.exit_code == 2, result.output
        *_, line = result.stderr.splitlines()  # after lines of progress
        assert line.startswith("error: ")
        return line

    _check(file, current, read, refused)


def _check(
    file: Path, current: str, read: Callable[[], object], refused: Callable[[], str]
) -> None:
    text = file.read_text("utf-8")
    record = json.loads(text)
    assert record["format"] == current
    file.write_text(json.dumps({**record, "format": newer(current)}), "utf-8")
    message = refused()
    assert "\n" not in message
    assert message.endswith(
        f"{file.name} was written by a newer foretune (format {newer(current)}); this version "
        f"reads up to {current}: upgrade"
    )
    del record["format"]
    file.write_text(json.dumps(record), "utf-8")
    read()
    file.write_text(text, "utf-8")
