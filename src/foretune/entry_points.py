"""`entry_point`: resolves "module:name". Thus the core finds what lies above it."""

from __future__ import annotations

import importlib
from typing import Any


def entry_point(reference: str) -> Any:
    """Imports the module that `reference` names and returns the object in it.

    Args:
        reference: "package.module:name".

    >>> entry_point("math:sqrt")(9.0)
    3.0
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
