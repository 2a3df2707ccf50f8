"""`CausalLM`: predict the next token of a text, of a completion, or of an assistant's turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.counted import logits_at
from foretune.models.routing import route
from foretune.run import check_int, check_one_of
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS
from foretune.tasks.messages import Message, checked_messages
from foretune.tasks.objectives import text
from foretune.tasks.objectives.chat import encode_chat
from foretune.tasks.task import Objective, TaskCollection


@dataclass(frozen=True)
class CausalLM(Objective):
    """Predict the next token of `text`, of `completion` after `prompt`, or of `messages`.

    The loss of an example is the mean negative log-likelihood of its tokens, or only of the
    completion's tokens if there is a prompt, or of the assistant's turns in a conversation, which
    the tokenizer's chat template writes; the score is its negative. A completion ends with the
    tokenizer's end-of-text token, so that a model learns where to stop; one that is cut does not.
    Prompt and completion are tokenised separately, so that no token spans both.

    A decoder reads prompt and completion as one text. An encoder-decoder reads the prompt in its
    encoder and generates the completion; it cannot learn from examples with `text`.

    Args:
        tokenizer: The model's tokenizer.
        max_tokens: Maximum length of a text, or of prompt and completion together, special tokens
            included. A longer text loses its end; a prompt loses its beginning, and a completion
            its end only if it alone is too long. A conversation loses its oldest exchanges.
        train_on: The assistant's turns that are learnt in a conversation: "last" or "all".
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    max_tokens: int = 128
    train_on: Literal["last", "all"] = "last"

    kind: ClassVar[str] = "causal-lm"
    metric: ClassVar[str] = "log-likelihood per token"
    head: ClassVar[str] = "causal-lm"

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 2)
        check_one_of("train_on", self.train_on, ("last", "all"))

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks that all examples have text or messages; there is nothing to learn."""
        for task in tasks:
            for split in SPLITS:
                for row in task.split(split):
                    if "messages" in row:
                        self._messages(row, task.name)
                        continue
                    for name in ("text",) if "prompt" not in row else ("prompt", "completion"):
                        text.text_of(row, name, task.name)
        return self

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        if "messages" in example:
            ids, spans = encode_chat(
                self.tokenizer,
                self._messages(example, task),
                train_on=self.train_on,
                max_tokens=self.max_tokens,
                tools=example.get("tools"),
                where=text.name_of(example, task),
            )
            return {"input_ids": ids, "learnt": spans}
        single = text.single_template(self.tokenizer)
        single.room(self.max_tokens, "max_tokens")
        if "prompt" in example:
            return self._encode_prompt(example, task, single)
        ids = text.field_ids(self.tokenizer, example, "text", task)
        after = [] if tuple(ids[-len(single.after) :]) == single.after else single.after
        ids = [*single.before, *ids, *after][: self.max_tokens]  # no closing token after a cut
        if len(ids) < 2:
            raise UserError(
                f"{text.name_of(example, task)}: a text needs two tokens or more, to predict one "
                f"from another; got {example['text']!r:.60}"
            )
        return {"input_ids": ids, "learnt": [(1, len(ids))]}

    def _messages(self, example: Mapping[str, Any], task: str) -> list[Message]:
        return checked_messages(example["messages"], f"{text.name_of(example, task)}: messages")

    def _encode_prompt(
        self, example: Mapping[str, Any], task: str, single: text.Template
    ) -> dict[str, Any]:
        """An example of prompt and completion, for a decoder and for an encoder-decoder.

        Raises:
            UserError: The prompt or the completion has no token.
        """
        # an empty prompt leaves the leading special tokens, an empty completion the end of text
        prompt, completion = (
            text.field_ids(self.tokenizer, example, name, task) if example.get(name) != "" else []
            for name in ("prompt", "completion")
        )
        # the leading special tokens go before the prompt, which keeps at least one token
        before = list(single.before)
        end = getattr(self.tokenizer, "eos_token_id", None)
        completion = text.ended(completion, end, self.max_tokens - max(len(before), 1))
        room = self.max_tokens - len(before) - len(completion)
        prompt = prompt[-room:] if room else []
        if not completion or (not before and not prompt):
            raise UserError(
                f'{text.name_of(example, task)}: a row needs tokens in "prompt" and in '
                f'"completion", got {example["prompt"]!r:.40} and {example["completion"]!r:.40}'
            )
        ids = [*before, *prompt, *completion]
        return {
            "input_ids": ids,
            "learnt": [(len(ids) - len(completion), len(ids))],
            "source": single.fill(prompt),
            "target": completion,
        }

    @override
    def token_ids(
        self, row: Mapping[str, Any], *, encoder_decoder: bool = False
    ) -> Iterable[Sequence[int]]:
        if encoder_decoder and "source" in row:
            return [row["source"], row["target"]]
        return [row["input_ids"]]

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return len(row["input_ids"])

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        fill = text.pad_id(self.tokenizer)
        ids = [row["input_ids"] for row in rows]
        labels = [labels_of(row["input_ids"], row["learnt"]) for row in rows]
        inputs = {
            "input_ids": text.pad(ids, fill),
            "attention_mask": text.pad_mask(ids),
            "labels": text.pad(labels, text.IGNORED),
        }
        # both forms, because only `losses` knows whether the model is an encoder-decoder
        if all("source" in row for row in rows):
            sources = [row["source"] for row in rows]
            inputs["source_ids"] = text.pad(sources, fill)
            inputs["source_mask"] = text.pad_mask(sources)
            inputs["target"] = text.pad([row["target"] for row in rows], text.IGNORED)
        return Batch(inputs, tuple(slots), sum(map(len, ids)), {})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        inputs = batch.inputs
        config = getattr(model, "config", None)
        # a cache of keys and values is useful only in generation
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        if getattr(config, "is_encoder_decoder", False):
            if "target" not in inputs:
                raise UserError(
                    'an encoder-decoder learns from "prompt" and "completion", got a row with '
                    '"text" or "messages"'
                )
            with route(batch.slots):
                output = model(
                    input_ids=inputs["source_ids"],
                    attention_mask=inputs["source_mask"],
                    labels=inputs["target"],
                    **options,
                )
            counted = inputs["target"] != text.IGNORED
            return mean_nll(text.logits_of(output)[counted], inputs["target"])
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=text.IGNORED)
        with route(batch.slots):
            logits = logits_at(
                model,
                labels != text.IGNORED,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                **options,
            )
        return mean_nll(logits, labels)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_tokens": self.max_tokens, "train_on": self.train_on}


def labels_of(ids: Sequence[int], learnt: Iterable[tuple[int, int]]) -> list[int]:
    """The ids inside the spans that are learnt, `IGNORED` elsewhere.

    >>> labels_of([5, 6, 7, 8], [(1, 2), (3, 4)])
    [-100, 6, -100, 8]
    """
    labels = [text.IGNORED] * len(ids)
    for begin, end in learnt:
        labels[begin:end] = ids[begin:end]
    return labels


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) mean of −log p over the labels of each row.

    Args:
        logits: (K, vocabulary), those of the K positions that count, row by row.
        labels: (n, L), `IGNORED` where a position does not count.
    """
    counted = labels != text.IGNORED
    nll = F.cross_entropy(logits.float(), labels[counted], reduction="none")
    total = nll.new_zeros(len(labels)).index_add(0, counted.nonzero()[:, 0], nll)
    return total / counted.sum(1).clamp(min=1)
