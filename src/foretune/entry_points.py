"""`entry_point`: the object that a table names as "module:name". So the core finds its wings."""

from __future__ import annotations

import importlib
from typing import Any


def entry_point(reference: str) -> Any:
    """The object that `reference` names; its module is imported now.

    Args:
        reference: "package.module:name".

    >>> entry_point("math:sqrt")(9.0)
    3.0
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
