"""What pydantic found wrong with a recipe, as one line that a person can act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

WANTED = {
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
    """The first of `errors` as a UserError, with the number of the others.

    Args:
        errors: What `ValidationError.errors()` gave.
        raw: The mapping that was validated.
        where: The recipe's name or file.
        overridden: Dotted keys that came from the command line.
        known_keys: The keys that a block (given as a path of keys) may hold.
    """
    grouped: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for error in errors:
        # A union reports each of its members: the same key, several complaints.
        grouped.setdefault(_path(error, raw), []).append(error)
    # A key that nobody knows is most often the cause of the others.
    paths = sorted(grouped, key=lambda path: not _is_unknown(grouped[path][0]))
    path = paths[0]
    dotted = ".".join(path)
    place = "on the command line" if dotted in overridden else f"in {where}"
    line = _sentence(path, grouped[path], place, known_keys)
    return UserError(line + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""))


def _is_unknown(error: ErrorDetails) -> bool:
    return error["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def _path(error: ErrorDetails, raw: Any) -> tuple[str, ...]:
    """The part of an error's location that stands in the recipe, without the tags of unions."""
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
        known, block = known_keys(path[:-1]), "".join(f"{key}." for key in path[:-1])
        inside = [f"{key}.{dotted}" for key in known if dotted in known_keys((key,))]
        if len(path) == 1 and inside:
            return f'unknown key "{dotted}" {place}. Did you mean {" or ".join(inside)}?'
        hint = did_you_mean(path[-1], known).replace('"', f'"{block}', 1)
        hint = hint or f" Known here: {', '.join(known)}."
        return f'unknown key "{dotted}" {place}.{hint}'
    if kind.startswith("missing") or kind == "union_tag_not_found":
        missing = dotted if kind.startswith("missing") else f"{dotted}.kind"
        return f'key "{missing}" is missing {place}'
    if kind == "union_tag_invalid":
        context = error.get("ctx", {})
        got, tags = str(context.get("tag")), str(context.get("expected_tags")).replace("'", "")
        hint = did_you_mean(got, tags.split(", "))
        return f'"{dotted}.kind" {place} must be one of {tags}; got "{got}".{hint}'
    if kind == "value_error":  # of a whole block, whose text would fill the screen
        return f'"{dotted}" {place} {_wanted(error)}'
    wanted = list(dict.fromkeys(_wanted(one) for one in errors))
    either = " or ".join([wanted[0], *(one.removeprefix("must be ") for one in wanted[1:])])
    return f'"{dotted}" {place} {either}, got {error["input"]!r}'


def _wanted(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "greater_than_equal":
        return f"must not be below {context['ge']}"
    if kind == "greater_than":
        return f"must be above {context['gt']}"
    for name, wanted in WANTED.items():
        if kind.startswith(name):
            return f"must be {wanted}"
    return error["msg"][0].lower() + error["msg"][1:]
