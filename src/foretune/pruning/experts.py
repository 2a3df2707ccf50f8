"""One view of a block of experts, however the architecture names and stores it.

    fused       `experts.gate_up_proj` (E, 2I, H) and `experts.down_proj` (E, H, I), or transposed,
                gate and up concatenated or interleaved, with or without biases: most mixtures of
                transformers 5 (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, …); without a gate
                `experts.up_proj` (E, I, H) (Nemotron-H); called with all tokens once for each
                expert, multiplied by its weight for them (Llama 4)
    modules     `experts` is a ModuleDict or ModuleList of networks with one hidden layer (Switch)

Blocks are recognised by their attributes, not by their class, and routers by their output
(`foretune.pruning.routers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.pruning.routers import probe

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


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
        top_k: Experts per token.
    """

    name: str
    block: nn.Module
    router_name: str
    normalises: Literal["chosen", "all"]
    top_k: int

    @property
    def experts(self) -> Any:
        """The module that holds the experts."""
        return self.block.experts

    @property
    def router(self) -> Any:
        """The module that routes tokens to experts."""
        return getattr(self.block, self.router_name)

    @cached_property
    def fused(self) -> bool:
        """Whether the experts are stored in one tensor per weight, see `is_fused`."""
        return is_fused(self.experts)

    @cached_property  # it is found out by calling the experts
    def scales_inputs(self) -> bool:
        """Whether a token's weight multiplies what its experts read, not what they answer."""
        return self.fused and scales_inputs(self.experts)

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return _count(self.experts)

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
        if self.scales_inputs:
            return _scaled_output(self.experts, expert, x)
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
    return has_gate(experts) or _all_3d(experts, "up_proj", "down_proj")


def has_gate(experts: nn.Module) -> bool:
    """Whether a hidden unit of fused experts is a product of two, gate and up."""
    recorded = hasattr(experts, "is_transposed")
    return (recorded and _all_3d(experts, "gate_up_proj", "down_proj")) or scales_inputs(experts)


@torch.no_grad()
def scales_inputs(experts: Any) -> bool:
    """Whether experts are those of Llama 4, which read a token for each of them, (E · N, H).

    Their layout is not recorded; it is what makes them compute what `_scaled_output` does.
    """
    if hasattr(experts, "is_transposed") or not _all_3d(experts, "gate_up_proj", "down_proj"):
        return False
    joint, down = experts.gate_up_proj, experts.down_proj
    if not hasattr(experts, "act_fn") or joint.shape[1:] != (down.shape[2], 2 * down.shape[1]):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(joint), joint.shape[1], generator=generator).to(joint)
    try:
        answered = experts(x)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False
    expected = torch.cat([_scaled_output(experts, e, x[e : e + 1]) for e in range(len(x))])
    return answered.shape == x.shape and torch.allclose(answered, expected, rtol=1e-2, atol=1e-3)


def _scaled_output(experts: Any, expert: int, x: Tensor) -> Tensor:
    gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, -1)
    answered: Tensor = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
    return answered


def _all_3d(experts: nn.Module, *names: str) -> bool:
    tensors = [getattr(experts, name, None) for name in names]
    return all(isinstance(tensor, Tensor) and tensor.dim() == 3 for tensor in tensors)


def set_tensor(owner: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by one of any other shape."""
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    setattr(owner, name, value)


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
    refused = ""
    for child_name, child in block.named_children():
        if child is experts or not any(
            p.dim() == 2 and len(p) == count for p in child.parameters()
        ):
            continue
        shown = probe(block, child, count)
        if shown is not None:
            return ExpertBlock(name, block, child_name, shown.normalises, shown.top_k)
        if not refused or "rout" in child_name or "gate" in child_name:
            refused = type(child).__name__
    if refused:
        raise UserError(
            f"{kind} is routed by a {refused}, whose output is not supported; "
            "supported are (logits, weights, experts) as in Mixtral, and that of Switch"
        )
    raise UserError(f"{kind}: found no router with {count} rows beside the experts of this block")


def _are_networks(experts: Any) -> bool:
    return isinstance(experts, (nn.ModuleDict, nn.ModuleList)) and bool(_networks(experts))


def _count(experts: Any) -> int:
    return experts.down_proj.shape[0] if is_fused(experts) else len(_networks(experts))


# --- fused ----------------------------------------------------------------------------------------


def _read_fused(experts: Any) -> tuple[Tensor, Tensor]:
    if not has_gate(experts):
        down = experts.down_proj.detach().transpose(1, 2)  # (E, I, H)
        return torch.cat([experts.up_proj.detach(), down], -1), down.new_zeros(len(down), 0)
    joint, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if _is_transposed(experts):
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
    experts.num_experts = len(units)
    if not has_gate(experts):
        up, down = units.split([experts.up_proj.shape[2], experts.down_proj.shape[1]], -1)
        set_tensor(experts, "up_proj", up)
        set_tensor(experts, "down_proj", down.transpose(1, 2))
        return
    hidden = experts.gate_up_proj.shape[1 if _is_transposed(experts) else 2]
    has_bias = isinstance(getattr(experts, "gate_up_proj_bias", None), Tensor)
    gate, up, down, *biases = units.split([hidden] * 3 + [1] * 2 * has_bias, -1)
    joint = _joined(gate, up, experts)
    transposed = _is_transposed(experts)
    set_tensor(experts, "gate_up_proj", joint.transpose(1, 2) if transposed else joint)
    set_tensor(experts, "down_proj", down if transposed else down.transpose(1, 2))
    if has_bias:
        gate, up = biases
        set_tensor(experts, "gate_up_proj_bias", _joined(gate, up, experts).squeeze(-1))
    if rest.shape[1]:
        set_tensor(experts, "down_proj_bias", rest)


def _is_transposed(experts: Any) -> bool:
    return bool(getattr(experts, "is_transposed", True))  # Llama 4 does not record it


def _halves(joint: Tensor, experts: Any) -> list[Tensor]:
    """(E, 2I, ·) → gate and up, each (E, I, ·)."""
    if getattr(experts, "is_concatenated", True):
        return list(joint.chunk(2, 1))
    return [joint[:, ::2], joint[:, 1::2]]


def _joined(gate: Tensor, up: Tensor, experts: Any) -> Tensor:
    if getattr(experts, "is_concatenated", True):
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
