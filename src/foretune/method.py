"""`Method`: what the records of all methods have. The protocols of the verbs build on it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

from foretune.errors import UserError


class Method(Protocol):
    """A frozen dataclass of hyperparameters, which is its own config.

    Attributes:
        name: Name on the command line, in recipes and in JSON files.
        label: Name in tables and reports.
        verb: The verb that takes the method: retrain, adapt, fuse, prune or decode.
        paper: title, authors, year, venue and arxiv of the paper; None for a control without one.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    verb: ClassVar[str]
    paper: ClassVar[dict[str, Any] | None] = None

    def to_dict(self) -> dict[str, Any]:
        """The fields and "name" as JSON types; `foretune.methods.make` takes them back."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"name": self.name, **fields}


def check_verb(method: Any, verb: str) -> None:
    """Checks that `method` is the record of a method that `verb` takes.

    Raises:
        UserError: It is a method of another verb, or not a method's record at all.
    """
    method_verb = getattr(method, "verb", None)  # anything may have been passed
    if method_verb is None:
        kind = type(method).__name__
        raise UserError(f"{verb} takes a method, see `foretune ls methods`; got {kind}")
    if Method not in type(method).__mro__:
        raise UserError(
            f"{type(method).__name__} is not a method: it must subclass the protocol of {verb}, "
            "which inherits from foretune.method.Method"
        )
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
    return f"{name} is a method for {method_verb}, not for {verb}"
