"""What becomes of the experts of each block, as data: made by a method, applied here, kept as JSON.

`experts.json` in a pruned folder lists, for each block, the groups of the given model's experts
that became one expert each (a group of one was kept as it was; what stands in no group was
dropped), so other programs can prune the same model the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from foretune.errors import UserError
from foretune.linalg.alignment import merged
from foretune.models.experts import (
    COUNTS,
    ExpertBlock,
    KeptDenominatorRouter,
    RemappedRouter,
    find_blocks,
    router_tensors,
    set_tensor,
)

PLAN_FILE = "experts.json"
WEIGHTS_FILE = "foretune_experts.safetensors"
RouterForm = Literal["mean", "dominant", "remap", "keep-denominator"]


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of one block.

    Args:
        num_experts: E, of the given block.
        groups: K groups of experts; each becomes one.
        weights: The share of each member in its group's mean; sums to 1 in each group.
        router: "mean" and "dominant" give a group one router row, the weighted mean of its members'
            or that of the member with the largest weight; "remap" keeps all E rows and reads a
            choice of a member as a choice of the group; "keep-denominator" keeps the rows of the
            dropped experts for the softmax's denominator alone.
        align: Match the members' hidden units before they are averaged.
    """

    num_experts: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: RouterForm = "dominant"
    align: bool = True

    @property
    def dropped(self) -> list[int]:
        held = {expert for group in self.groups for expert in group}
        return [expert for expert in range(self.num_experts) if expert not in held]

    @property
    def references(self) -> list[int]:
        """The most heavily weighted member of each group."""
        return [
            group[int(np.argmax(weights))]
            for group, weights in zip(self.groups, self.weights, strict=True)
        ]

    @property
    def router_rows(self) -> int:
        """Experts that the router of the pruned block tells apart."""
        return self.num_experts if self.router == "remap" else len(self.groups)

    def to_dict(self) -> dict[str, Any]:
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
        return cls(
            num_experts=fields["num_experts"],
            groups=tuple(tuple(group) for group in fields["groups"]),
            weights=tuple(tuple(weights) for weights in fields["weights"]),
            router=fields["router"],
            align=fields["align"],
        )


Plan = dict[str, BlockPlan]


def keep(kept: Sequence[int], num_experts: int, *, keep_denominator: bool = False) -> BlockPlan:
    """The plan that keeps some experts as they are and drops the others."""
    return BlockPlan(
        num_experts=num_experts,
        groups=tuple((expert,) for expert in sorted(kept)),
        weights=((1.0,),) * len(kept),
        router="keep-denominator" if keep_denominator else "dominant",
    )


def merge(
    labels: Sequence[int], weights: Sequence[float], *, router: RouterForm, align: bool
) -> BlockPlan:
    """The plan that averages each cluster.

    Args:
        labels: The cluster of each expert.
        weights: Of each expert, not below 0; uniform in a cluster where all are 0.
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
    """The experts with the highest scores, equally many of each group of the router.

    >>> highest(np.array([3.0, 2.0, 0.0, 1.0]), 2), highest(np.array([3.0, 2.0, 0.0, 1.0]), 2, 2)
    ([0, 1], [0, 3])
    """
    size, each = len(scores) // num_groups, count // num_groups
    return [
        int(g * size + i)
        for g in range(num_groups)
        for i in sorted(np.argsort(-scores[g * size : (g + 1) * size], kind="stable")[:each])
    ]


def keep_highest(
    blocks: Sequence[ExpertBlock],
    experts: Any,
    scores: Mapping[str, np.ndarray],
    *,
    keep_denominator: bool,
) -> Plan:
    """Keeps of each block the experts with the highest scores.

    Args:
        blocks: Of the model.
        experts: How many; see `counts_of`.
        scores: (E,) for each block, by its name.
        keep_denominator: See `BlockPlan`.
    """
    return {
        block.name: keep(
            highest(scores[block.name], count, block.num_groups),
            block.num_experts,
            keep_denominator=keep_denominator,
        )
        for block, count in zip(blocks, counts_of(experts, blocks, grouped=True), strict=True)
    }


def merge_clusters(
    blocks: Sequence[ExpertBlock],
    experts: Any,
    cluster: Callable[[str, list[int], int], list[int]],
    weights: Mapping[str, Sequence[float]],
    *,
    router: RouterForm,
    align: bool,
) -> Plan:
    """Merges the clusters that `cluster(block's name, members, k)` finds among some experts.

    A router that chooses among groups of experts first (DeepSeek) needs groups of one size, so its
    experts are clustered group by group, unless it is remapped and stays as it is.
    """
    grouped = router != "remap"
    plan = {}
    for block, count in zip(blocks, counts_of(experts, blocks, grouped=grouped), strict=True):
        parts = block.num_groups if grouped else 1
        size, each = block.num_experts // parts, count // parts
        labels = []
        for part in range(parts):
            members = list(range(part * size, (part + 1) * size))
            labels += [part * each + label for label in cluster(block.name, members, each)]
        plan[block.name] = merge(labels, weights[block.name], router=router, align=align)
    return plan


def counts_of(experts: Any, blocks: Sequence[ExpertBlock], *, grouped: bool) -> list[int]:
    """How many experts each block shall have.

    Args:
        experts: One number, one for each block, or None for half of them.
        blocks: Of the model.
        grouped: Whether the groups of the router must stay equal.

    Raises:
        UserError: More than there are, fewer than a token is given to, a wrong number of numbers,
            or one that the groups of the router do not divide.
    """
    if isinstance(experts, int) or experts is None:
        wanted = [block.num_experts // 2 if experts is None else experts for block in blocks]
    elif len(experts) == len(blocks):
        wanted = list(experts)
    else:
        raise UserError(
            f"experts has {len(experts)} numbers, the model has {len(blocks)} blocks of experts "
            f"({blocks[0].name} … {blocks[-1].name}): give one number, or one for each"
        )
    for count, block in zip(wanted, blocks, strict=True):
        _check_count(count, block, grouped)
    return wanted


def _check_count(count: int, block: ExpertBlock, grouped: bool) -> None:
    if not block.top_k <= count <= block.num_experts:
        raise UserError(
            f"{block.name} has {block.num_experts} experts and gives each token to {block.top_k}: "
            f"experts must be from {block.top_k} to {block.num_experts}, got {count}"
        )
    groups = block.num_groups
    if grouped and groups > 1:
        chosen = int(getattr(block.router, "topk_group", groups))
        # the router sums the two best of each group to choose among groups
        if count % groups or count // groups < 2 or chosen * count // groups < block.top_k:
            raise UserError(
                f"{block.name} routes within {groups} groups: experts must be a multiple of "
                f"{groups} with two or more in each group and {block.top_k} in {chosen} of them, "
                f"got {count}"
            )


@torch.no_grad()
def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Prunes the model in place."""
    blocks = {block.name: block for block in find_blocks(model)}
    before = {block.num_experts for block in blocks.values()}
    for name, block_plan in plan.items():
        _apply(blocks[name], block_plan)
    after = {block_plan.router_rows for block_plan in plan.values()}
    if len(before) == len(after) == 1:
        # the head of the model counts experts too, for the loss that balances them
        _recount(model, before.pop(), after.pop())
    if is_uniform(plan):
        set_config(model, len(next(iter(plan.values())).groups))


def _recount(model: nn.Module, before: int, after: int) -> None:
    if getattr(model, "num_experts", None) == before:
        model.num_experts = after  # type: ignore[assignment]


def _apply(block: ExpertBlock, plan: BlockPlan) -> None:
    units, rest = block.read()
    made = [
        merged(
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
    block.write(torch.stack([unit for unit, _ in made]), torch.stack([last for _, last in made]))
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
    kept = [*router_tensors(router, plan.num_experts)]
    gone = {name: tensor[plan.dropped].detach().clone() for _, name, tensor in kept}
    for owner, name, tensor in kept:
        set_tensor(owner, name, _rows(tensor.detach(), plan))
        if isinstance(owner, nn.Linear):
            owner.out_features = count
    router.num_experts = count
    if plan.router == "keep-denominator" and plan.dropped and block.normalises == "all":
        wrapped = KeptDenominatorRouter(router, gone["weight"], gone.get("bias"))
        setattr(block.block, block.router_name, wrapped)


def _rows(tensor: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
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
    """Writes the number of experts wherever the model's config has it."""
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, count)


def loads_in_transformers(model: nn.Module, plan: Plan) -> bool:
    """Whether a config can say what was made of the model: one count, and plain routers."""
    wrappers = (RemappedRouter, KeptDenominatorRouter)
    return is_uniform(plan) and not any(isinstance(m, wrappers) for m in model.modules())


# --- a folder that transformers cannot express ----------------------------------------------------


def save_special(model: nn.Module, folder: Path) -> None:
    """Writes weights under a name of ours, so that no other program loads half of the model."""
    config: Any = model.config
    config.save_pretrained(folder)
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))


def read_special(folder: Path) -> dict[str, Any] | None:
    """What experts.json says of a folder that needs foretune to be loaded; None for others."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return None if about["loads_with"] == "transformers" else about
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no list of experts that foretune wrote: {error!r}") from error


def load_special(auto: Any, config: Any, folder: Path, about: Mapping[str, Any], dtype: Any) -> Any:
    """The model of a folder that `save_special` wrote.

    Args:
        auto: A class of transformers with `from_config`.
        config: Of the folder.
        folder: Where.
        about: What `read_special` returned.
        dtype: Of the weights; "auto" for that of the folder.

    Raises:
        UserError: Weights that are not there or do not fit the list of experts.
    """
    plan = {name: BlockPlan.from_dict(fields) for name, fields in about["blocks"].items()}
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, next(iter(plan.values())).num_experts)
    dtype = getattr(torch, str(about["dtype"])) if dtype == "auto" else dtype
    # a class of its own name has the same function under another, private name
    build = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    model = build(config, dtype=dtype)
    try:
        # units are overwritten below, so there is nothing to align
        apply_plan(model, {n: _unaligned(p) for n, p in plan.items()})
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, KeyError, IndexError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit {folder / PLAN_FILE}: {reason}"
        ) from error
    return model


def _unaligned(plan: BlockPlan) -> BlockPlan:
    return BlockPlan.from_dict({**plan.to_dict(), "align": False})
