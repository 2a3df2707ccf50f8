"""`Choice`: pick the right candidate for a context, scored in one of three ways.

A bi-encoder embeds contexts and candidates separately and compares them by cosine; a cross-encoder
reads each context together with each candidate and classifies the pair as right or wrong; a decoder
gives the likelihood of each candidate as the continuation of the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.routing import route
from foretune.models.sentence_cache import SentenceCache, sentence_cache
from foretune.models.tower import DualTower
from foretune.run import check_at_least, check_int, check_one_of, check_positive
from foretune.tasks.batch import Batch
from foretune.tasks.drawn_rows import DrawnRows
from foretune.tasks.example import SPLITS, DrawnExample, row_name
from foretune.tasks.objectives import embedded_choice, text
from foretune.tasks.objectives.accuracy import accuracies
from foretune.tasks.objectives.shared_context import log_likelihoods, shared_rows
from foretune.tasks.rows import check_repeats
from foretune.tasks.task import Objective, Task, TaskCollection


@dataclass(frozen=True)
class Choice(Objective):
    """Pick the right candidate for a context.

    An example has `context` (a text or a list of turns), `candidates` (texts) and `answer`, the
    index of the right candidate.

    Args:
        tokenizer: The model's tokenizer.
        scoring: "bi-encoder": mean-pooled embeddings, cosine / temperature, cross-entropy over the
            example's candidates. "cross-encoder": a two-class head on (context, candidate) pairs,
            cross-entropy averaged over the candidates, one positive and many negatives, all of
            equal weight; the candidate with the greatest class-1 logit is picked. "causal": a
            decoder's mean log-likelihood per token of the candidate after the context
            (`shared_context`) / temperature, cross-entropy over the example's candidates.
        temperature: Divides the cosine or the log-likelihood (not used by the cross-encoder). The
            default suits a cosine; for log-likelihoods, 1 leaves them as the model gives them.
        max_context_tokens: Maximum length of a context, special tokens included; longer ones lose
            their beginning.
        max_response_tokens: Maximum length of a candidate, special tokens included; longer ones
            lose their end, and with "causal" the end-of-text token that closes the others.
        context_turns: Number of turns to keep of a context that is a list, the last ones; None
            keeps all.
        train_candidates: Number of candidates in training: the right one and a fresh draw of the
            others; None keeps all.
        guess: Expected score of a random guess, learnt by `fit`.
        sentences: The embeddings of texts where the model has a frozen encoder, learnt by `bind`.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    scoring: Literal["bi-encoder", "cross-encoder", "causal"] = "bi-encoder"
    temperature: float = 0.05
    max_context_tokens: int = 32
    max_response_tokens: int = 24
    context_turns: int | None = None
    train_candidates: int | None = None
    guess: float | None = field(default=None, metadata={"learnt": True})
    sentences: SentenceCache | None = field(
        default=None, repr=False, compare=False, metadata={"learnt": True}
    )

    kind: ClassVar[str] = "choice"
    metric: ClassVar[str] = "accuracy"
    select_by_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_one_of("scoring", self.scoring, ("bi-encoder", "cross-encoder", "causal"))
        check_positive("temperature", self.temperature)
        check_at_least("temperature", self.temperature, 1e-6)
        check_int("max_context_tokens", self.max_context_tokens, 1)
        check_int("max_response_tokens", self.max_response_tokens, 1)
        check_int("context_turns", self.context_turns, 1, optional=True)
        check_int("train_candidates", self.train_candidates, 2, optional=True)

    @property
    @override
    def head(self) -> str:
        heads = {"bi-encoder": "none", "causal": "causal-lm"}
        return heads.get(self.scoring, "classification")

    @override
    def num_outputs(self) -> int | None:
        return 2 if self.scoring == "cross-encoder" else None

    @override
    def chance(self) -> float | None:
        return self.guess

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks all examples and learns the chance level: the mean of 1 / number of candidates."""
        total, num_examples = 0.0, 0
        for task in tasks:
            for split in SPLITS:
                for count in _candidate_counts(task, split):
                    total += 1 / count
                    num_examples += 1
        return dataclasses.replace(self, guess=total / num_examples)

    @override
    def bind(self, model: nn.Module) -> Self:
        """The form that embeds texts only once, where the model has a frozen encoder.

        Raises:
            UserError: The model has one, and compares no contexts and responses.
        """
        embedded_choice.check_embeds(model, self.scoring)
        sentences = sentence_cache(model)
        if sentences is not None and not isinstance(model, DualTower):
            raise UserError(
                f"a choice needs a tower for contexts and one for responses, got "
                f'{type(model).__name__}: load_model(name, head="none", tower=[512])'
            )
        if sentences is not None and self.scoring != "bi-encoder":
            raise UserError(
                f"towers compare contexts and responses (scoring bi-encoder); for {self.scoring} "
                "load the model without tower"
            )
        return dataclasses.replace(self, sentences=sentences)

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        turns = example["context"]
        if not isinstance(turns, str):
            turns = " ".join(turns if self.context_turns is None else turns[-self.context_turns :])
        where = text.name_of(example, task)
        context = text.token_ids(self.tokenizer, turns, where)
        candidates = [text.token_ids(self.tokenizer, c, where) for c in example["candidates"]]
        encoded: dict[str, Any] = {"answer": int(example["answer"])}
        encoded |= self._encode_texts(context, candidates, where)
        if not isinstance(example, DrawnExample):
            self._check_distinct(encoded["candidates"], example["candidates"], where)
        if self.sentences is not None:
            texts = [encoded["context"], *encoded["candidates"]]
            encoded["texts"] = np.array([self.sentences.number_of(ids) for ids in texts])
        return encoded

    def _encode_texts(
        self, context: list[int], candidates: Sequence[list[int]], where: str
    ) -> dict[str, Any]:
        """The context and the candidates, cut and with their special tokens.

        Raises:
            UserError: A text has no token.
        """
        if self.scoring == "causal":
            return self._encode_causal(context, candidates, where)
        if not context or not all(candidates):
            raise UserError(f"{where}: the tokenizer makes no token of the context or a candidate")
        encoded: dict[str, Any] = {}
        if self.scoring == "bi-encoder":
            single = text.single_template(self.tokenizer)
            room = single.room(self.max_context_tokens, "max_context_tokens")
            encoded["context"] = tuple(single.fill(context[-room:]))
            room = single.room(self.max_response_tokens, "max_response_tokens")
            # tuples, because `collate` looks candidates up to encode each only once
            encoded["candidates"] = [tuple(single.fill(ids[:room])) for ids in candidates]
            return encoded
        pair = text.pair_template(self.tokenizer)
        context = context[-pair.room(self.max_context_tokens, "max_context_tokens") :]
        candidates = [ids[: self.max_response_tokens] for ids in candidates]
        encoded["candidates"] = [pair.fill(context, ids) for ids in candidates]
        encoded["second"] = len(pair.before) + len(context) + len(pair.between)
        return encoded

    def _check_distinct(
        self, encoded: Sequence[Sequence[int]], candidates: Sequence[str], where: str
    ) -> None:
        """Checks that no two candidates are the same once encoded.

        Raises:
            UserError: Two are, so that no model could tell them apart.
        """
        first: dict[tuple[int, ...], int] = {}
        for i, ids in enumerate(encoded):
            equal = first.setdefault(tuple(ids), i)
            if equal != i:
                raise UserError(
                    f"{where}: candidates {equal + 1} and {i + 1} are the same to the model "
                    f"({candidates[equal]!r:.40} and {candidates[i]!r:.40}): set "
                    f"max_response_tokens above {self.max_response_tokens} if they differ further "
                    "on, or remove one"
                )

    def _encode_causal(
        self, context: Sequence[int], candidates: Sequence[Sequence[int]], where: str
    ) -> dict[str, Any]:
        """The context after the tokenizer's leading special tokens, candidates with end of text.

        Raises:
            UserError: The context or a candidate has no token.
        """
        before = list(text.single_template(self.tokenizer).before)
        end = getattr(self.tokenizer, "eos_token_id", None)
        room = self.max_context_tokens - len(before)
        context_ids = [*before, *(context[-room:] if room > 0 else [])]
        if not context_ids:
            raise UserError(
                f"{where}: max_context_tokens={self.max_context_tokens} or an empty context leaves "
                "no token to predict a candidate from"
            )
        truncated = [text.ended(ids, end, self.max_response_tokens) for ids in candidates]
        if not all(truncated):
            raise UserError(f"{where}: an empty candidate leaves no token to score")
        return {"context": context_ids, "candidates": truncated}

    @override
    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """Keeps the right candidate and a draw of the others, in their original order."""
        others = [i for i in range(len(row["candidates"])) if i != row["answer"]]
        if self.train_candidates is None or self.train_candidates > len(others):
            return row
        drawn = rng.choice(others, self.train_candidates - 1, replace=False).tolist()
        indices = sorted([row["answer"], *drawn])
        candidates = [row["candidates"][i] for i in indices]
        sampled = {**row, "candidates": candidates, "answer": indices.index(row["answer"])}
        if "texts" in row:
            sampled["texts"] = row["texts"][[0, *(i + 1 for i in indices)]]
        return sampled

    @override
    def token_ids(
        self, row: Mapping[str, Any], *, encoder_decoder: bool = False
    ) -> Iterable[Sequence[int]]:
        if self.scoring == "causal":
            return [[*row["context"], *ids] for ids in row["candidates"]]
        return [*([row["context"]] if "context" in row else []), *row["candidates"]]

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        if "texts" in row:
            return len(row["texts"])
        return len(row.get("context", ())) + sum(map(len, row["candidates"]))

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        if self.scoring == "causal":
            return self._collate_causal(rows, slots)
        if self.sentences is not None:
            return embedded_choice.collate_embedded(rows, slots, self.sentences)
        width = max(len(row["candidates"]) for row in rows)
        index = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=bool)
        answer = np.array([row["answer"] for row in rows])
        # the texts are sorted by slot, which saves the adapters a permutation
        order = sorted(range(len(rows)), key=lambda i: slots[i])
        stacked: list[Sequence[int]] = []
        owners: list[int] = []
        seconds: list[int] = []
        text_indices: dict[tuple[int, Sequence[int]], int] = {}

        def text_index(ids: Sequence[int], i: int) -> int:
            """Index of these ids among the stacked texts; one that repeats in a slot is reused."""
            unique = self.scoring != "cross-encoder"
            last = len(stacked)
            position = text_indices.setdefault((slots[i], ids), last) if unique else last
            if position == last:
                stacked.append(ids)
                owners.append(slots[i])
                seconds.append(rows[i].get("second", 0))
            return position

        contexts = np.zeros(len(rows), dtype=np.int64)
        for i in order:
            if self.scoring == "bi-encoder":
                contexts[i] = text_index(rows[i]["context"], i)
            for j, ids in enumerate(rows[i]["candidates"]):
                mask[i, j] = True
                index[i, j] = text_index(ids, i)
        inputs = {
            "text_ids": text.pad(stacked, text.pad_id(self.tokenizer)),
            "text_mask": text.pad_mask(stacked),
            "context_index": torch.from_numpy(contexts),
            "index": torch.from_numpy(index),
            "present": torch.from_numpy(mask),
            "answer": torch.from_numpy(answer),
        }
        if self.scoring == "cross-encoder":
            inputs |= self._token_types(stacked, seconds)
        return Batch(inputs, tuple(slots), sum(map(len, stacked)), {"text_slots": tuple(owners)})

    def _collate_causal(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        order = sorted(range(len(rows)), key=lambda i: slots[i])
        counts = [len(row["candidates"]) for row in rows]
        starts = dict(zip(order, np.cumsum([0, *(counts[i] for i in order)]), strict=False))
        columns = np.arange(max(counts))[None, :]
        present = columns < np.array(counts)[:, None]
        index = np.where(present, np.array([starts[i] for i in range(len(rows))])[:, None], 0)
        inputs = shared_rows(
            [rows[i]["context"] for i in order],
            [rows[i]["candidates"] for i in order],
            text.pad_id(self.tokenizer),
        )
        num_tokens = int((inputs["part"] >= 0).sum())
        inputs |= {
            "index": torch.from_numpy(np.where(present, index + columns, 0)),
            "present": torch.from_numpy(present),
            "answer": torch.tensor([row["answer"] for row in rows]),
        }
        extra = {"text_slots": tuple(slots[i] for i in order)}
        return Batch(inputs, tuple(slots), num_tokens, extra)

    def _token_types(
        self, rows: Sequence[Sequence[int]], seconds: Sequence[int]
    ) -> dict[str, Tensor]:
        """(n, L) token type ids, for models such as BERT that mark a pair's two texts by them."""
        segments = text.pair_template(self.tokenizer).segments
        if segments is None or segments[0] == segments[1]:
            return {}
        longest = max(map(len, rows))
        in_second = np.arange(longest)[None, :] >= np.array(seconds)[:, None]
        in_second &= np.arange(longest)[None, :] < np.array([len(r) for r in rows])[:, None]
        types = np.where(in_second, segments[1], segments[0])
        return {"text_types": torch.from_numpy(types.astype(np.int64))}

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        if self.scoring != "cross-encoder":
            return self.scores_and_losses(model, batch)[1]
        present, logits = batch.inputs["present"], self._pair_logits(model, batch)
        target = F.one_hot(batch.inputs["answer"], present.shape[1]).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
        return (losses.view_as(present) * present).sum(1) / present.sum(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return self.scores_and_losses(model, batch)[0]

    @override
    def scores_and_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores, and cross-entropies over the candidates.

        The loss of a cross-encoder's pairs, most of which are wrong ones, falls with every model
        that only learns how many are.
        """
        values, answer = self.outputs(model, batch), batch.inputs["answer"]
        return accuracies(values, answer), F.cross_entropy(values, answer, reduction="none")

    @override
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        scale = 1.0 if self.scoring == "cross-encoder" else self.temperature
        values = self._candidate_scores(model, batch) / scale
        return values.masked_fill(~batch.inputs["present"], -torch.inf)

    def _candidate_scores(self, model: Any, batch: Batch) -> Tensor:
        """(n, candidates) cosines, class-1 logits or log-likelihoods, depending on `scoring`."""
        inputs = batch.inputs
        if self.scoring == "cross-encoder":
            return self._pair_logits(model, batch)[..., 1]
        if self.scoring == "causal":
            return log_likelihoods(model, inputs, batch.extra["text_slots"])[inputs["index"]]
        if "contexts" in inputs:
            return embedded_choice.embedded_scores(model, batch)
        with route(batch.extra["text_slots"]):
            texts = embed(model, inputs["text_ids"], inputs["text_mask"])
        contexts = texts.index_select(0, inputs["context_index"])
        index = inputs["index"]
        candidates = texts.index_select(0, index.flatten()).view(*index.shape, -1)
        return (candidates @ contexts.unsqueeze(-1)).squeeze(-1)

    def _pair_logits(self, model: Any, batch: Batch) -> Tensor:
        """(n, candidates, 2) logits of each pair.

        Raises:
            UserError: The model's head does not have two outputs.
        """
        inputs = batch.inputs
        types = inputs.get("text_types")
        extra = {} if types is None else {"token_type_ids": types}
        with route(batch.extra["text_slots"]):
            output = model(
                input_ids=inputs["text_ids"], attention_mask=inputs["text_mask"], **extra
            )
        logits = text.logits_of(output).float()
        if logits.shape[-1] != 2:
            raise UserError(
                f"a cross-encoder needs a head of 2 outputs, this model's has {logits.shape[-1]}"
            )
        return logits[inputs["index"]]

    @override
    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["tokenizer"], fields["sentences"]
        return {"kind": self.kind, **fields}


def embed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(n, d) unit vectors: the mean of the last hidden states over the tokens.

    Args:
        model: An encoder.
        ids: (n, L) token ids.
        mask: (n, L), 1 at tokens, 0 at padding.
    """
    output = model(input_ids=ids, attention_mask=mask)
    hidden = output if isinstance(output, Tensor) else output.last_hidden_state
    return F.normalize(text.mean_pool(hidden.float(), mask), dim=-1)


def _candidate_counts(task: Task, split: str) -> Iterator[int]:
    """The number of candidates of each example of a split, which is also checked."""
    rows = task.split(split)
    if isinstance(rows, DrawnRows):  # valid by construction, and slow to read
        yield from rows.candidate_counts()
        return
    for i, row in enumerate(rows):
        check_row(row, row_name(task.name, split, i, row))
        yield len(row["candidates"])


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Checks that a row is a choice among candidates.

    Args:
        row: The row.
        where: Task, split and number of the row, for the message.

    Raises:
        UserError: A field is missing, or its value is not valid.
    """
    for name in ("context", "candidates", "answer"):
        if row.get(name) is None:
            raise UserError(f'{where}: a choice needs "{name}"; the row has {", ".join(row)}')
    candidates, answer = row["candidates"], row["answer"]
    if isinstance(candidates, str) or len(candidates) < 2:
        raise UserError(f"{where}: candidates must be two texts or more, got {candidates!r:.60}")
    check_repeats(candidates, where)
    if not isinstance(answer, (int, np.integer)) or not 0 <= answer < len(candidates):
        raise UserError(
            f"{where}: answer must be the index of one of the {len(candidates)} candidates "
            f"(0 to {len(candidates) - 1}), got {answer!r}"
        )
