"""How likely a decoder finds each candidate after a context that is computed once for all of them.

    row         context  candidate 1  candidate 2 …     one row for all candidates
    position    0 … c−1  c c+1 …      c c+1 …           as if each came right after the context
    sees        ↙        context and itself, never another candidate

A candidate's score is the mean of log p(token | context, candidate's tokens before it) over its
tokens. It is a mean and not a sum because a sum prefers short candidates.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from foretune.models.calls import eval_no_grad
from foretune.models.counted import logits_at
from foretune.models.routing import current_rows, route
from foretune.tasks.objectives import text

PADDING = -1  # as the candidate that a position belongs to; 0 is the context

logger = logging.getLogger("foretune")
_SHARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shared_rows(
    contexts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], fill: int
) -> dict[str, Tensor]:
    """The rows of a batch.

    Args:
        contexts: (n) token ids, one or more each.
        candidates: (n)(k) token ids, one or more each.
        fill: Id of padding.

    Returns:
        ids, part (which candidate a position belongs to), positions: (n, L). Of each candidate's
        token in the batch: its candidate's number in the batch (`token_of`), and the flat position
        (row · L + column) where it is and where it is predicted (`token_at`, `token_from`).
        Of each candidate, as a row of its own: the flat positions of context and candidate,
        padded with −1 (`pair`), and its row (`pair_row`).
    """
    rows = [[*c, *(i for one in k for i in one)] for c, k in zip(contexts, candidates, strict=True)]
    width = max(map(len, rows))
    part = np.full((len(rows), width), PADDING, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    of: list[int] = []
    at: list[int] = []
    before: list[int] = []
    pairs: list[list[int]] = []
    pair_row: list[int] = []
    for i, context in enumerate(contexts):
        base, start = i * width, len(context)
        part[i, :start] = 0
        positions[i, :start] = np.arange(start)
        for number, ids in enumerate(candidates[i], start=1):
            places = range(start, start + len(ids))
            part[i, start : start + len(ids)] = number
            positions[i, start : start + len(ids)] = len(context) + np.arange(len(ids))
            of += [len(pairs)] * len(ids)
            at += [base + place for place in places]
            before += [base + len(context) - 1, *(base + place for place in places[:-1])]
            pairs.append([*range(base, base + len(context)), *(base + place for place in places)])
            pair_row.append(i)
            start += len(ids)
    return {
        "ids": text.pad(rows, fill),
        "part": torch.from_numpy(part),
        "positions": torch.from_numpy(positions),
        "token_of": torch.tensor(of),
        "token_at": torch.tensor(at),
        "token_from": torch.tensor(before),
        "pair": text.pad(pairs, -1),
        "pair_row": torch.tensor(pair_row),
    }


def log_likelihoods(model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int]) -> Tensor:
    """(candidates of the batch,) mean log-likelihood per token of each.

    Args:
        model: A decoder.
        inputs: What `shared_rows` made.
        slots: The slot of each row, ascending.
    """
    if shares_context(model, inputs):
        return _together(model, inputs, slots)
    return _one_by_one(model, inputs, slots)


def shares_context(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model gives the same with the context computed once; says so if it does not."""
    if model not in _SHARES:
        _SHARES[model] = _try(model, inputs)
        if not _SHARES[model]:
            logger.warning(
                "%s cannot compute a context once for all its candidates: each pair is computed",
                type(model).__name__,
            )
    window = getattr(model.config, "sliding_window", None)  # which the row's own mask would lift
    return _SHARES[model] and (window is None or inputs["ids"].shape[1] <= window)


def _try(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Both ways for the first row; with its adapters where there are some."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    rows = current_rows()
    pairs = int((inputs["pair_row"] == 0).sum())
    tokens = int((inputs["token_of"] < pairs).sum())
    cut = {"ids": 1, "part": 1, "positions": 1, "pair": pairs, "pair_row": pairs}
    first = {name: value[: cut.get(name, tokens)] for name, value in inputs.items()}
    slots = [0] if rows is None else [rows.slots[0]]
    with eval_no_grad(model):
        try:
            shared = _together(model, first, slots, routed=rows is not None)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        apart = _one_by_one(model, first, slots, routed=rows is not None)
    return bool((shared - apart).abs().max() <= 1e-2 * apart.abs().max())


def _together(
    model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int], *, routed: bool = True
) -> Tensor:
    """One row for all candidates of a context."""
    part = inputs["part"]
    length = part.shape[1]
    seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=part.device).tril()
    seen &= (part != PADDING)[:, None, :] | torch.eye(length, dtype=torch.bool, device=part.device)
    mask = seen[:, None]
    # Private, as there is no public getter. "eager" adds the mask instead of choosing by it.
    if model.config._attn_implementation == "eager":
        dtype = next(model.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    call = {
        "input_ids": inputs["ids"],
        "attention_mask": mask,
        "position_ids": inputs["positions"],
    }
    before, at = inputs["token_from"], inputs["token_at"]
    targets = inputs["ids"].flatten()[at]
    return _means(model, call, before, targets, inputs, slots if routed else None)


def _one_by_one(
    model: Any, inputs: Mapping[str, Tensor], slots: Sequence[int], *, routed: bool = True
) -> Tensor:
    """One row for each pair of context and candidate."""
    pair, flat = inputs["pair"], inputs["ids"].flatten()
    inside = pair >= 0
    call = {
        "input_ids": torch.where(inside, flat[pair.clamp(min=0)], flat[0]),
        "attention_mask": inside.long(),
    }
    # A candidate's tokens are the last ones of its pair, in order.
    is_candidate = inputs["part"].flatten()[pair.clamp(min=0)].gt(0) & inside
    at = is_candidate.flatten().nonzero()[:, 0]
    targets = call["input_ids"].flatten()[at]
    rows = inputs["pair_row"].tolist()
    return _means(
        model, call, at - 1, targets, inputs, [slots[i] for i in rows] if routed else None
    )


def _means(
    model: Any,
    call: Mapping[str, Tensor],
    before: Tensor,
    targets: Tensor,
    inputs: Mapping[str, Tensor],
    slots: Sequence[int] | None,
) -> Tensor:
    """(candidates,) the mean of log p(targets), predicted at the flat positions `before`."""
    counted = torch.zeros(call["input_ids"].numel(), dtype=torch.bool, device=before.device)
    counted[before] = True
    place = counted.cumsum(0) - 1
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with route(slots):
        logits = logits_at(model, counted.view_as(call["input_ids"]), **call, **options)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = place[before]
    found = logits[rows, targets] - logits.logsumexp(1)[rows]
    of = inputs["token_of"]
    number = len(inputs["pair"])
    counts = torch.bincount(of, minlength=number)
    return found.new_zeros(number).index_add(0, of, found) / counts
