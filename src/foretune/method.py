"""`Method`: what every method's record has. The verbs' own protocols build on it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

from foretune.errors import UserError


class Method(Protocol):
    """A frozen dataclass of hyperparameters, which is its own config.

    Attributes:
        name: As the command line, recipes and JSON files spell it.
        label: As tables and reports spell it.
        verb: The verb that takes it: retrain, adapt, fuse, prune or decode.
        paper: title, authors, year, venue and arxiv of the paper; None for a control without one.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    verb: ClassVar[str]
    paper: ClassVar[dict[str, Any] | None] = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields with "name"; `foretune.methods.make(**fields)` gives the record back."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"name": self.name, **fields}


def check_verb(method: Any, verb: str) -> None:
    """Checks that `method` is the record of a method that `verb` takes.

    Raises:
        UserError: It is a method of another verb, or no method's record at all.
    """
    method_verb = getattr(method, "verb", None)  # anything may have been passed
    if method_verb is None:
        got = type(method).__name__
        raise UserError(f"{verb} takes a method, such as those of `foretune ls methods`; got {got}")
    if method_verb != verb:
        message = wrong_verb(method.name, method_verb, verb)
        raise UserError(f"{message}; `foretune ls methods` lists them")


def wrong_verb(name: str, method_verb: str, verb: str) -> str:
    """What is wrong about a method that another verb takes: one wording for names and records.

    Args:
        name: Name of the method.
        method_verb: The verb that takes it.
        verb: The verb that does not.
    """
    return f"{name} is a method to {method_verb} with, not to {verb} with"
