"""Pruning plans: which experts of each block are kept, merged or dropped; applied, saved, loaded.

`experts.json` in a pruned folder lists for each block the groups of original experts that became
one expert each: a group of one is kept unchanged, experts in no group are dropped. Other programs
can thus prune the same model in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import CONFIG_FILE
from foretune.formats import damage_named, load_tensors, read_json
from foretune.pruning import FORMAT, PLAN_FILE
from foretune.pruning.alignment import merge_networks
from foretune.pruning.budgets import Budget, counts_of
from foretune.pruning.experts import (
    COUNTS,
    ExpertBlock,
    find_blocks,
    set_tensor,
)
from foretune.pruning.routers import KeptDenominatorRouter, RemappedRouter, expert_tensors

WEIGHTS_FILE = "foretune_experts.safetensors"
RouterForm = Literal["mean", "dominant", "remap", "keep-denominator"]


@dataclass(frozen=True)
class BlockPlan:
    """The plan of one block.

    Args:
        num_experts: E, number of experts of the original block.
        groups: K groups of experts; each becomes one expert.
        weights: Weight of each member in its group's mean, with sum 1 in each group.
        router: "mean" and "dominant" give a group one router row, the weighted mean of its members'
            rows or that of the member with the largest weight; "remap" keeps all E rows and maps a
            choice of a member to the group; "keep-denominator" keeps the rows of dropped experts
            only for the softmax's denominator.
        align: Match the members' hidden units before they are averaged.
    """

    num_experts: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: RouterForm = "dominant"
    align: bool = True

    @property
    def dropped(self) -> list[int]:
        """The experts in no group."""
        grouped = {expert for group in self.groups for expert in group}
        return [expert for expert in range(self.num_experts) if expert not in grouped]

    @property
    def references(self) -> list[int]:
        """The most heavily weighted member of each group."""
        return [
            group[int(np.argmax(weights))]
            for group, weights in zip(self.groups, self.weights, strict=True)
        ]

    @property
    def router_rows(self) -> int:
        """Rows of the pruned block's router."""
        return self.num_experts if self.router == "remap" else len(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with `references` and `dropped`."""
        return {
            "num_experts": self.num_experts,
            "groups": [list(group) for group in self.groups],
            "weights": [[round(w, 8) for w in weights] for weights in self.weights],
            "references": self.references,
            "dropped": self.dropped,
            "router": self.router,
            "align": self.align,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BlockPlan:
        """The plan of which `to_dict` gave the fields."""
        return cls(
            num_experts=fields["num_experts"],
            groups=tuple(tuple(group) for group in fields["groups"]),
            weights=tuple(tuple(weights) for weights in fields["weights"]),
            router=fields["router"],
            align=fields["align"],
        )


Plan = dict[str, BlockPlan]


def keep(experts: Sequence[int], num_experts: int, *, keep_denominator: bool = False) -> BlockPlan:
    """The plan that keeps the given experts unchanged and drops the others."""
    return BlockPlan(
        num_experts=num_experts,
        groups=tuple((expert,) for expert in sorted(experts)),
        weights=((1.0,),) * len(experts),
        router="keep-denominator" if keep_denominator else "dominant",
    )


def merge(
    labels: Sequence[int], weights: Sequence[float], *, router: RouterForm, align: bool
) -> BlockPlan:
    """The plan that merges each cluster by a weighted mean.

    Args:
        labels: Cluster of each expert.
        weights: Weight of each expert, at least 0; uniform in a cluster where all are 0.
        router: See `BlockPlan`.
        align: See `BlockPlan`.
    """
    groups = [
        tuple(e for e, label in enumerate(labels) if label == c) for c in range(max(labels) + 1)
    ]
    shares = []
    for group in groups:
        total = sum(weights[e] for e in group)
        shares.append(tuple(weights[e] / total if total else 1 / len(group) for e in group))
    return BlockPlan(len(labels), tuple(groups), tuple(shares), router, align)


def highest(scores: np.ndarray, count: int, num_groups: int = 1) -> list[int]:
    """The experts with the highest scores (E,), equally many from each group of the router.

    >>> highest(np.array([3.0, 2.0, 0.0, 1.0]), 2), highest(np.array([3.0, 2.0, 0.0, 1.0]), 2, 2)
    ([0, 1], [0, 3])
    """
    size, per_group = len(scores) // num_groups, count // num_groups
    return [
        int(g * size + i)
        for g in range(num_groups)
        for i in sorted(np.argsort(-scores[g * size : (g + 1) * size], kind="stable")[:per_group])
    ]


def keep_highest(
    blocks: Sequence[ExpertBlock],
    experts: Any,
    scores: Mapping[str, np.ndarray],
    *,
    budget: Budget,
    keep_denominator: bool,
) -> Plan:
    """The plan that keeps the experts with the highest scores in each block.

    Args:
        blocks: The model's blocks of experts.
        experts: Number of experts; see `counts_of`.
        scores: Block name → (E,) scores of its experts.
        budget: See `counts_of`.
        keep_denominator: See `BlockPlan`.
    """
    counts = counts_of(experts, blocks, grouped=True, budget=budget, scores=scores)
    return {
        block.name: keep(
            highest(scores[block.name], count, block.num_groups),
            block.num_experts,
            keep_denominator=keep_denominator,
        )
        for block, count in zip(blocks, counts, strict=True)
    }


def merge_clusters(
    blocks: Sequence[ExpertBlock],
    experts: Any,
    cluster: Callable[[str, list[int], int], list[int]],
    weights: Mapping[str, Sequence[float]],
    *,
    budget: Budget,
    frequency: Mapping[str, np.ndarray],
    router: RouterForm,
    align: bool,
) -> Plan:
    """The plan that merges the experts of each cluster.

    A router that chooses among groups of experts first (DeepSeek) needs groups of equal size, so
    its experts are clustered group by group, unless the router is remapped and stays unchanged.

    Args:
        blocks: The model's blocks of experts.
        experts: Number of experts; see `counts_of`.
        cluster: Maps (block name, experts to cluster, number of clusters) to the experts' labels.
        weights: Block name → weights of its experts.
        budget: See `counts_of`.
        frequency: Block name → (E,), the scores of budget "score".
        router: See `BlockPlan`.
        align: See `BlockPlan`.
    """
    grouped = router != "remap"
    counts = counts_of(experts, blocks, grouped=grouped, budget=budget, scores=frequency)
    plan = {}
    for block, count in zip(blocks, counts, strict=True):
        num_groups = block.num_groups if grouped else 1
        size, per_group = block.num_experts // num_groups, count // num_groups
        labels = []
        for g in range(num_groups):
            members = list(range(g * size, (g + 1) * size))
            labels += [g * per_group + label for label in cluster(block.name, members, per_group)]
        plan[block.name] = merge(labels, weights[block.name], router=router, align=align)
    return plan


@torch.no_grad()
def apply_plan(
    model: nn.Module, plan: Plan, after_block: Callable[[ExpertBlock], None] = lambda _: None
) -> None:
    """Prune the model in place, and call `after_block` with each block when it is."""
    blocks = {block.name: block for block in find_blocks(model)}
    before = {block.num_experts for block in blocks.values()}
    for name, block_plan in plan.items():
        _apply(blocks[name], block_plan)
        after_block(blocks[name])
    after = {block_plan.router_rows for block_plan in plan.values()}
    if len(before) == len(after) == 1:
        # The model counts experts too, for its load-balancing loss.
        _recount(model, before.pop(), after.pop())
    if is_uniform(plan):
        set_config(model, len(next(iter(plan.values())).groups))
    else:  # the loss that balances experts takes one number for all blocks
        config: Any = model.config
        for part in (config, config.get_text_config()):
            if getattr(part, "output_router_logits", False):
                part.output_router_logits = False


def _recount(model: nn.Module, before: int, after: int) -> None:
    if getattr(model, "num_experts", None) == before:
        model.num_experts = after  # type: ignore[assignment]


def _apply(block: ExpertBlock, plan: BlockPlan) -> None:
    units, rest = block.read()
    merged = [
        merge_networks(
            units[list(group)],
            rest[list(group)],
            weights,
            group.index(reference),
            align=plan.align,
        )
        for group, weights, reference in zip(
            plan.groups, plan.weights, plan.references, strict=True
        )
    ]
    block.write(torch.stack([u for u, _ in merged]), torch.stack([r for _, r in merged]))
    _route(block, plan)
    for module in (block.block, block.router):
        if hasattr(module, "num_experts"):
            module.num_experts = len(plan.groups)


def _route(block: ExpertBlock, plan: BlockPlan) -> None:
    router, count = block.router, len(plan.groups)
    if plan.router == "remap":
        group_of = [0] * plan.num_experts
        for g, group in enumerate(plan.groups):
            for expert in group:
                group_of[expert] = g
        setattr(block.block, block.router_name, RemappedRouter(router, group_of))
        return
    tensors = [*expert_tensors(block.block, router, plan.num_experts)]
    dropped = {}
    for owner, name, tensor, axis in tensors:
        by_expert = tensor.detach().movedim(axis, 0)
        if owner is not block.block:
            dropped[name] = by_expert[plan.dropped].clone()
        set_tensor(owner, name, _rows(by_expert, plan).movedim(0, axis))
        if isinstance(owner, nn.Linear):
            owner.out_features = count
    router.num_experts = count
    if plan.router == "keep-denominator" and plan.dropped and block.normalises == "all":
        wrapped = KeptDenominatorRouter(router, dropped["weight"], dropped.get("bias"))
        setattr(block.block, block.router_name, wrapped)


def _rows(tensor: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Router rows of the groups: (E, ...) → (K, ...)."""
    if plan.router != "mean":
        return tensor[plan.references].clone()
    rows = [
        tensor[group[0]]
        if len(group) == 1
        else torch.einsum(
            "n,n...->...",
            torch.tensor(weights, dtype=torch.float64, device=tensor.device),
            tensor[list(group)].double(),
        ).to(tensor.dtype)
        for group, weights in zip(plan.groups, plan.weights, strict=True)
    ]
    return torch.stack(rows)


def is_uniform(plan: Plan) -> bool:
    """Whether all blocks end with the same number of experts."""
    return len({len(block.groups) for block in plan.values()}) == 1


def set_config(model: nn.Module, count: int) -> None:
    """Set the number of experts wherever the model's config states it."""
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, count)


def loads_in_transformers(model: nn.Module, plan: Plan) -> bool:
    """Whether a config can describe the model: one number of experts, and plain routers."""
    wrappers = (RemappedRouter, KeptDenominatorRouter)
    return is_uniform(plan) and not any(isinstance(m, wrappers) for m in model.modules())


# --- a folder that transformers cannot express ----------------------------------------------------


def save_for_foretune(model: nn.Module, folder: Path) -> None:
    """Write weights under a file name of ours, so that no other program loads the model wrongly."""
    config: Any = model.config
    config.save_pretrained(folder)
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))


class PrunedRecord(TypedDict):
    """The fields of `PLAN_FILE` that are read back."""

    loads_with: str
    dtype: str
    blocks: dict[str, dict[str, Any]]


def load_pruned(auto: Any, config: Any, folder: Path, dtype: Any) -> nn.Module | None:
    """Load a folder that `save_for_foretune` wrote; None for a folder that transformers loads.

    Args:
        auto: A class of transformers with `from_config`.
        config: The folder's config.
        folder: Folder with experts.json and the weights.
        dtype: Data type of the weights; "auto" for that of the folder.

    Raises:
        UserError: experts.json is not foretune's, or the weights are missing or do not fit it.
    """
    path = folder / PLAN_FILE
    record = read_json(path, PrunedRecord, FORMAT)
    with damage_named(path):
        plan = {name: BlockPlan.from_dict(fields) for name, fields in record["blocks"].items()}
    if record["loads_with"] == "transformers":
        _check_counts(path, plan, config.get_text_config())
        return None
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, next(iter(plan.values())).num_experts)
    if dtype == "auto":
        with damage_named(path):
            dtype = getattr(torch, record["dtype"])
    # A model class, as opposed to an auto class, calls the same function under a private name.
    build = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with damage_named(path):
        model: nn.Module = build(config, dtype=dtype)
        # The weights are overwritten below, so alignment would be wasted.
        apply_plan(model, {n: _unaligned(p) for n, p in plan.items()})
    load_tensors(model, folder / WEIGHTS_FILE)
    return model


def _check_counts(path: Path, plan: Plan, config: Any) -> None:
    """Checks that the config of a folder has the experts that the record says.

    Raises:
        UserError: It has another number.
    """
    stated = {v for name in COUNTS if isinstance(v := getattr(config, name, None), int)}
    for name, block in plan.items():
        if stated and len(block.groups) not in stated:
            raise UserError(
                f"{path} leaves {len(block.groups)} experts in {name}, but {CONFIG_FILE} beside it "
                f"says {min(stated)}: one of the two files is of another model"
            )


def _unaligned(plan: BlockPlan) -> BlockPlan:
    return BlockPlan.from_dict({**plan.to_dict(), "align": False})
