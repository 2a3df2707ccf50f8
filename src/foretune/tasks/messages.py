"""Conversations as rows: `messages` in the form of OpenAI's files for fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.tasks.file_formats import check_unicode, short

CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")  # columns that may hold one
ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


def checked_messages(messages: Any, where: str) -> list[Message]:
    """The messages of a row, with text parts joined and fields that are null left out.

    Args:
        messages: What the row holds.
        where: The row and its field, for messages.

    Raises:
        UserError: They are no conversation that ends with an assistant's turn.
    """
    turns = checked_turns(messages, where)
    if turns[-1]["role"] != "assistant":
        raise UserError(
            f'{where} ends with a turn of "{turns[-1]["role"]}": the last turn, which is learnt, '
            "must be the assistant's"
        )
    if not any(is_learnable(turn) for turn in turns):
        raise UserError(
            f"{where}: every assistant's turn has weight 0, so there is nothing to learn"
        )
    return turns


def checked_prompt(messages: Any, where: str) -> list[Message]:
    """The messages that an assistant is to answer, as those of `checked_messages`.

    Raises:
        UserError: They are no conversation, or the assistant has answered already.
    """
    turns = checked_turns(messages, where)
    if turns[-1]["role"] == "assistant":
        raise UserError(
            f"{where} ends with the assistant's turn: a prompt ends with the turn that is to be "
            "answered"
        )
    return turns


def checked_turns(messages: Any, where: str) -> list[Message]:
    """The turns of a conversation, whoever has the last word.

    Raises:
        UserError: They are no conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"{where} must be a list of messages, got {short(messages)}")
    turns = [_checked(turn, f"{where}, turn {i}") for i, turn in enumerate(messages, start=1)]
    if not turns:
        raise UserError(f"{where} is empty: a conversation has a user's turn and an assistant's")
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        place = roles.index("system", 1) + 1
        raise UserError(f"{where}, turn {place}: a system turn can only be the first")
    first = roles[1 if roles[0] == "system" else 0 :][:1]
    if first != ["user"]:
        began = f'begins with a turn of "{first[0]}"' if first else "has a system turn only"
        raise UserError(f"{where} {began}: a user's turn comes first")
    return turns


def check_message_names(names: Any) -> None:
    """Checks the setting `tasks.messages`.

    Raises:
        UserError: It is no mapping of `role`, `content` and `roles`.
    """
    keys = ("role", "content", "roles")
    if not isinstance(names, dict) or not names.keys() <= {*keys}:
        raise UserError(f"messages maps {', '.join(keys)} to other names, got {names!r}")
    for key in ("role", "content"):
        if not isinstance(names.get(key, key), str):
            raise UserError(f"messages.{key} is the name of a key, got {names[key]!r}")
    roles = names.get("roles", {})
    if not isinstance(roles, dict) or not {*map(str, roles.values())} <= {*ROLES}:
        raise UserError(
            f"messages.roles maps names in the source to {', '.join(ROLES)}; got {roles!r}"
        )


def with_message_names(fields: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row, with usual names in its conversation.

    Args:
        fields: The columns.
        names: The setting `tasks.messages`.

    >>> turns = {"messages": [{"from": "gpt", "value": "Hi"}]}
    >>> names = {"role": "from", "content": "value", "roles": {"gpt": "assistant"}}
    >>> with_message_names(turns, names)
    {'messages': [{'role': 'assistant', 'content': 'Hi'}]}
    """
    lists = {name: fields[name] for name in CONVERSATIONS if isinstance(fields.get(name), list)}
    return {**fields, **{name: _renamed(turns, names) for name, turns in lists.items()}}


def _renamed(turns: Sequence[Any], names: Mapping[str, Any]) -> list[Any]:
    """The turns of a conversation with usual names; what is no turn stays as it is."""
    keys = {names.get(key, key): key for key in ("role", "content")}
    roles = names.get("roles", {})
    renamed: list[Any] = []
    for turn in turns:
        if isinstance(turn, Mapping):
            turn = {keys.get(key, key): value for key, value in turn.items()}
            if isinstance(turn.get("role"), str):
                turn["role"] = roles.get(turn["role"], turn["role"])
        renamed.append(turn)
    return renamed


def is_learnable(turn: Message) -> bool:
    """Whether a turn may be trained on: it is the assistant's, and its weight is not 0."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _checked(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f'{where} must have "role" and "content", got {short(turn)}')
    fields = {key: value for key, value in turn.items() if value is not None and value != []}
    missing = [key for key in ("role", "content") if key not in fields]
    calls = fields.get("role") == "assistant" and "tool_calls" in fields
    if missing and not (calls and missing == ["content"]):
        raise UserError(
            f"{where}: {' and '.join(missing)} missing; it has {', '.join(map(str, turn))}. Other "
            "names are mapped by tasks.messages"
        )
    role = fields["role"]
    if role not in ROLES:
        raise UserError(
            f"{where}: unknown role {short(role)}; roles are {', '.join(ROLES)}. Other names are "
            f"mapped by tasks.messages.{did_you_mean(str(role), ROLES)}"
        )
    weight = fields.get("weight", 1)
    if weight not in (0, 1) or (weight == 0 and role != "assistant"):
        raise UserError(f"{where}: weight is 0 or 1, of an assistant's turn; got {short(weight)}")
    content = _text(fields.get("content", ""), where)
    if not content.strip() and not calls:
        raise UserError(f"{where}: content is empty")
    return {**fields, "content": content}


def _text(content: Any, where: str) -> str:
    """A content as one text.

    Raises:
        UserError: It is neither text nor a list of parts that are text.
    """
    if isinstance(content, str):
        check_unicode(content, where)
        return content
    if not isinstance(content, Sequence):
        raise UserError(f"{where}: content must be text or text parts, got {short(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: only parts of type text are read, got {short(kind if kind else part)}"
            )
        check_unicode(part["text"], where)
        texts.append(part["text"])
    return "".join(texts)
