"""`key=value` changes on the command line, for a recipe or for a method and its run."""

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
    """A copy of `recipe` with all overrides applied, later ones over earlier ones.

    Args:
        recipe: The raw mapping of a recipe.
        overrides: `dotted.key=value` with a YAML value: `adapt.shots=[1,5]`, `device=null`.

    Raises:
        UserError: An override has no `=`, its value is not YAML, or it sets a key inside a value
            that is not a block of keys.

    >>> apply_overrides({"retrain": {"steps": 5}}, ["retrain.steps=10", "seeds=2"])
    {'retrain': {'steps': 10}, 'seeds': 2}
    """
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items()}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(
                f'setting "{override}" must read KEY=VALUE with a YAML value: 100, [8, 32]'
            )
        block = _set(changed, keys, parse_yaml(text, f'override "{override}"'), override)
        # A key on the command line replaces the recipe's key that it excludes.
        excluded = EXCLUSIVE.get(".".join(keys), "")
        if excluded not in override_keys(overrides):
            block.pop(excluded.rpartition(".")[2], None)
    return changed


def method_and_run(
    changes: Sequence[str], of: str, fields: Sequence[str], run_fields: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `key=value` settings into (fields of a method or model, fields of the run).

    Args:
        changes: Settings, as for `apply_overrides`.
        of: What the fields belong to, for the error message.
        fields: Names of its fields.
        run_fields: Names of the fields of the run.

    Raises:
        UserError: As `apply_overrides`, or neither has the key.
    """
    values = apply_overrides({}, changes)
    for key in values:
        if key not in fields and key not in run_fields:
            raise UserError(
                f'no setting "{key}"; {of} has {", ".join(fields)}; the run has '
                f"{', '.join(run_fields)}.{did_you_mean(key, [*fields, *run_fields])}"
            )
    field_values = {key: value for key, value in values.items() if key in fields}
    return field_values, {key: value for key, value in values.items() if key not in fields}


def override_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that the overrides set."""
    return {override.partition("=")[0].strip() for override in overrides}


def _set(block: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    """Sets a nested key and returns the block that contains it.

    Raises:
        UserError: A value on the way to the key is not a block.
    """
    for depth, key in enumerate(keys[:-1]):
        nested = block.get(key)
        if nested is None:
            nested = {}
        if not isinstance(nested, dict):
            parent = ".".join(keys[: depth + 1])
            raise UserError(
                f'override "{override}" sets a key inside "{parent}", which is {nested!r}: '
                f"set {parent}=VALUE instead"
            )
        # Each level is copied, so that the original does not change.
        nested = dict(nested)
        block[key] = nested
        block = nested
    block[keys[-1]] = value
    return block
