"""`Preference`: of two answers to a prompt, which one is preferred?

Two ways to score an answer. A reward model has a head with one output, r, that reads prompt and
answer. DPO makes the language model itself the reward: beta times how much likelier the answer has
become than under a reference, which is the model that training started from. Either way the loss
is that of Bradley and Terry, −log σ(r(chosen) − r(rejected)), and the score is the share of pairs
in which the chosen answer has the higher reward.

Papers: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 1952; Rafailov
et al., "Direct Preference Optimization", NeurIPS 2023, arXiv:2305.18290, equation 7.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.calls import eval_no_grad
from foretune.models.counted import logits_at
from foretune.models.routing import route
from foretune.run import check_int, check_one_of, check_positive
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS
from foretune.tasks.objectives import text
from foretune.tasks.objectives.causal_lm import labels_of, mean_nll
from foretune.tasks.objectives.chat import encode_answers
from foretune.tasks.preferences import checked_pair
from foretune.tasks.task import Objective, TaskCollection


@dataclass(frozen=True)
class Preference(Objective):
    """Tell the preferred answer from the other one.

    An example has `prompt` (a text or messages), `chosen` and `rejected` (texts, or messages).

    Args:
        tokenizer: The model's tokenizer.
        scoring: "reward": a head with one output. "dpo": a language model, against the model that
            is given to the verb. The language model before any training has no preference.
        beta: Of DPO: the reward per nat of log-likelihood.
        max_tokens: Maximum length of prompt and answer together, special tokens included. A longer
            prompt loses its beginning, a conversation its oldest exchanges, an answer that is too
            long by itself its end.
        reference: The model that DPO compares with, learnt by `bind`.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    scoring: Literal["reward", "dpo"] = "reward"
    beta: float = 0.1
    max_tokens: int = 256
    reference: _Reference | None = field(
        default=None, repr=False, compare=False, metadata={"learnt": True}
    )

    kind: ClassVar[str] = "preference"
    metric: ClassVar[str] = "accuracy"
    select_by_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_one_of("scoring", self.scoring, ("reward", "dpo"))
        check_positive("beta", self.beta)
        check_int("max_tokens", self.max_tokens, 2)

    @property
    @override
    def head(self) -> str:
        return "classification" if self.scoring == "reward" else "causal-lm"

    @override
    def num_outputs(self) -> int | None:
        return 1 if self.scoring == "reward" else None

    @override
    def chance(self) -> float | None:
        return 0.5

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks all examples; there is nothing to learn."""
        for task in tasks:
            for split in SPLITS:
                for row in task.split(split):
                    checked_pair(row, text.name_of(row, task.name))
        return self

    @override
    def bind(self, model: nn.Module) -> Self:
        """The form that compares with this model, which training leaves as it is.

        Raises:
            UserError: It is an encoder-decoder, and the scoring DPO.
        """
        if self.scoring == "reward":
            return self
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UserError("DPO reads prompt and answer as one text: use a decoder")
        return replace(self, reference=_Reference(model))

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        where = text.name_of(example, task)
        pair = checked_pair(example, where)
        answers: list[Any] = [pair.chosen, pair.rejected]
        if isinstance(pair.prompt, str):
            encoded = self._encode_texts(pair.prompt, answers, where)
        else:
            encoded = encode_answers(
                self.tokenizer,
                pair.prompt,
                answers,
                max_tokens=self.max_tokens,
                tools=example.get("tools"),
                where=where,
            )
        if encoded[0][0] == encoded[1][0]:
            raise UserError(
                f"{where}: both answers are the same to the model, at most {self.max_tokens} "
                "tokens of prompt and answer: set max_tokens higher, or leave the row out"
            )
        return {
            "texts": [ids for ids, _ in encoded],  # with the chosen answer, with the other one
            "learnt": [span for _, span in encoded],
        }

    def _encode_texts(
        self, prompt: str, answers: Sequence[str], where: str
    ) -> list[tuple[list[int], tuple[int, int]]]:
        """Prompt and answer between the tokenizer's special tokens, for each answer.

        Raises:
            UserError: The prompt or an answer has no token.
        """
        single = text.single_template(self.tokenizer)
        single.room(self.max_tokens, "max_tokens")
        before, after = list(single.before), list(single.after)
        # what ends a text, unless the tokenizer puts a token of its own after it
        end = None if after else getattr(self.tokenizer, "eos_token_id", None)
        prompt_ids = text.token_ids(self.tokenizer, prompt, where) if prompt else []
        room = self.max_tokens - len(before) - len(after)
        # one token of the prompt stays, from which an answer's first token is predicted
        least = 1 if prompt_ids and not before else 0
        ids = [
            text.ended(text.token_ids(self.tokenizer, answer, where), end, room - least)
            for answer in answers
        ]
        room -= max(map(len, ids))
        start = [*before, *(prompt_ids[-room:] if room else [])]
        if not all(ids) or (not start and self.scoring == "dpo"):
            raise UserError(f"{where}: the tokenizer makes no token of the prompt or an answer")
        return [
            ([*start, *answer, *after], (len(start), len(start) + len(answer) + len(after)))
            for answer in ids
        ]

    @override
    def token_ids(
        self, row: Mapping[str, Any], *, encoder_decoder: bool = False
    ) -> Iterable[Sequence[int]]:
        return list(row["texts"])

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return sum(map(len, row["texts"]))

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        # the texts are sorted by slot, which saves the adapters a permutation
        order = sorted(range(len(rows)), key=lambda i: slots[i])
        texts = [ids for i in order for ids in rows[i]["texts"]]
        spans = [span for i in order for span in rows[i]["learnt"]]
        labels = [labels_of(ids, [span]) for ids, span in zip(texts, spans, strict=True)]
        places = torch.empty(len(rows), dtype=torch.long)
        places[torch.tensor(order, dtype=torch.long)] = 2 * torch.arange(len(rows))
        inputs = {
            "input_ids": text.pad(texts, text.pad_id(self.tokenizer)),
            "attention_mask": text.pad_mask(texts),
            "labels": text.pad(labels, text.IGNORED),
            "places": places,
        }
        owners = tuple(slots[i] for i in order for _ in rows[i]["texts"])
        return Batch(inputs, tuple(slots), sum(map(len, texts)), {"text_slots": owners})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        return -F.logsigmoid(self._margins(model, batch))

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return self.scores_and_losses(model, batch)[0]

    @override
    def scores_and_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        margins = self._margins(model, batch)
        return (1 + margins.sign()) / 2, -F.logsigmoid(margins)

    def _margins(self, model: Any, batch: Batch) -> Tensor:
        """(n,) reward of the chosen answer minus that of the rejected one."""
        chosen, rejected = self.outputs(model, batch).T
        return chosen - rejected

    @override
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """(n, 2) rewards of the chosen answer and of the rejected one.

        Raises:
            UserError: DPO has no reference.
        """
        inputs = batch.inputs
        with route(batch.extra["text_slots"]):
            rewards = (
                self._head_outputs(model, inputs)
                if self.scoring == "reward"
                else log_likelihoods(model, inputs)
            )
        if self.scoring == "dpo":
            if self.reference is None:
                raise UserError("DPO compares with a reference: call objective.bind(model)")
            rewards = self.beta * (rewards - self.reference.log_likelihoods(inputs))
        places = inputs["places"]
        return torch.stack([rewards[places], rewards[places + 1]], 1)

    def _head_outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(2n,) outputs of the head.

        Raises:
            UserError: It has not one output.
        """
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = text.logits_of(output).float()
        if logits.shape[-1] != 1:
            raise UserError(
                f"a reward model has a head of 1 output, this model's has {logits.shape[-1]}"
            )
        return logits[:, 0]

    @override
    def to_dict(self) -> dict[str, Any]:
        fields = ("scoring", "beta", "max_tokens")
        return {"kind": self.kind, **{name: getattr(self, name) for name in fields}}


class _Reference:
    """A model that stays as it is, and the log-likelihoods that it has given.

    Args:
        model: The model, which may get adapters later; they do not count here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.computed: dict[bytes, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self  # the same model, and no second copy of it

    def log_likelihoods(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(n,) log-likelihoods of the labels of a batch, as those of the function below."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        begins = (labels == text.IGNORED).cumprod(1).sum(1).tolist()
        lengths = inputs["attention_mask"].sum(1).tolist()
        rows = ids.tolist()
        keys = [
            hashlib.sha256(repr((begin, row[:length])).encode()).digest()
            for begin, row, length in zip(begins, rows, lengths, strict=True)
        ]
        missing = [i for i, key in enumerate(keys) if key not in self.computed]
        if missing:
            device = next(self.model.parameters()).device
            if device != ids.device:
                self.model = copy.deepcopy(self.model).to(ids.device)
            part = {
                name: inputs[name][missing] for name in ("input_ids", "attention_mask", "labels")
            }
            with eval_no_grad(self.model), route(None):
                values = log_likelihoods(self.model, part).tolist()
            self.computed.update(zip((keys[i] for i in missing), values, strict=True))
        return torch.tensor([self.computed[key] for key in keys], device=ids.device)


def log_likelihoods(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(n,) sum of log p over the labels of each row.

    Args:
        model: A decoder.
        inputs: `input_ids`, `attention_mask` and `labels`, each (n, L).
    """
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=text.IGNORED)
    counted = labels != text.IGNORED
    # a cache of keys and values is useful only in generation
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    logits = logits_at(
        model,
        counted,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **options,
    )
    return -mean_nll(logits, labels) * counted.sum(1)
