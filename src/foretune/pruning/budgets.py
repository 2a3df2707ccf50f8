"""How many experts each block ends with: the same number, a list, or by the experts' scores.

By score, the experts of all blocks compete for `experts` places per block on average, each with its
share of its block's scores, as M-SMoE's experts do with how often they are chosen (Li et al., ICLR
2024, arXiv:2310.01334). A block whose tokens go to few experts ends with few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from foretune.errors import UserError
from foretune.pruning.experts import ExpertBlock

Budget = Literal["equal", "score"]


def counts_of(
    experts: Any,
    blocks: Sequence[ExpertBlock],
    *,
    grouped: bool,
    budget: Budget = "equal",
    scores: Mapping[str, np.ndarray] | None = None,
) -> list[int]:
    """Number of experts that each block ends with.

    Args:
        experts: One number, one per block, or None for half of them.
        blocks: The model's blocks of experts.
        grouped: Whether the groups of the router must stay equal in size.
        budget: "equal" for `experts` in every block, "score" for as many on average.
        scores: Block name → (E,) scores of its experts, at least 0, for budget "score"; without
            them only the numbers are checked.

    Raises:
        UserError: More experts than there are, fewer than each token is routed to, a list of the
            wrong length or beside budget "score", or a number that cannot be split into the groups
            of the router.
    """
    if budget == "score" and isinstance(experts, Sequence):
        raise UserError(
            f"experts={list(experts)} gives every block its number already; budget=score needs "
            "one number, the mean over blocks"
        )
    if isinstance(experts, int) or experts is None:
        counts = [block.num_experts // 2 if experts is None else experts for block in blocks]
    elif len(experts) == len(blocks):
        counts = list(experts)
    else:
        raise UserError(
            f"experts has {len(experts)} numbers, the model has {len(blocks)} blocks of experts "
            f"({blocks[0].name} … {blocks[-1].name}): give one number, or one per block"
        )
    for count, block in zip(counts, blocks, strict=True):
        _check_count(count, block, grouped)
    if budget == "score" and scores is not None:
        return _by_score(sum(counts), blocks, scores, grouped)
    return counts


def _by_score(
    total: int, blocks: Sequence[ExpertBlock], scores: Mapping[str, np.ndarray], grouped: bool
) -> list[int]:
    """Counts that sum to `total`, or fewer where the routers' groups do not allow it."""
    counts = [_fewest(block, grouped) for block in blocks]
    gains = []  # of one expert more in each group of the router, block by block
    for i, block in enumerate(blocks):
        groups = block.num_groups if grouped else 1
        share = scores[block.name] / max(float(scores[block.name].sum()), 1e-30)
        ranked = -np.sort(-share.reshape(groups, -1), axis=1)
        steps = ranked.mean(0)[counts[i] // groups :]
        gains += [(-float(gain), i, groups) for gain in steps]
    left = total - sum(counts)
    for _, i, step in sorted(gains):
        if step <= left:
            counts[i] += step
            left -= step
    return counts


def _fewest(block: ExpertBlock, grouped: bool) -> int:
    """The smallest number of experts that a block works with."""
    return next(
        count
        for count in range(block.top_k, block.num_experts + 1)
        if _problem(count, block, grouped) is None
    )


def _check_count(count: int, block: ExpertBlock, grouped: bool) -> None:
    problem = _problem(count, block, grouped)
    if problem is not None:
        raise UserError(f"{block.name} {problem}, got {count}")


def _problem(count: int, block: ExpertBlock, grouped: bool) -> str | None:
    if not block.top_k <= count <= block.num_experts:
        return (
            f"has {block.num_experts} experts and routes each token to {block.top_k}: "
            f"experts must be from {block.top_k} to {block.num_experts}"
        )
    groups = block.num_groups
    if grouped and groups > 1:
        chosen = int(getattr(block.router, "topk_group", groups))
        # The router ranks groups by the sum of their two best experts.
        if count % groups or count // groups < 2 or chosen * count // groups < block.top_k:
            return (
                f"routes within {groups} groups: experts must be a multiple of "
                f"{groups}, at least two per group and {block.top_k} in {chosen} groups"
            )
    return None
