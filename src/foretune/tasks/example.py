"""`Example`: one data item, a mapping of its columns. `SPLITS`: the splits of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Example = Mapping[str, Any]
SPLITS = ("train", "validation", "test")
