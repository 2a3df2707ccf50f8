"""The two kinds of expected failure. Anything else that escapes is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForetuneError(Exception):
    """An expected failure that is nobody's typing mistake: training diverged, the disk is full.

    The message is one line: what is wrong, what was got, what would do.
    """

    exit_code = 1


class UserError(ForetuneError):
    """The user's mistake: a bad recipe, bad data, a folder that is no model."""

    exit_code = 2


class LostProcessError(ForetuneError):
    """Another process of the job has ended, so that this one cannot go on."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """A hint such as ' Did you mean "steps"?' when `got` is close to one of `known`, else ''.

    >>> did_you_mean("stepz", ["steps", "seed"])
    ' Did you mean "steps"?'
    """
    close = difflib.get_close_matches(str(got), [str(k) for k in known], n=1)
    return f' Did you mean "{close[0]}"?' if close else ""
