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
        chosen: The preferred answer.
        rejected: The other one.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str


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
    prompt = row.get("prompt")
    if all(isinstance(row[side], str) for side in SIDES):
        pair = Pair(_prompt(prompt, where), row["chosen"], row["rejected"])
    elif any(isinstance(row[side], str) for side in SIDES):
        raise UserError(f"{where}: chosen and rejected must both be texts, or both messages")
    elif prompt is None:
        pair = _whole_conversations(row, where)
    else:
        turns = _prompt(prompt, where)
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        answers = {
            side: checked_messages([*turns, *row[side]], f"{where}: prompt and {side}")
            for side in SIDES
        }
        if any(len(answer) != len(turns) + 1 for answer in answers.values()):
            raise UserError(f"{where}: beside a prompt, an answer is one turn of the assistant")
        pair = Pair(turns, *(answers[side][-1]["content"] for side in SIDES))
    for side in SIDES:
        if not getattr(pair, side).strip():
            raise UserError(f"{where}: {side} is empty")
    if pair.chosen == pair.rejected:
        raise UserError(f"{where}: chosen and rejected are the same, so neither is preferred")
    return pair


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
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])
