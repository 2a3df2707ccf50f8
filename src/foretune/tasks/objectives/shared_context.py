"""A decoder's likelihood of each candidate after a context that is computed once for all of them.

    row         context  candidate 1  candidate 2 …     one row for all candidates
    position    0 … c−1  c c+1 …      c c+1 …           as if each followed the context directly
    attends to  ↙        context and itself, never another candidate

A candidate's score is the mean of log p(token | context, candidate's tokens before it) over its
tokens. It is a mean and not a sum because a sum favours short candidates.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from foretune.models.calls import eval_no_grad
from foretune.models.counted import logits_at
from foretune.models.frozen_prefix import served_share
from foretune.models.routing import current_rows, route
from foretune.tasks.objectives import text

PADDING = -1  # number of the candidate at a padded position; 0 stands for the context

logger = logging.getLogger("foretune")
_CAN_SHARE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shared_rows(
    contexts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], fill: int
) -> dict[str, Tensor]:
    """The inputs of a batch, with one row per context.

    Args:
        contexts: Token ids of the n contexts, one or more each.
        candidates: Token ids of the candidates of each context, one or more each.
        fill: Padding id.

    Returns:
        (n, L): `ids`, `part` (number of the candidate that a position belongs to), `positions`.
        One entry per candidate token in the batch: its candidate's index in the batch
        (`token_of`), and the flat positions (row · L + column) at which it is and at which it is
        predicted (`token_at`, `token_from`). One row per candidate: the flat positions of context
        and candidate, padded with −1 (`pair`), and the row of the context (`pair_row`).
    """
    rows = [[*c, *itertools.chain(*ks)] for c, ks in zip(contexts, candidates, strict=True)]
    width = max(map(len, rows))
    part = np.full((len(rows), width), PADDING, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    token_of: list[int] = []
    token_at: list[int] = []
    token_from: list[int] = []
    pairs: list[list[int]] = []
    pair_row: list[int] = []
    for i, context in enumerate(contexts):
        base, start = i * width, len(context)
        part[i, :start] = 0
        positions[i, :start] = np.arange(start)
        for number, ids in enumerate(candidates[i], start=1):
            part[i, start : start + len(ids)] = number
            positions[i, start : start + len(ids)] = len(context) + np.arange(len(ids))
            flat = range(base + start, base + start + len(ids))
            token_of += [len(pairs)] * len(ids)
            token_at += flat
            token_from += [base + len(context) - 1, *flat[:-1]]
            pairs.append([*range(base, base + len(context)), *flat])
            pair_row.append(i)
            start += len(ids)
    return {
        "ids": text.pad(rows, fill),
        "part": torch.from_numpy(part),
        "positions": torch.from_numpy(positions),
        "token_of": torch.tensor(token_of),
        "token_at": torch.tensor(token_at),
        "token_from": torch.tensor(token_from),
        "pair": text.pad(pairs, -1),
        "pair_row": torch.tensor(pair_row),
    }


def log_likelihoods(model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int]) -> Tensor:
    """Mean log-likelihood per token of each candidate of the batch.

    Args:
        model: A decoder.
        inputs: The output of `shared_rows`.
        slots: The slot of each row, ascending.

    Returns:
        Shape (candidates of the batch,).
    """
    if shares_context(model, inputs):
        return _shared_log_likelihoods(model, inputs, slots)
    return _pair_log_likelihoods(model, inputs, slots)


def shares_context(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether to compute each context once for its candidates.

    Not where the model gives another result like that, of which a line warns; nor where blocks that
    are served from a cache, which they are for plain texts only, save more than sharing does.
    """
    pair_tokens = int((inputs["pair"] >= 0).sum()) * (1 - served_share(model))
    if pair_tokens < int((inputs["part"] != PADDING).sum()):
        return False
    if model not in _CAN_SHARE:
        _CAN_SHARE[model] = _agrees(model, inputs)
        if not _CAN_SHARE[model]:
            logger.warning(
                "%s cannot compute a context once for all its candidates: it is computed for each",
                type(model).__name__,
            )
    window = getattr(model.config, "sliding_window", None)  # our mask would not respect it
    return _CAN_SHARE[model] and (window is None or inputs["ids"].shape[1] <= window)


def _agrees(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether both computations agree on the first row, with its adapters if it has some."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    rows = current_rows()
    pairs = int((inputs["pair_row"] == 0).sum())
    tokens = int((inputs["token_of"] < pairs).sum())
    lengths = {"ids": 1, "part": 1, "positions": 1, "pair": pairs, "pair_row": pairs}
    first = {name: value[: lengths.get(name, tokens)] for name, value in inputs.items()}
    slots = [0] if rows is None else [rows.slots[0]]
    with eval_no_grad(model):
        try:
            shared = _shared_log_likelihoods(model, first, slots, routed=rows is not None)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        separate = _pair_log_likelihoods(model, first, slots, routed=rows is not None)
    return bool((shared - separate).abs().max() <= 1e-2 * separate.abs().max())


def _shared_log_likelihoods(
    model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int], *, routed: bool = True
) -> Tensor:
    """(candidates,) mean log-likelihoods, with one row for all candidates of a context."""
    part = inputs["part"]
    length = part.shape[1]
    mask = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    mask &= torch.ones(length, length, dtype=torch.bool, device=part.device).tril()
    mask &= (part != PADDING)[:, None, :] | torch.eye(length, dtype=torch.bool, device=part.device)
    mask = mask[:, None]
    # Private, as there is no public getter. "eager" takes an additive mask.
    if model.config._attn_implementation == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    call = {
        "input_ids": inputs["ids"],
        "attention_mask": mask,
        "position_ids": inputs["positions"],
    }
    targets = inputs["ids"].flatten()[inputs["token_at"]]
    row_slots = slots if routed else None
    return _mean_log_likelihoods(model, call, inputs["token_from"], targets, inputs, row_slots)


def _pair_log_likelihoods(
    model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int], *, routed: bool = True
) -> Tensor:
    """(candidates,) mean log-likelihoods, with one row per pair of context and candidate."""
    pair, flat = inputs["pair"], inputs["ids"].flatten()
    inside = pair >= 0
    call = {
        "input_ids": torch.where(inside, flat[pair.clamp(min=0)], flat[0]),
        "attention_mask": inside.long(),
    }
    # A candidate's tokens are the last ones of its pair, in order.
    is_candidate = inputs["part"].flatten()[pair.clamp(min=0)].gt(0) & inside
    token_at = is_candidate.flatten().nonzero()[:, 0]
    targets = call["input_ids"].flatten()[token_at]
    pair_slots = [slots[i] for i in inputs["pair_row"].tolist()] if routed else None
    return _mean_log_likelihoods(model, call, token_at - 1, targets, inputs, pair_slots)


def _mean_log_likelihoods(
    model: Any,
    call: Mapping[str, Tensor],
    predicted_from: Tensor,
    targets: Tensor,
    inputs: Mapping[str, Tensor],
    slots: Sequence[int] | None,
) -> Tensor:
    """(candidates,) mean of log p over the tokens of each candidate.

    Args:
        model: A decoder.
        call: Arguments of its call.
        predicted_from: (tokens,) flat position at which each target is predicted.
        targets: (tokens,) ids of the candidates' tokens.
        inputs: The output of `shared_rows`.
        slots: The slot of each row of the call; None for the base model without adapters.
    """
    num_ids = call["input_ids"].numel()
    counted = torch.zeros(num_ids, dtype=torch.bool, device=predicted_from.device)
    counted[predicted_from] = True
    logits_row = counted.cumsum(0) - 1
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with route(slots):
        logits = logits_at(model, counted.view_as(call["input_ids"]), **call, **options)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = logits_row[predicted_from]
    log_p = logits[rows, targets] - logits.logsumexp(1)[rows]
    token_of, num_candidates = inputs["token_of"], len(inputs["pair"])
    counts = torch.bincount(token_of, minlength=num_candidates)
    return log_p.new_zeros(num_candidates).index_add(0, token_of, log_p) / counts
