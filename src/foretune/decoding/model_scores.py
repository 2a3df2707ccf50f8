"""States of a model on references, and what a causal language model alone says to them.

The score of a label is the sum of the log-probabilities of its tokens after the prompt; scores are
normalised over the labels of a store. Labels may share their first tokens: what they have in common
counts for each alike, and the first token in which they differ tells them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foretune.decoding.encoder_states import encoder_states, is_encoder
from foretune.decoding.generation import device_of
from foretune.decoding.output_states import LOGITS, TOKENS, read_states
from foretune.decoding.references import References
from foretune.decoding.side_models import bare_model, check_decoder
from foretune.models.calls import cache_argument

SCORED = 1000  # entries of which the model scores labels that have several tokens


def states_of(model: Any, references: References) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a store is built from: states, and what the model alone gives at some of them.

    Args:
        model: A causal language model of transformers or peft, or an encoder.
        references: Texts and places; N places in all.

    Returns:
        (states (N, d); log-probabilities (N,) of the token that follows, or (S, C) of the labels,
        None from an encoder; (S,) the entries whose labels are scored, None without).

    Raises:
        UserError: As `states_and_log_probs`.
    """
    if is_encoder(bare_model(model)):
        return encoder_states(model, references.texts), None, None
    if not references.has_labels:
        states, log_probs = states_and_log_probs(model, references)
        return states, log_probs[:, 0], None
    count = len(references.texts)
    spelled = max(map(len, references.labels.values())) > 1
    scored = drawn_entries(count, SCORED if spelled else count, seed=0)
    return *states_and_log_probs(model, references, scored.tolist()), scored


def drawn_entries(count: int, size: int, seed: int) -> Tensor:
    """(size,) ascending indices below `count`, drawn without replacement."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[:size].sort().values


def states_and_log_probs(
    model: Any, references: References, scored: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """States and log-probabilities of a model at the N places of references, on the CPU.

    Args:
        model: A causal language model of transformers or peft.
        references: Texts and places; with labels one place for each text.
        scored: The texts whose labels are scored; None for all.

    Returns:
        (states (N, d), log-probabilities): of the token that follows, (N, 1); with C labels (S, C)
        of all of them, normalised.

    Raises:
        UserError: The model is not a causal language model, or labels have several tokens and it
            has no KV cache.
    """
    if references.has_labels:
        return _with_labels(model, references, scored)
    values = references.flat_values()
    states, log_probs, start = [], [], 0
    for batch, logits in read_states(model, references.texts, references.places):
        next_tokens = values[start : start + len(batch), None].to(logits.device)
        log_probs.append(torch.log_softmax(logits.float(), -1).gather(1, next_tokens).cpu())
        states.append(batch.cpu())
        start += len(batch)
    return torch.cat(states), torch.cat(log_probs)


def _with_labels(
    model: Any, references: References, scored: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    labels = list(references.labels.values())
    if max(map(len, labels)) > 1:
        check_decoder(bare_model(model))
    chosen = list(range(len(references.texts)) if scored is None else scored)
    firsts = torch.tensor([tokens[0] for tokens in labels])
    states, log_probs, start = [], [], 0
    for batch, logits in read_states(model, references.texts, references.places):
        rows = [i - start for i in chosen if start <= i < start + len(batch)]
        log_p = torch.log_softmax(logits[rows].float(), -1)
        log_probs.append(log_p[:, firsts.to(log_p.device)].cpu())
        states.append(batch.cpu())
        start += len(batch)
    texts = [references.texts[i] for i in chosen]
    scores = torch.cat(log_probs) + later_log_probs(model, texts, labels)
    return torch.cat(states), torch.log_softmax(scores, -1)


@torch.no_grad()
def later_log_probs(
    model: Any, texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> Tensor:
    """The summed log-probability of all tokens but the first of each label, (n, C), on the CPU.

    A text is read once, and its cache is continued with every label.

    Args:
        model: A causal language model of transformers or peft, with a KV cache.
        texts: Token ids of n texts.
        labels: Token ids of C labels.
    """
    longer = [i for i, label in enumerate(labels) if len(label) > 1]
    scores = torch.zeros(len(texts), len(labels))
    if not longer:
        return scores
    device, name = device_of(model), str(cache_argument(bare_model(model)))
    # What is read behind a text: each label without its last token, once where labels share it.
    read = list(dict.fromkeys(tuple(labels[i][:-1]) for i in longer))
    longest = max(map(len, read))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in read], device=device)
    for row, text in enumerate(texts):
        cache = DynamicCache()
        out = model(
            input_ids=torch.tensor([list(text)], device=device), use_cache=True, **{name: cache}
        )
        step = max(1, min(TOKENS // longest, LOGITS // (longest * out.logits.shape[-1])))
        for start in range(0, len(read), step):
            part, rows = copy.deepcopy(cache), padded[start : start + step]
            part.batch_repeat_interleave(len(rows))
            mask = torch.ones(len(rows), len(text) + longest, dtype=torch.long, device=device)
            out = model(input_ids=rows, attention_mask=mask, use_cache=True, **{name: part})
            log_p = torch.log_softmax(out.logits.float(), -1).cpu()
            places = {ids: place for place, ids in enumerate(read[start : start + step])}
            for i in longer:
                place = places.get(tuple(labels[i][:-1]))
                if place is not None:
                    tokens = torch.tensor(labels[i][1:])
                    scores[row, i] = log_p[place, torch.arange(len(tokens)), tokens].sum()
    return scores
