"""YAML as people write it: loaded safely, `1e-4` is a number, duplicate keys are errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from foretune.errors import UserError
from foretune.formats import RECIPE, unstamped

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """The safe loader with the two changes below."""


# A float needs a dot in YAML 1.1, so the safe loader reads 1e-4 as text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        # The plain loader silently keeps the last of two values.
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f'the key "{key}" appears twice', key_node.start_mark
            )
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: The text.
        where: Name of the text in error messages, such as a file name.

    Raises:
        UserError: The text is not valid YAML; the message names the line.

    >>> parse_yaml("learning_rates: [1e-4, 3]", "x.yaml")
    {'learning_rates': [0.0001, 3]}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{where}{line}: bad YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{where}: bad YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: bad YAML: {' '.join(str(error).split())}") from None


def parse_recipe_yaml(text: str, where: str) -> Any:
    r"""As `parse_yaml`, without the format that the `config.yaml` of a run states.

    Raises:
        UserError: As `parse_yaml`, or a newer foretune wrote the text.

    >>> parse_recipe_yaml("format: foretune-recipe-1\nseeds: 2", "config.yaml")
    {'seeds': 2}
    """
    raw = parse_yaml(text, where)
    return unstamped(Path(where), raw, RECIPE) if isinstance(raw, dict) else raw


def as_yaml_value(value: Any) -> str:
    """A text, number, list or mapping as it stands behind a key, on one line.

    >>> as_yaml_value("a/b.csv"), as_yaml_value("yes"), as_yaml_value([4, "all"])
    ('a/b.csv', '"yes"', '[4, all]')
    """
    if isinstance(value, dict):
        items = (f"{as_yaml_value(k)}: {as_yaml_value(v)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml_value, value)) + "]"
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[\w./-]+", value) and parse_yaml(value, "") == value
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    return str(value)


def dump_yaml(value: Any) -> str:
    """`value` as YAML, keys in the given order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text
