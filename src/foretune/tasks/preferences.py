"""Checks of preferences: two answers to one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foretune.errors import UserError
from foretune.tasks.file_formats import short
from foretune.tasks.messages import Message, checked_messages, checked_prompt

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Args:
        prompt: A text, or the messages of a conversation that is to be answered.
        chosen: The preferred answer: a text, or the assistant's turn.
        rejected: The other one.
    """

    prompt: str | list[Message]
    chosen: str | Message
    rejected: str | Message


def checked_pair(row: Mapping[str, Any], where: str) -> Pair:
    """The pair of a row, in any of its forms.

    `chosen` and `rejected` are texts, or lists of messages: the assistant's turn alone beside a
    `prompt` of messages, or whole conversations that differ in their last turn alone.

    Args:
        row: The row.
        where: The row, for messages.

    Raises:
        UserError: A field is missing or of another form, or both answers are the same.
    """
    missing = [side for side in SIDES if row.get(side) is None]
    if missing:
        has = ", ".join(name for name, value in row.items() if value is not None)
        raise UserError(
            f"{where}: {' and '.join(missing)} missing: a preference has prompt, chosen and "
            f"rejected; this row has {has or 'nothing'}"
        )
    prompt, texts = row.get("prompt"), [isinstance(row[side], str) for side in SIDES]
    if all(texts):
        pair = _texts(_prompt(prompt, where), row)
    elif any(texts):
        raise UserError(f"{where}: chosen and rejected must both be texts, or both messages")
    elif prompt is None or all(_is_whole(row[side]) for side in SIDES):
        pair = _whole_conversations(row, where)
    else:
        pair = _answers(_prompt(prompt, where), row, where)
    for side in SIDES:
        answer = getattr(pair, side)
        if isinstance(answer, str) and not answer.strip():
            raise UserError(f"{where}: {side} is empty")
    if pair.chosen == pair.rejected:
        raise UserError(f"{where}: chosen and rejected are the same, so neither is preferred")
    return pair


def _texts(prompt: str | list[Message], row: Mapping[str, Any]) -> Pair:
    """The pair of two texts, which are turns after a conversation."""
    if isinstance(prompt, str):
        return Pair(prompt, row["chosen"], row["rejected"])
    return Pair(prompt, *({"role": "assistant", "content": row[side]} for side in SIDES))


def _is_whole(answer: Any) -> bool:
    """Whether an answer is a whole conversation, not the assistant's turn alone."""
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and first.get("role") in ("system", "user")


def _answers(prompt: str | list[Message], row: Mapping[str, Any], where: str) -> Pair:
    """The pair of two turns beside a prompt.

    Raises:
        UserError: An answer is not one turn of the assistant.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = [
        checked_messages([*turns, *row[side]], f"{where}: prompt and {side}") for side in SIDES
    ]
    if any(len(answer) != len(turns) + 1 for answer in answers):
        raise UserError(f"{where}: beside a prompt, an answer is one turn of the assistant")
    return Pair(turns, *(answer[-1] for answer in answers))


def _prompt(prompt: Any, where: str) -> str | list[Message]:
    """The prompt of a row.

    Raises:
        UserError: It is neither text nor a conversation that is to be answered.
    """
    if prompt is None:
        return ""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise UserError(f"{where}: prompt must be text or messages, got {short(prompt)}")
    return checked_prompt(prompt, f"{where}: prompt")


def _whole_conversations(row: Mapping[str, Any], where: str) -> Pair:
    """The pair in two conversations.

    Raises:
        UserError: They differ before their last turns.
    """
    chosen, rejected = (checked_messages(row[side], f"{where}: {side}") for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise UserError(
            f"{where}: the conversations of chosen and rejected may differ in their last turn only"
        )
    return Pair(chosen[:-1], chosen[-1], rejected[-1])
