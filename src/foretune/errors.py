"""The expected failures: `ForetuneError` and its kinds. Any other exception is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from foretune.printable import printable


class ForetuneError(Exception):
    """An expected failure: training diverged, the disk is full.

    The message is one line: what is wrong, what was got, what would fix it.
    """

    exit_code = 1


class DivergedError(ForetuneError):
    """The loss, the weights or a score are no longer finite."""


class UserError(ForetuneError):
    """A mistake of the user's: a bad recipe, bad data, a folder that holds no model."""

    exit_code = 2


class LostProcessError(ForetuneError):
    """Another process of the job has ended, so this one cannot continue."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint such as ' Did you mean "steps"?' if `name` is close to one of `names`, else ''.

    >>> did_you_mean("stepz", ["steps", "seed"])
    ' Did you mean "steps"?'
    """
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f' Did you mean "{printable(" ".join(close[0].split()))}"?' if close else ""
