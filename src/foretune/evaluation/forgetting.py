"""What a language model could do before: general texts and benchmarks, before and after.

A base that is retrained on a pile of tasks, and then adapted, may become worse at everything else.
It is scored on texts that have nothing to do with the tasks (the mean log-likelihood per token),
and on benchmarks; the difference to the model as it was is taken example by example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from foretune.errors import UserError
from foretune.evaluation.statistics import mean_interval
from foretune.models.calls import eval_no_grad
from foretune.models.capacity import num_positions
from foretune.models.routing import routed
from foretune.tasks.objectives.causal_lm import CausalLM

BATCH = 8  # texts at once
TEXTS = "general texts"  # the measure that scores texts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model reached in one measure.

    Args:
        name: The measure, such as "general texts" or a benchmark.
        metric: Its unit.
        score: The score over all examples.
        num_examples: Number of examples.
        by_example: (n,) the score of each example; None where the score is no mean over them.
        higher_is_better: Whether a lower score is a loss.
    """

    name: str
    metric: str
    score: float
    num_examples: int
    by_example: np.ndarray | None = None
    higher_is_better: bool = True


def measured_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 128
) -> Measured:
    """The score of n texts; arguments and errors are those of `text_scores`.

    Raises:
        UserError: As `text_scores`.
    """
    scores = text_scores(model, tokenizer, texts, max_tokens)
    return Measured(
        name=TEXTS,
        metric="log-likelihood per token",
        score=float(scores.mean()),
        num_examples=len(texts),
        by_example=scores,
    )


def mean_of(models: Sequence[Measured]) -> Measured:
    """The mean over models, all of the same measure; at least one."""
    first = models[0]
    by_example = [m.by_example for m in models if m.by_example is not None]
    return dataclasses.replace(
        first,
        score=float(np.mean([m.score for m in models])),
        by_example=np.mean(by_example, axis=0) if len(by_example) == len(models) else None,
    )


def text_scores(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 128
) -> np.ndarray:
    """The mean log-likelihood per token of each text.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        texts: n texts of two tokens or more.
        max_tokens: Longer texts lose their end.

    Returns:
        Shape (n,), float64, in nats.

    Raises:
        UserError: The model does not predict tokens, or a text is too short.
    """
    rows = encoded_texts(model, tokenizer, texts, max_tokens)
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    scores = np.zeros(len(rows))
    with eval_no_grad(model), routed(None, None):
        device = next(model.parameters()).device
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = objective.collate([rows[i] for i in places], [0] * len(places)).to(device)
            scores[places] = objective.scores(model, batch).double().cpu().numpy()
    return scores


def encoded_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 128
) -> list[dict[str, Any]]:
    """The token ids of texts, cut to `max_tokens` and to what the model reads.

    Raises:
        UserError: As `text_scores`.
    """
    check_predicts_tokens(model, tokenizer)
    most = min(max_tokens, num_positions(model) or max_tokens)
    objective = CausalLM(tokenizer, max_tokens=most)
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            rows.append(objective.encode({"text": text}, ""))
        except UserError as error:
            reason = str(error).partition(": ")[2] or str(error)
            raise UserError(f"forgetting, text {number}: {reason}") from error
    return rows


def check_predicts_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Checks that a model is a decoder with a head over tokens.

    Raises:
        UserError: It is not.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or tokenizer is None or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise UserError(
            f"forgetting scores texts by a decoder that predicts tokens, which "
            f"{type(model).__name__} is not: leave forgetting out"
        )


def change(after: Measured, before: Measured) -> dict[str, float | None]:
    """The difference of two scores of the same examples, with its 95 % interval over examples.

    Where the score is no mean over examples, there is no interval.
    """
    if after.by_example is None or before.by_example is None:
        return {"mean": after.score - before.score, "low": None, "high": None}
    mean, low, high = mean_interval((after.by_example - before.by_example)[:, None])
    return {"mean": mean, "low": low, "high": high}
