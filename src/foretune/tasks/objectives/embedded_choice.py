"""Choices among candidates whose texts are embedded by a frozen encoder, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.routing import route
from foretune.models.sentence_cache import SentenceCache
from foretune.tasks.batch import Batch


def check_embeds(model: nn.Module, scoring: str) -> None:
    """Checks that a model that is to compare hidden states gives some.

    Raises:
        UserError: It predicts tokens.
    """
    predicts = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if predicts and scoring == "bi-encoder":
        raise UserError(
            f"{type(model).__name__} predicts tokens: it scores candidates by scoring causal "
            "(objective.scoring in a recipe); bi-encoder compares hidden states of an encoder"
        )


def collate_embedded(
    rows: Sequence[Mapping[str, Any]], slots: Sequence[int], sentences: SentenceCache
) -> Batch:
    """Stacks the embeddings of contexts and candidates; a candidate appears once per slot.

    Args:
        rows: Encoded examples; `texts` are the numbers of the context and the candidates.
        slots: The slot of each row.
        sentences: The embeddings.
    """
    counts = np.array([len(row["texts"]) - 1 for row in rows])
    present = np.arange(counts.max())[None, :] < counts[:, None]
    numbers = np.concatenate([row["texts"][1:] for row in rows])
    owners = np.repeat(np.asarray(slots), counts)
    # sorted by slot, which saves the adapters a permutation
    pairs = owners * len(sentences) + numbers
    distinct, place = np.unique(pairs, return_inverse=True)
    index = np.zeros(present.shape, dtype=np.int64)
    index[present] = place
    owners, numbers = np.divmod(distinct, len(sentences))
    inputs = {
        "contexts": sentences.embeddings(np.array([row["texts"][0] for row in rows])),
        "responses": sentences.embeddings(numbers),
        "index": torch.from_numpy(index),
        "present": torch.from_numpy(present),
        "answer": torch.tensor([row["answer"] for row in rows]),
    }
    extra = {"response_slots": tuple(owners.tolist())}
    return Batch(inputs, tuple(slots), len(rows) + len(numbers), extra)


def embedded_scores(model: Any, batch: Batch) -> Tensor:
    """(n, candidates) cosines of contexts and responses after their towers."""
    inputs = batch.inputs
    with route(batch.slots):
        contexts = F.normalize(model.get_context_features(inputs["contexts"]).float(), dim=-1)
    with route(batch.extra["response_slots"]):
        responses = F.normalize(model.get_response_features(inputs["responses"]).float(), dim=-1)
    index = inputs["index"]
    candidates = responses.index_select(0, index.flatten()).view(*index.shape, -1)
    scores: Tensor = (candidates @ contexts.unsqueeze(-1)).squeeze(-1)
    return scores
