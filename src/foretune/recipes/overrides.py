"""`KEY=VALUE` settings on the command line, for a recipe or for a method and its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.recipes.yaml_io import parse_yaml

EXCLUSIVE = {
    "retrain.learning_rate": ["retrain.learning_rates"],
    "retrain.learning_rates": ["retrain.learning_rate"],
    "adapt.learning_rate": ["adapt.learning_rates"],
    "adapt.learning_rates": ["adapt.learning_rate"],
    "learning_rate": ["learning_rates"],
    "learning_rates": ["learning_rate"],
    "model.name": ["model.file"],
    "model.file": ["model.name", "model.tower"],
    "model.tower": ["model.trainable_layers"],
    "model.trainable_layers": ["model.tower"],
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A `KEY=VALUE` argument of the command line.

    Args:
        argument: The argument as it was typed.
        key: KEY, possibly dotted.
        text: VALUE before it is read as YAML.
    """

    argument: str
    key: str
    text: str

    @classmethod
    def parse(
        cls, argument: str, form: str = "KEY=VALUE with a YAML value: 100, [8, 32]"
    ) -> Setting:
        """Splits an argument at its first `=`.

        Args:
            argument: The argument.
            form: How it must read, for the error message.

        Raises:
            UserError: It has no `=`, or its key or a part of its dotted key is empty.
        """
        key, equals, text = argument.partition("=")
        setting = cls(argument, key.strip(), text)
        if not equals or not all(setting.keys):
            raise UserError(f'"{argument}" must read {form}')
        return setting

    @property
    def keys(self) -> list[str]:
        """The parts of the dotted key."""
        return self.key.split(".")

    def value(self) -> Any:
        """VALUE, read as YAML.

        Raises:
            UserError: It is not YAML.
        """
        return parse_yaml(self.text, f'setting "{self.argument}"')


def split_arguments(
    arguments: Sequence[str], keys: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """(settings, positional arguments) of a command line that mixes them.

    Args:
        arguments: The arguments.
        keys: The keys that make `KEY=VALUE` a setting; None for any.

    >>> split_arguments(["runs/base", "steps=100"])
    (['steps=100'], ['runs/base'])
    """
    settings: list[str] = []
    positional: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        is_setting = bool(equals) and (keys is None or key.strip() in keys)
        (settings if is_setting else positional).append(argument)
    return settings, positional


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `recipe` with all overrides applied, later ones over earlier ones.

    Args:
        recipe: The raw mapping of a recipe.
        overrides: `DOTTED.KEY=VALUE` with a YAML value: `adapt.shots=[1,5]`, `device=null`.

    Raises:
        UserError: An override has no `=`, its value is not YAML, or it sets a key inside a value
            that is not a block of keys.

    >>> apply_overrides({"retrain": {"steps": 5}}, ["retrain.steps=10", "seeds=2"])
    {'retrain': {'steps': 10}, 'seeds': 2}
    """
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items()}
    for override in overrides:
        setting = Setting.parse(override)
        block = _set(changed, setting)
        # A key on the command line replaces those of the recipe that it excludes.
        for excluded in EXCLUSIVE.get(setting.key, []):
            if excluded not in override_keys(overrides):
                block.pop(excluded.rpartition(".")[2], None)
    return changed


def method_and_run(
    changes: Sequence[str], of: str, fields: Sequence[str], run_fields: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `KEY=VALUE` settings into (fields of a method or model, fields of the run).

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
    return {Setting.parse(override).key for override in overrides}


def _set(block: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Sets a nested key and returns the block that contains it.

    Raises:
        UserError: A value on the way to the key is not a block, or the value is not YAML.
    """
    value, keys = setting.value(), setting.keys
    for depth, key in enumerate(keys[:-1]):
        nested = block.get(key)
        if nested is None:
            nested = {}
        if not isinstance(nested, dict):
            parent = ".".join(keys[: depth + 1])
            raise UserError(
                f'setting "{setting.argument}" sets a key inside "{parent}", which is {nested!r}: '
                f"set {parent}=VALUE instead"
            )
        # Each level is copied, so that the original does not change.
        nested = dict(nested)
        block[key] = nested
        block = nested
    block[keys[-1]] = value
    return block
