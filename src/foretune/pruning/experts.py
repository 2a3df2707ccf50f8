"""One view of a block of experts, however the architecture names and stores it.

    fused       `experts.gate_up_proj` (E, 2I, H) and `experts.down_proj` (E, H, I), or transposed,
                gate and up concatenated or interleaved, with or without biases: most mixtures of
                transformers 5 (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, …)
    modules     `experts` is a ModuleDict or ModuleList of networks with one hidden layer (Switch)

Blocks are recognised by their attributes, not by their class, and routers by their output: a
forward pass on a few random vectors shows how a router normalises. A router with any other output
is refused, because statistics of a misread router would be worse than none.
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
class RouterOutput:
    """A router's decision for N tokens.

    Args:
        logits: (N, E).
        scores: (N, k), weights of the chosen experts.
        indices: (N, k), the chosen experts; -1 where a token exceeds the capacity (Switch).
    """

    logits: Tensor
    scores: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ExpertBlock:
    """A module that routes each token to a few of its experts.

    Args:
        name: Its name in the model, such as "model.layers.0.mlp".
        block: The module itself.
        router_name: Name of the router in the block.
        normalises: "chosen" for a softmax over the chosen experts (or scores that do not depend on
            other experts at all): dropping an expert that was not chosen changes nothing.
            "all" for a softmax over all experts: dropping any of them raises the others' weights.
    """

    name: str
    block: nn.Module
    router_name: str
    normalises: Literal["chosen", "all"]

    @property
    def experts(self) -> Any:
        """The module that holds the experts."""
        return self.block.experts

    @property
    def router(self) -> Any:
        """The module that routes tokens to experts."""
        return getattr(self.block, self.router_name)

    @property
    def fused(self) -> bool:
        """Whether the experts are stored in one tensor per weight, see `is_fused`."""
        return is_fused(self.experts)

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return _count(self.experts)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(getattr(self.router, "top_k", 1))

    @property
    def num_groups(self) -> int:
        """Groups of experts that the router chooses among first (DeepSeek); 1 elsewhere."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def num_parameters(self) -> int:
        """Parameters per expert."""
        total = sum(p.numel() for p in self.experts.parameters())
        return total // self.num_experts

    def read(self) -> tuple[Tensor, Tensor]:
        """(units, rest): (E, I, F), all weights of each hidden unit; (E, R), the output biases."""
        return _read_fused(self.experts) if self.fused else _read_modules(self.experts)

    def write(self, units: Tensor, rest: Tensor) -> None:
        """Replace the experts by K of the form of `read`: units (K, I, F) and rest (K, R)."""
        (_write_fused if self.fused else _write_modules)(self.experts, units, rest)

    def output(self, expert: int, x: Tensor) -> Tensor:
        """Output of one expert, (N, H) → (N, H), computed by the model's own code."""
        if not self.fused:
            return _networks(self.experts)[expert](x)
        chosen = torch.full((len(x), 1), expert, device=x.device)
        return self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))


def find_blocks(model: nn.Module) -> list[ExpertBlock]:
    """The blocks of experts of a model, in the order of its modules.

    Raises:
        UserError: There are none, the experts or router of one are of an unsupported form, or the
            model carries LoRA adapters.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError(
            "the model carries LoRA adapters, which are tied to the number of experts: merge them "
            "first (merge_and_unload)"
        )
    blocks = [
        _view(name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no mixture of experts to prune: no module with `experts`"
        )
    return blocks


def count_experts(model: nn.Module) -> list[int]:
    """Number of experts of each block, also in a pruned model with one of the routers below."""
    blocks = (getattr(module, "experts", None) for module in model.modules())
    return [_count(experts) for experts in blocks if isinstance(experts, nn.Module)]


def is_fused(experts: nn.Module) -> bool:
    """Whether the experts are 3-D tensors whose layout transformers records beside them."""
    pair = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    return hasattr(experts, "is_transposed") and all(
        isinstance(p, Tensor) and p.dim() == 3 for p in pair
    )


def router_tensors(router: nn.Module, num_experts: int) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of the router's parameters and buffers with one row per expert."""
    for owner in router.modules():
        tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.dim() and len(tensor) == num_experts:
                yield owner, name, tensor


def set_tensor(owner: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by one of any other shape."""
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    setattr(owner, name, value)


def parse_router_output(output: Any) -> RouterOutput | None:
    """A router's output in one form for all architectures; None for an unsupported one."""
    if not (isinstance(output, tuple) and len(output) == 3):
        return None
    first, second, third = output
    if not third.is_floating_point() and third.shape == second.shape and first.dim() == 2:
        return RouterOutput(first, second, third)
    # Switch: one-hot choices, zero beyond an expert's capacity; their probabilities; logits.
    if first.shape == third.shape and second.shape == (*third.shape[:-1], 1):
        chosen, logits = first.flatten(0, -2), third.flatten(0, -2)
        indices = chosen.argmax(-1, keepdim=True)
        dropped = chosen.sum(-1, keepdim=True) == 0
        return RouterOutput(logits, second.flatten(0, -2), indices.masked_fill(dropped, -1))
    return None


def _view(name: str, block: nn.Module) -> ExpertBlock:
    experts: Any = block.experts
    kind = f"{name}: {type(experts).__name__}"
    if not is_fused(experts) and not _are_networks(experts):
        raise UserError(
            f"{kind} stores its experts in an unsupported way; supported are 3-D gate_up_proj and "
            "down_proj as in Mixtral, and a list of networks with one hidden layer as in Switch"
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
    raise UserError(f"{kind}: found no router with {count} rows beside the experts of this block")


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
        output = parse_router_output(router(x))
    except (RuntimeError, TypeError, IndexError, ValueError):
        output = None
    finally:
        router.train(was_training)
    if output is None:
        raise UserError(
            f"{kind} is routed by a {type(router).__name__}, whose output is not supported; "
            "supported are (logits, weights, experts) as in Mixtral, and that of Switch"
        )
    routed = (output.indices >= 0).all(-1)
    chosen = output.indices.clamp(min=0)
    probabilities = output.logits.float().softmax(-1).gather(-1, chosen)
    ratio = (output.scores.float() / probabilities)[routed]
    # The softmax over all experts may be scaled by a constant (DeepSeek).
    over_all = bool(ratio.max() - ratio.min() < 0.02 * ratio.mean())
    over_chosen = bool((output.scores.float().sum(-1)[routed] - 1).abs().max() < 1e-2)
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
    return [m for m in members if len(_linears(m)) >= 2]  # NLLB has a dropout among its experts


def _linears(network: nn.Module) -> list[nn.Linear]:
    """The layers into the hidden units, then the layer out of them."""
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
    all_keys: Any = experts if isinstance(experts, nn.ModuleDict) else range(len(experts))
    keys = [key for key in all_keys if len(_linears(experts[key])) >= 2]
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
    """The original router over E experts, whose choices are mapped to K clusters.

    Args:
        router: The original router.
        group_of: The cluster of each of the E experts.
    """

    def __init__(self, router: Any, group_of: list[int]) -> None:
        super().__init__()
        self.router = router
        self.top_k = int(getattr(router, "top_k", 1))
        self.num_experts = max(group_of) + 1
        self.register_buffer("group_of", torch.tensor(group_of, device=_device(router)))

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The router's output, its choices (N, k), or one-hot (…, E), mapped to clusters."""
        first, second, third = self.router(*args)
        group_of: Any = self.group_of
        if not third.is_floating_point():
            return first, second, group_of[third]
        routed = first.sum(-1, keepdim=True)  # 0 where the token exceeds the capacity
        chosen = F.one_hot(group_of[first.argmax(-1)], self.num_experts)
        return chosen.to(first.dtype) * routed.to(first.dtype), second, third


class KeptDenominatorRouter(nn.Module):
    """A router over K experts whose softmax still counts the dropped experts.

    Each weight is multiplied by Σ_kept exp(h) / Σ_all exp(h), which restores the value it has in
    the softmax over all experts.

    Args:
        router: Router over the kept experts, its scores a softmax over all of these.
        weight: (D, H), router rows of the dropped experts.
        bias: (D,), their biases; None where the router has none.
    """

    def __init__(self, router: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.router = router
        self.top_k = int(getattr(router, "top_k", 1))
        self.num_experts = router.num_experts
        self.dropped_weight = nn.Parameter(weight.clone())
        self.dropped_bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The router's output for hidden states (…, H), with its weights rescaled."""
        output = self.router(hidden, *args)
        fused = not output[2].is_floating_point()
        logits = output[0] if fused else output[2]
        weight = self.dropped_weight
        dropped_logits = F.linear(hidden.to(weight.dtype), weight, self.dropped_bias).float()
        log_kept = logits.float().logsumexp(-1, keepdim=True)
        log_dropped = dropped_logits.reshape(*logits.shape[:-1], -1).logsumexp(-1, keepdim=True)
        share = torch.exp(log_kept - torch.logaddexp(log_kept, log_dropped))
        return output[0], (output[1] * share).to(output[1].dtype), output[2]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
