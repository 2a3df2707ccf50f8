"""Conversations as token ids: a chat template writes them, and the assistant's turns are learnt.

What is learnt of a turn is what the model itself has to write after the prompt that
`apply_chat_template(..., add_generation_prompt=True)` makes of the turns before: the difference
between the conversation and that prompt, up to the token that ends the turn. Where the template
marks what is generated (`{% generation %}`), the marks decide. Prompt and turn are tokenised as in
generation, one after the other, and what is learnt is decoded again to check it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from foretune.errors import UserError
from foretune.tasks.file_formats import one_line, short
from foretune.tasks.messages import Message, is_learnable
from foretune.tasks.objectives import text

GENERATION = re.compile(r"\{%-?\s*generation\b")
Span = tuple[int, int]  # first, and one past the last


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    train_on: str,
    max_tokens: int,
    tools: Sequence[Any] | None,
    where: str,
) -> tuple[list[int], list[Span]]:
    """The ids of a conversation, and the spans of them that are learnt.

    A conversation that is too long loses its oldest exchanges, each a user's turn and what follows
    it, but keeps its system turn.

    Args:
        tokenizer: The model's tokenizer.
        messages: Checked messages.
        train_on: "last" for the last assistant's turn, "all" for each.
        max_tokens: Most ids.
        tools: Tools that the template lists.
        where: The row, for messages.

    Raises:
        UserError: There is no template, it refuses the messages, no turn of them can be learnt, or
            the last exchange is longer than `max_tokens`.
    """
    chat = _Chat(tokenizer, tools, where)
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    learnt = [i for i in (turns if train_on == "all" else turns[-1:]) if is_learnable(messages[i])]
    if not learnt:
        raise UserError(f"{where}: the last assistant's turn has weight 0: set train_on to all")
    for remaining in shortened(messages, learnt[-1]):
        dropped = len(messages) - len(remaining)
        ids, spans = chat.encode(remaining, [i - dropped for i in learnt if i > dropped])
        if len(ids) <= max_tokens:
            return ids, spans
    raise UserError(
        f"{where}: the last exchange alone has {len(ids)} tokens, and max_tokens is {max_tokens}: "
        f"a turn is not cut, so set max_tokens to {len(ids)} or more, or leave the row out"
    )


def shortened(messages: Sequence[Message], last: int) -> Iterator[list[Message]]:
    """The conversation, then without its oldest exchange, and so on; its system turn stays.

    Args:
        messages: Checked messages.
        last: A turn that is never left out; the user's turn before it is not, either.
    """
    system = [*messages[:1]] if messages[0]["role"] == "system" else []
    users = [i for i, turn in enumerate(messages[:last]) if turn["role"] == "user"]
    for first in users:
        yield [*system, *messages[first:]]


def encode_answers(
    tokenizer: Any,
    prompt: Sequence[Message],
    answers: Sequence[Message],
    *,
    max_tokens: int,
    tools: Sequence[Any] | None,
    where: str,
) -> list[tuple[list[int], Span]]:
    """The ids of a conversation with each of several answers, and the spans of the answers.

    All answers have the same conversation before them, shortened as in `encode_chat` until each
    fits.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Checked messages; the last one is not the assistant's.
        answers: The assistant's turns.
        max_tokens: Most ids.
        tools: Tools that the template lists.
        where: The row, for messages.

    Raises:
        UserError: There is no template, it refuses the messages, or the last exchange is longer
            than `max_tokens`.
    """
    chat = _Chat(tokenizer, tools, where)
    for remaining in shortened(prompt, len(prompt)):
        encoded = [chat.encode([*remaining, answer], [len(remaining)]) for answer in answers]
        longest = max(len(ids) for ids, _ in encoded)
        if longest <= max_tokens:
            return [(ids, spans[0]) for ids, spans in encoded]
    raise UserError(
        f"{where}: the last exchange alone has {longest} tokens, and max_tokens is {max_tokens}: a "
        f"turn is not cut, so set max_tokens to {longest} or more, or leave the row out"
    )


def prompt_text(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    """The text after which an assistant answers.

    Args:
        tokenizer: The model's tokenizer.
        messages: Checked messages; the last one is not the assistant's.
        where: What they are, for messages.

    Raises:
        UserError: There is no chat template, or it refuses the messages.
    """
    return _Chat(tokenizer, None, where).render(messages, opens=True)


class _Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        tools: Tools that the template lists.
        where: The row, for messages.

    Raises:
        UserError: There is no template.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Any] | None, where: str) -> None:
        self.tokenizer, self.tools, self.where = tokenizer, tools or None, where
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"{where}: the tokenizer has no chat template: set model.chat_template to a file "
                "that holds one"
            )
        self.marks_turns = bool(GENERATION.search(tokenizer.get_chat_template(tools=self.tools)))
        self.ends = added_tokens(tokenizer)

    def encode(
        self, messages: Sequence[Message], learnt: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """The ids of a conversation up to the last of the turns with these indices; their spans."""
        turns = [self._without_end(turn) for turn in messages]
        if self.marks_turns:
            return self._marked(turns, learnt)
        written = self.render(turns)
        pieces = [self._piece(turns, i, written) for i in learnt]
        cuts = [cut for piece in pieces for cut in piece]
        if cuts != sorted(set(cuts)):
            raise self._differs(learnt[-1])
        ids, places = self._ids(written, cuts)
        spans = list(zip(places[::2], places[1::2], strict=True))
        end = getattr(self.tokenizer, "eos_token_id", None)
        is_last = learnt[-1] == len(turns) - 1
        if is_last and end is not None and not self._last_token(written[: cuts[-1]]):
            ids.append(end)  # the template has no token that ends a turn
            spans[-1] = (spans[-1][0], len(ids))
        for (begin, stop), (first, last) in zip(spans, pieces, strict=True):
            self._check(ids[begin:stop], written[first:last])
        return ids, spans

    def render(self, turns: Sequence[Message], *, opens: bool = False) -> str:
        """The text of a conversation.

        Args:
            turns: Messages.
            opens: Whether the beginning of an assistant's turn follows.

        Raises:
            UserError: The template refuses it.
        """
        conversation: str = self._apply(turns, tokenize=False, add_generation_prompt=opens)
        return conversation

    def _apply(self, turns: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(turns), tools=self.tools, **options)
        except Exception as error:  # a template raises what it likes
            raise UserError(
                f"{self.where}: the chat template refuses the conversation: {one_line(error)}"
            ) from error

    def _piece(self, turns: Sequence[Message], index: int, written: str) -> Span:
        """Where the text that is learnt of a turn begins and ends in the conversation's.

        It begins where the prompt of generation ends, or where it is written otherwise than that
        (a prompt may open a part for reasoning that the turn does not have).

        Raises:
            UserError: The template writes the turn otherwise when others follow it, or leaves out
                its words.
        """
        before, prompt = self.render(turns[:index]), self.render(turns[:index], opens=True)
        begin = common_length(prompt, written)
        if begin < common_length(prompt, before):
            raise self._differs(index)
        turn, up_to = turns[index], self.render(turns[: index + 1])
        words = turn["content"].strip()
        place = up_to.rfind(words, begin)
        if written.startswith(up_to):
            words_end = begin if place < 0 else place + len(words)
            end = self._end_of_turn(turn, up_to, begin, words_end)
        elif "tool_calls" in turn or place < 0:
            raise self._differs(index)
        else:  # the turn is written otherwise when it is the last one
            opening = up_to[begin:place]
            starts = [begin + len(opening)] if written.startswith(opening, begin) else []
            starts = [at for at in (*starts, begin) if words and written.startswith(words, at)]
            if not starts:
                raise self._differs(index)
            after = starts[0] + len(words)
            places = [(written.find(token, after), len(token)) for token in self.ends]
            end = min((at + size for at, size in places if at >= 0), default=after)
        learnt = self._without_ends(written[begin:end])
        if not learnt.strip() or plain(words.rpartition("</think>")[2]) not in plain(learnt):
            raise UserError(
                f"{self.where}: the chat template does not write what turn {index + 1} says"
            )
        return begin, end

    def _end_of_turn(self, turn: Message, up_to: str, begin: int, words_end: int) -> int:
        """Where a turn ends: after the first token behind it that ends one, or with its text.

        Args:
            turn: The message.
            up_to: The conversation up to this turn.
            begin: Where what is learnt of the turn begins.
            words_end: Where its words end, or `begin`.
        """
        ends: list[int] = []
        place = len(up_to.rstrip())
        while token := self._last_token(up_to[begin:place]):
            if place - len(token) < words_end and "tool_calls" not in turn:
                break
            ends.insert(0, place)
            place = len(up_to[: place - len(token)].rstrip())
        if not ends:
            return max(begin, place)
        # calls of tools may end with tokens of their own
        return ends[-1] if "tool_calls" in turn else ends[0]

    def _differs(self, index: int) -> UserError:
        return UserError(
            f"{self.where}: the chat template writes turn {index + 1} otherwise when other turns "
            "follow it, or after another prompt than that of generation: set objective.train_on to "
            "last, or model.chat_template to a template that marks what is generated"
        )

    def _last_token(self, written: str) -> str:
        """The longest added token that a text ends with; empty if there is none."""
        return max((token for token in self.ends if written.endswith(token)), key=len, default="")

    def _without_ends(self, written: str) -> str:
        for token in self.ends:
            written = written.replace(token, "")
        return written

    def _without_end(self, turn: Message) -> Message:
        """The message without end tokens that its content brings along: the template writes one."""
        content, end = turn["content"], getattr(self.tokenizer, "eos_token", None)
        while end and content.endswith(end):
            content = content.removesuffix(end)
        return {**turn, "content": content}

    def _marked(
        self, turns: Sequence[Message], learnt: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """The ids, and the spans that the template itself marks as generated.

        Raises:
            UserError: It marks another number of spans than there are turns of the assistant.
        """
        encoded = self._apply(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(encoded["input_ids"]), [0, *encoded["assistant_masks"], 0]
        begins = [i for i in range(len(ids)) if mask[i + 1] and not mask[i]]
        ends = [i for i in range(1, len(ids) + 1) if mask[i] and not mask[i + 1]]
        spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(begins) != len(spoken):
            raise UserError(
                f"{self.where}: the chat template marks {len(begins)} turns as generated, and the "
                f"assistant has {len(spoken)}"
            )
        special = {*getattr(self.tokenizer, "all_special_ids", ())}
        for k, end in enumerate(ends):  # marks around the words alone leave out what ends the turn
            if ids[end - 1] not in special and end < len(ids) and ids[end] in special:
                ends[k] += 1
        spans = dict(zip(spoken, zip(begins, ends, strict=True), strict=True))
        for i in learnt:
            words = turns[i]["content"].strip()
            if plain(words) not in plain(self._decoded(ids[slice(*spans[i])])):
                raise UserError(
                    f"{self.where}: the chat template does not mark the words of turn {i + 1}"
                )
        return ids[: spans[learnt[-1]][1]], [spans[i] for i in learnt]

    def _ids(self, written: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The ids of a text up to the last cut, and how many of them lie before each cut.

        The text up to a cut is tokenised as by itself, as a prompt is, whatever follows.

        Raises:
            UserError: The tokenizer writes the text otherwise when it is taken apart at a cut.
        """
        ids: list[int] = []
        places = []
        begin = 0
        for cut in cuts:
            up_to = text.plain_ids(self.tokenizer, [written[:cut]])[0]
            if up_to[: len(ids)] != ids:  # a token that spans the cut
                apart = [*ids, *text.plain_ids(self.tokenizer, [written[begin:cut]])[0]]
                if self._decoded(apart) != self._decoded(up_to):
                    raise UserError(
                        f"{self.where}: the tokenizer cannot take the conversation apart before "
                        f"{short(written[begin:cut])}"
                    )
                up_to = apart
            ids, begin = up_to, cut
            places.append(len(ids))
        return ids, places

    def _check(self, ids: Sequence[int], learnt: str) -> None:
        """Checks that ids are those of a text.

        Raises:
            UserError: They decode to another one.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown in ids:
            return
        decoded = self._decoded(ids)
        if not plain(decoded).startswith(plain(learnt)):
            raise UserError(
                f"{self.where}: what would be learnt decodes to {short(decoded)}, and the turn is "
                f"{short(learnt)}"
            )

    def _decoded(self, ids: Sequence[int]) -> str:
        decoded: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return decoded


def added_tokens(tokenizer: Any) -> set[str]:
    """The texts of a tokenizer's tokens that are no pieces of words, one of which ends a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added)}


def common_length(first: str, second: str) -> int:
    """The number of characters with which two texts begin alike.

    >>> common_length("<assistant><think>", "<assistant>Yes")
    11
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def plain(written: str) -> str:
    """A text without case, spaces and the marks that tokenizers normalise."""
    return "".join(unicodedata.normalize("NFKC", written).casefold().split())
