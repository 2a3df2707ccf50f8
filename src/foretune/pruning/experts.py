"""One view of a block of experts, whatever the architecture calls and stores it.

    fused       `experts.gate_up_proj` (E, 2I, H) and `experts.down_proj` (E, H, I), or transposed,
                gate and up one after the other or interleaved, with or without biases: most
                mixtures of transformers 5 (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, …)
    modules     `experts` is a ModuleDict or ModuleList of networks with one hidden layer (Switch)

Blocks are found by what they have, not by their class. A router is known by what it returns: a
forward pass on a few random vectors tells how it normalises, and one that returns anything else is
refused, because statistics of a router that is misread would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretune.errors import UserError

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens.

    Args:
        logits: (N, E).
        scores: (N, k) weights of the experts chosen.
        indices: (N, k) the experts chosen; -1 where a token found no room (Switch's capacity).
    """

    logits: Tensor
    scores: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ExpertBlock:
    """A module that routes each token to a few of its experts.

    Args:
        name: Its place in the model, such as "model.layers.0.mlp".
        block: The module itself.
        router_name: What it calls its router.
        normalises: "chosen" for a softmax over the experts chosen (or scores that do not depend on
            other experts at all): leaving out an expert that was not chosen changes nothing.
            "all" for a softmax over all experts: leaving any of them out raises the others.
    """

    name: str
    block: nn.Module
    router_name: str
    normalises: Literal["chosen", "all"]

    @property
    def experts(self) -> Any:
        return self.block.experts

    @property
    def router(self) -> Any:
        return getattr(self.block, self.router_name)

    @property
    def fused(self) -> bool:
        return is_fused(self.experts)

    @property
    def num_experts(self) -> int:
        return _count(self.experts)

    @property
    def top_k(self) -> int:
        return int(getattr(self.router, "top_k", 1))

    @property
    def num_groups(self) -> int:
        """Groups among which the router chooses first (DeepSeek); 1 elsewhere."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def num_parameters(self) -> int:
        """Of one expert."""
        total = sum(p.numel() for p in self.experts.parameters())
        return total // self.num_experts

    def read(self) -> tuple[Tensor, Tensor]:
        """(units, rest): (E, I, F) all weights of each hidden unit, (E, R) the last biases."""
        return _read_fused(self.experts) if self.fused else _read_modules(self.experts)

    def write(self, units: Tensor, rest: Tensor) -> None:
        """Puts experts in the form of `read` into the block, however many they are."""
        (_write_fused if self.fused else _write_modules)(self.experts, units, rest)

    def output(self, expert: int, x: Tensor) -> Tensor:
        """(N, H) what one expert makes of (N, H), computed by the model's own code."""
        if not self.fused:
            return _networks(self.experts)[expert](x)
        chosen = torch.full((len(x), 1), expert, device=x.device)
        return self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))


def find_blocks(model: nn.Module) -> list[ExpertBlock]:
    """The blocks of experts of a model, in its order.

    Raises:
        UserError: It has none, or some whose experts or router are of a shape not known here.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError(
            "the model carries LoRA adapters, which are tied to the number of experts: merge them "
            "first (merge_and_unload)"
        )
    found = [
        _view(name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no mixture of experts to prune: no module with `experts`"
        )
    return found


def count_experts(model: nn.Module) -> list[int]:
    """How many experts each block has, also where the router is one of those below."""
    blocks = (getattr(module, "experts", None) for module in model.modules())
    return [_count(experts) for experts in blocks if isinstance(experts, nn.Module)]


def is_fused(experts: nn.Module) -> bool:
    """Whether the experts are 3-D tensors whose layout transformers states beside them."""
    pair = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    return hasattr(experts, "is_transposed") and all(
        isinstance(p, Tensor) and p.dim() == 3 for p in pair
    )


def router_tensors(router: nn.Module, num_experts: int) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of the router's parameters and buffers with a row for each expert."""
    for owner in router.modules():
        tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.dim() and len(tensor) == num_experts:
                yield owner, name, tensor


def set_tensor(owner: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter or buffer by one of another size."""
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    setattr(owner, name, value)


def routing_of(output: Any) -> Routing | None:
    """What a router's output says, None for a form not known."""
    if not (isinstance(output, tuple) and len(output) == 3):
        return None
    first, second, third = output
    if not third.is_floating_point() and third.shape == second.shape and first.dim() == 2:
        return Routing(first, second, third)
    # Switch: a one-hot choice for each place, zero where the expert had no room; its probability.
    if first.shape == third.shape and second.shape == (*third.shape[:-1], 1):
        chosen, logits = first.flatten(0, -2), third.flatten(0, -2)
        indices = chosen.argmax(-1, keepdim=True)
        missed = chosen.sum(-1, keepdim=True) == 0
        return Routing(logits, second.flatten(0, -2), indices.masked_fill(missed, -1))
    return None


def _view(name: str, block: nn.Module) -> ExpertBlock:
    experts: Any = block.experts
    kind = f"{name}: {type(experts).__name__}"
    if not is_fused(experts) and not _are_networks(experts):
        raise UserError(
            f"{kind} stores its experts in a way not known here: 3-D gate_up_proj and down_proj as "
            "in Mixtral, or a list of networks with one hidden layer as in Switch"
        )
    if not all(p.is_floating_point() for p in experts.parameters()):
        raise UserError(f"{kind} holds quantised weights; load the model without quantisation")
    count = _count(experts)
    for child_name, child in block.named_children():
        weight = getattr(getattr(child, "classifier", child), "weight", None)
        if child is not experts and isinstance(weight, Tensor) and weight.dim() == 2:
            if len(weight) != count:
                continue
            return ExpertBlock(name, block, child_name, _normalises(child, weight, kind))
    raise UserError(f"{kind}: no router with {count} rows beside the experts of this block")


def _are_networks(experts: Any) -> bool:
    return isinstance(experts, (nn.ModuleDict, nn.ModuleList)) and bool(_networks(experts))


def _count(experts: Any) -> int:
    return experts.gate_up_proj.shape[0] if is_fused(experts) else len(_networks(experts))


@torch.no_grad()
def _normalises(router: Any, weight: Tensor, kind: str) -> Literal["chosen", "all"]:
    generator = torch.Generator().manual_seed(0)
    shape = (16, weight.shape[1]) if hasattr(router, "top_k") else (1, 16, weight.shape[1])
    x = torch.randn(shape, generator=generator).to(weight)
    was_training = router.training
    router.eval()
    try:
        routing = routing_of(router(x))
    except (RuntimeError, TypeError, IndexError, ValueError):
        routing = None
    finally:
        router.train(was_training)
    if routing is None:
        raise UserError(
            f"{kind} is routed by a {type(router).__name__}, which does not answer as the routers "
            "known here do: (logits, weights, experts) as in Mixtral, or as in Switch"
        )
    kept = (routing.indices >= 0).all(-1)
    chosen = routing.indices.clamp(min=0)
    probabilities = routing.logits.float().softmax(-1).gather(-1, chosen)
    ratio = (routing.scores.float() / probabilities)[kept]
    # A constant factor (DeepSeek's scaling) may stand before the softmax over all experts.
    over_all = bool(ratio.max() - ratio.min() < 0.02 * ratio.mean())
    over_chosen = bool((routing.scores.float().sum(-1)[kept] - 1).abs().max() < 1e-2)
    return "all" if over_all and not (over_chosen and chosen.shape[1] > 1) else "chosen"


# --- fused ----------------------------------------------------------------------------------------


def _read_fused(experts: Any) -> tuple[Tensor, Tensor]:
    joint, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if experts.is_transposed:
        joint = joint.transpose(1, 2)  # (E, 2I, H)
    else:
        down = down.transpose(1, 2)  # (E, I, H)
    parts = [*_halves(joint, experts), down]
    bias = getattr(experts, "gate_up_proj_bias", None)
    if isinstance(bias, Tensor):
        parts += _halves(bias.detach().unsqueeze(-1), experts)
    last = getattr(experts, "down_proj_bias", None)
    rest = last.detach() if isinstance(last, Tensor) else down.new_zeros(len(down), 0)
    return torch.cat(parts, -1), rest


def _write_fused(experts: Any, units: Tensor, rest: Tensor) -> None:
    hidden = experts.gate_up_proj.shape[1 if experts.is_transposed else 2]
    has_bias = isinstance(getattr(experts, "gate_up_proj_bias", None), Tensor)
    gate, up, down, *biases = units.split([hidden] * 3 + [1] * 2 * has_bias, -1)
    joint = _joined(gate, up, experts)
    transposed = experts.is_transposed
    set_tensor(experts, "gate_up_proj", joint.transpose(1, 2) if transposed else joint)
    set_tensor(experts, "down_proj", down if transposed else down.transpose(1, 2))
    if has_bias:
        gate, up = biases
        set_tensor(experts, "gate_up_proj_bias", _joined(gate, up, experts).squeeze(-1))
    if rest.shape[1]:
        set_tensor(experts, "down_proj_bias", rest)
    experts.num_experts = len(units)


def _halves(joint: Tensor, experts: Any) -> list[Tensor]:
    """(E, 2I, ·) → gate and up, each (E, I, ·)."""
    if experts.is_concatenated:
        return list(joint.chunk(2, 1))
    return [joint[:, ::2], joint[:, 1::2]]


def _joined(gate: Tensor, up: Tensor, experts: Any) -> Tensor:
    if experts.is_concatenated:
        return torch.cat([gate, up], 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


# --- a list of networks ---------------------------------------------------------------------------


def _networks(experts: Any) -> list[nn.Module]:
    members = list(experts.values() if isinstance(experts, nn.ModuleDict) else experts)
    return [one for one in members if len(_linears(one)) >= 2]  # NLLB has a dropout among them


def _linears(network: nn.Module) -> list[nn.Linear]:
    """The layers into the hidden units, then the one out of them."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _read_modules(experts: Any) -> tuple[Tensor, Tensor]:
    units, rest = [], []
    for network in _networks(experts):
        *inward, outward = _linears(network)
        parts = [layer.weight for layer in inward] + [outward.weight.T]
        parts += [layer.bias.unsqueeze(-1) for layer in inward if layer.bias is not None]
        units.append(torch.cat([p.detach() for p in parts], -1))
        rest.append(units[-1].new_zeros(0) if outward.bias is None else outward.bias.detach())
    return torch.stack(units), torch.stack(rest)


def _write_modules(experts: Any, units: Tensor, rest: Tensor) -> None:
    held: Any = experts if isinstance(experts, nn.ModuleDict) else range(len(experts))
    keys = [key for key in held if len(_linears(experts[key])) >= 2]
    for key in reversed(keys[len(units) :]):
        del experts[key]
    for network, unit, last in zip(_networks(experts), units, rest, strict=True):
        *inward, outward = _linears(network)
        sizes = [layer.in_features for layer in inward] + [outward.out_features]
        biased = [layer for layer in inward if layer.bias is not None]
        parts = unit.split([*sizes, *[1] * len(biased)], -1)
        with torch.no_grad():
            for layer, part in zip(inward, parts, strict=False):
                layer.weight.copy_(part)
            outward.weight.copy_(parts[len(inward)].T)
            for layer, part in zip(biased, parts[len(inward) + 1 :], strict=True):
                layer.bias.copy_(part.squeeze(-1))
            if outward.bias is not None:
                outward.bias.copy_(last)
    experts.num_experts = len(units)


# --- routers that keep more rows than there are experts -------------------------------------------


class RemappedRouter(nn.Module):
    """A router as it was, whose choice among E experts is read as one among K clusters.

    Args:
        router: The given one.
        group_of: The cluster of each of the E experts.
    """

    def __init__(self, router: Any, group_of: list[int]) -> None:
        super().__init__()
        self.router = router
        self.top_k = int(getattr(router, "top_k", 1))
        self.num_experts = max(group_of) + 1
        self.register_buffer("group_of", torch.tensor(group_of, device=_device(router)))

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = self.router(*args)
        group_of: Any = self.group_of
        if not third.is_floating_point():
            return first, second, group_of[third]
        there = first.sum(-1, keepdim=True)  # 0 where the token found no room
        chosen = F.one_hot(group_of[first.argmax(-1)], self.num_experts)
        return chosen.to(first.dtype) * there.to(first.dtype), second, third


class KeptDenominatorRouter(nn.Module):
    """A router over K experts whose softmax still counts the experts that are gone.

    Each weight is multiplied by Σ_kept exp(h) / Σ_all exp(h), which undoes that the smaller
    softmax raised it.

    Args:
        router: Over the experts kept, its scores a softmax over all of them.
        weight: (D, H) router rows of the experts dropped.
        bias: (D,) or None.
    """

    def __init__(self, router: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.router = router
        self.top_k = int(getattr(router, "top_k", 1))
        self.num_experts = router.num_experts
        self.dropped_weight = nn.Parameter(weight.clone())
        self.dropped_bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = self.router(hidden, *args)
        fused = not output[2].is_floating_point()
        logits = output[0] if fused else output[2]
        weight = self.dropped_weight
        gone = F.linear(hidden.to(weight.dtype), weight, self.dropped_bias).float()
        kept = logits.float().logsumexp(-1, keepdim=True)
        gone = gone.reshape(*logits.shape[:-1], -1).logsumexp(-1, keepdim=True)
        share = torch.exp(kept - torch.logaddexp(kept, gone))
        return output[0], (output[1] * share).to(output[1].dtype), output[2]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
