"""Pydantic's validation errors of a recipe as a one-line message that says what to fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a block of keys",
    "model": "a block of keys",
    "dataclass": "a block of keys",
    "none": "null",
    "is_instance_of": "a block of keys",
}


def user_error(
    errors: Sequence[ErrorDetails],
    raw: Any,
    where: str,
    overridden: set[str],
    known_keys: Callable[[Sequence[str]], Sequence[str]],
) -> UserError:
    """The most telling of `errors` as a UserError, with the number of the others.

    Args:
        errors: The result of `ValidationError.errors()`.
        raw: The mapping that was validated.
        where: The name or file of the recipe.
        overridden: Dotted keys that were set on the command line.
        known_keys: Maps a block, as a path of keys, to its valid keys.
    """
    grouped: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for error in errors:
        # A union reports an error for each of its members under the same key.
        grouped.setdefault(_path(error, raw), []).append(error)
    # An unknown key is most often the cause of the other errors.
    paths = sorted(grouped, key=lambda path: not _is_unknown(grouped[path][0]))
    path = paths[0]
    dotted = ".".join(path)
    place = "on the command line" if dotted in overridden else f"in {where}"
    line = _sentence(path, grouped[path], place, known_keys)
    return UserError(line + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""))


def _is_unknown(error: ErrorDetails) -> bool:
    return error["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _path(error: ErrorDetails, raw: Any) -> tuple[str, ...]:
    """The path of keys of an error in the recipe, without the tags of unions."""
    loc = error["loc"]
    if error["type"].startswith("missing"):
        loc, last = loc[:-1], [str(loc[-1])]
    else:
        last = []
    path: list[str] = []
    for part in loc:
        inside = part in raw if isinstance(raw, dict) else isinstance(part, int)
        if inside and isinstance(raw, dict | list):
            raw = raw[part]  # type: ignore[index]
            path.append(str(part))
    return (*path, *last)


def _sentence(
    path: tuple[str, ...],
    errors: Sequence[ErrorDetails],
    place: str,
    known_keys: Callable[[Sequence[str]], Sequence[str]],
) -> str:
    error, dotted = errors[0], ".".join(path)
    kind = error["type"]
    if _is_unknown(error):
        valid_keys, block = known_keys(path[:-1]), "".join(f"{key}." for key in path[:-1])
        inside = [f"{key}.{dotted}" for key in valid_keys if dotted in known_keys((key,))]
        if len(path) == 1 and inside:
            return f'unknown key "{dotted}" {place}. Did you mean {" or ".join(inside)}?'
        hint = did_you_mean(path[-1], valid_keys).replace('"', f'"{block}', 1)
        hint = hint or f" Valid keys: {', '.join(valid_keys)}."
        return f'unknown key "{dotted}" {place}.{hint}'
    if kind.startswith("missing") or kind == "union_tag_not_found":
        missing = dotted if kind.startswith("missing") else f"{dotted}.kind"
        return f'key "{missing}" is missing {place}'
    if kind == "union_tag_invalid":
        context = error.get("ctx", {})
        tag, tags = str(context.get("tag")), str(context.get("expected_tags")).replace("'", "")
        hint = did_you_mean(tag, tags.split(", "))
        return f'"{dotted}.kind" {place} must be one of {tags}; got "{tag}".{hint}'
    if kind == "value_error":  # its input is a block, too long to print
        subject = f'"{dotted}" {place}' if dotted else place.removeprefix("in ")
        return f"{subject} {_requirement(error)}"
    first, *others = dict.fromkeys(map(_requirement, errors))
    either = " or ".join([first, *(text.removeprefix("must be ") for text in others)])
    return f'"{dotted}" {place} {either}, got {error["input"]!r}'


def _requirement(error: ErrorDetails) -> str:
    """What the value must be, such as 'must be a number'."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "greater_than_equal":
        return f"must not be below {context['ge']}"
    if kind == "greater_than":
        return f"must be above {context['gt']}"
    for name, expected in EXPECTED.items():
        if kind.startswith(name):
            return f"must be {expected}"
    return error["msg"][0].lower() + error["msg"][1:]
