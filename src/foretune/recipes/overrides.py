"""`retrain.steps=10` on the command line: written over a recipe, or for a method and its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
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
            raise UserError(
                f'setting "{override}" must read KEY=VALUE, the value in YAML: 100, [8, 32]'
            )
        block = _set(changed, keys, parse_yaml(text, f'override "{override}"'), override)
        # Of two keys that exclude each other, the one on the command line replaces the recipe's.
        other = EXCLUSIVE.get(".".join(keys), "")
        if other not in override_keys(overrides):
            block.pop(other.rpartition(".")[2], None)
    return changed


def method_and_run(
    changes: Sequence[str], of: str, fields: Sequence[str], run_fields: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts `key=value` settings into (fields of a method or model, fields of the run).

    Args:
        changes: As for `apply_overrides`.
        of: What has the fields, for the message.
        fields: Its fields.
        run_fields: Those of the run.

    Raises:
        UserError: As `apply_overrides`; a key that neither has.
    """
    given = apply_overrides({}, changes)
    for key in given:
        if key not in fields and key not in run_fields:
            raise UserError(
                f'no setting "{key}"; {of} has {", ".join(fields)}; the run has '
                f"{', '.join(run_fields)}.{did_you_mean(key, [*fields, *run_fields])}"
            )
    own = {key: value for key, value in given.items() if key in fields}
    return own, {key: value for key, value in given.items() if key not in fields}


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
