"""`retrain.steps=10` on the command line, written over what a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretune.errors import UserError
from foretune.recipes.yaml_io import parse_yaml

EXCLUSIVE = {
    "retrain.learning_rate": "retrain.learning_rates",
    "retrain.learning_rates": "retrain.learning_rate",
    "adapt.learning_rate": "adapt.learning_rates",
    "adapt.learning_rates": "adapt.learning_rate",
    "learning_rate": "learning_rates",
    "learning_rates": "learning_rate",
    "model.name": "model.file",
    "model.file": "model.name",
}


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `recipe` with each override written into it, the later over the earlier.

    Args:
        recipe: The raw mapping of a recipe.
        overrides: `dotted.key=value`, the value in YAML: `adapt.shots=[1,5]`, `device=null`.

    Raises:
        UserError: An override has no `=`, its value is no YAML, or it reaches into something that
            is no block of keys.

    >>> apply_overrides({"retrain": {"steps": 5}}, ["retrain.steps=10", "seeds=2"])
    {'retrain': {'steps': 10}, 'seeds': 2}
    """
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items()}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f'override "{override}" must read key=value, such as retrain.steps=100')
        block = _set(changed, keys, parse_yaml(text, f'override "{override}"'), override)
        # Of two keys that exclude each other, the one on the command line replaces the recipe's.
        other = EXCLUSIVE.get(".".join(keys), "")
        if other not in override_keys(overrides):
            block.pop(other.rpartition(".")[2], None)
    return changed


def override_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that the overrides set."""
    return {override.partition("=")[0].strip() for override in overrides}


def _set(block: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    """Sets the key; returns the block that holds it."""
    for depth, key in enumerate(keys[:-1]):
        below = block.get(key)
        if below is None:
            below = {}
        if not isinstance(below, dict):
            parent = ".".join(keys[: depth + 1])
            raise UserError(
                f'override "{override}" reaches into "{parent}", which is {below!r}: '
                f"set it whole, as {parent}=VALUE"
            )
        # The original must not change, so each level is copied on the way down.
        below = dict(below)
        block[key] = below
        block = below
    block[keys[-1]] = value
    return block
