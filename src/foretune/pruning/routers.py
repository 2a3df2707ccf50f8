"""Routers: what they output, which of their tensors carry experts, and how they normalise.

A router is recognised by its output: a forward pass on a few random vectors shows it, and how it
normalises. One with any other output is refused, because statistics of a misread router would be
worse than none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BY_EXPERT = ("bias", "expert")  # in the names of tensors with a number per expert


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


class ExpertTensor(NamedTuple):
    """A tensor of a router or a block that carries experts along one axis."""

    owner: nn.Module
    name: str
    tensor: Tensor
    axis: int


def expert_tensors(block: nn.Module, router: nn.Module, num_experts: int) -> Iterator[ExpertTensor]:
    """The tensors that carry experts: the router's rows and biases, and those of its block.

    A matrix carries them along its first axis, anything else along the only axis that is longer
    than 1, whatever its place: (E,), (1, E). A vector that is as long as the hidden states are wide
    carries experts if its name says so.

    Args:
        block: The module with experts and router; of it only tensors of its own.
        router: The router, with all of its modules.
        num_experts: E.
    """
    [_, width] = matrix_of(router, num_experts).shape
    for owner in (*router.modules(), block):
        tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in tensors:
            long = [axis for axis, size in enumerate(tensor.shape) if size > 1 or num_experts == 1]
            is_matrix = tensor.dim() == 2 and len(long) == 2 and owner is not block
            axis = 0 if is_matrix else long[0] if len(long) == 1 else None
            if axis is None or tensor.shape[axis] != num_experts:
                continue
            if is_matrix or num_experts != width or any(part in name for part in BY_EXPERT):
                yield ExpertTensor(owner, name, tensor, axis)


def matrix_of(router: nn.Module, num_experts: int) -> Tensor:
    """The (E, H) weight of a router, or of the layer in it that has one.

    Raises:
        LookupError: There is none.
    """
    for parameter in router.parameters():
        if parameter.dim() == 2 and len(parameter) == num_experts:
            return parameter
    raise LookupError(f"no matrix with {num_experts} rows")


def arguments_of(block: nn.Module, router: nn.Module) -> dict[str, Any]:
    """What a router takes besides the hidden states: tensors of its block, by their names."""
    names = list(inspect.signature(router.forward).parameters)[1:]
    return {name: getattr(block, name) for name in names if hasattr(block, name)}


def parse_router_output(output: Any) -> RouterOutput | None:
    """A router's output in one form for all architectures; None for an unsupported one."""
    if isinstance(output, tuple) and len(output) == 2:
        return _dense_sigmoids(*output)
    if not (isinstance(output, tuple) and len(output) == 3):
        return None
    first, second, third = output
    if not third.is_floating_point() and third.shape == second.shape and first.dim() == 2:
        return RouterOutput(_logits(first), second, third)
    # Switch: one-hot choices, zero beyond an expert's capacity; their probabilities; logits.
    if first.shape == third.shape and second.shape == (*third.shape[:-1], 1):
        chosen, logits = first.flatten(0, -2), third.flatten(0, -2)
        indices = chosen.argmax(-1, keepdim=True)
        dropped = chosen.sum(-1, keepdim=True) == 0
        return RouterOutput(logits, second.flatten(0, -2), indices.masked_fill(dropped, -1))
    return None


def _dense_sigmoids(scores: Tensor, logits: Tensor) -> RouterOutput | None:
    """Scores (N, E), the sigmoid of the largest logits and zero elsewhere (Llama 4)."""
    if scores.dim() != 2 or scores.shape != logits.shape or not scores.is_floating_point():
        return None
    top_k = int((scores > 0).sum(-1).max())
    indices = logits.topk(top_k).indices
    chosen, sigmoids = scores.gather(1, indices), logits.float().sigmoid().gather(1, indices)
    if not top_k or bool((chosen.float() - sigmoids).abs().max() > 1e-2):
        return None
    return RouterOutput(logits, chosen, indices)


def _logits(first: Tensor) -> Tensor:
    """Logits, where a router returns probabilities in their place (Gemma 4)."""
    rows = first.detach().float()
    if bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all()):
        return first.clamp_min(torch.finfo(first.dtype).tiny).log()
    return first


class Probe(NamedTuple):
    """What a few random vectors show of a router.

    Args:
        top_k: Experts per token.
        normalises: As in `ExpertBlock`.
    """

    top_k: int
    normalises: Literal["chosen", "all"]


@torch.no_grad()
def probe(block: nn.Module, router: Any, num_experts: int) -> Probe | None:
    """What a router does with random vectors; None where its output is of an unsupported form."""
    weight = matrix_of(router, num_experts)
    generator = torch.Generator().manual_seed(0)
    extra = arguments_of(block, router)
    was_training = router.training
    router.eval()
    output = None
    try:
        for shape in ((16, weight.shape[1]), (1, 16, weight.shape[1])):
            x = torch.randn(shape, generator=generator).to(weight)
            try:
                output = parse_router_output(router(x, **extra))
            except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
                continue
            if output is not None:
                break
    finally:
        router.train(was_training)
    if output is None:
        return None
    return Probe(output.indices.shape[1], _normalises(output))


def _normalises(output: RouterOutput) -> Literal["chosen", "all"]:
    routed = (output.indices >= 0).all(-1)
    chosen = output.indices.clamp(min=0)
    logits = output.logits.float()
    if bool((output.scores.float() - logits.sigmoid().gather(-1, chosen)).abs().max() < 1e-3):
        return "chosen"
    probabilities = logits.softmax(-1).gather(-1, chosen)
    ratio = (output.scores.float() / probabilities)[routed]
    # The softmax over all experts may be scaled by a constant (DeepSeek).
    over_all = bool(ratio.max() - ratio.min() < 0.02 * ratio.mean())
    over_chosen = bool((output.scores.float().sum(-1)[routed] - 1).abs().max() < 1e-2)
    return "all" if over_all and not (over_chosen and chosen.shape[1] > 1) else "chosen"


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

    def forward(self, *args: Any, **extra: Any) -> tuple[Tensor, ...]:
        """The router's output, its choices (N, k), or one-hot (…, E), mapped to clusters.

        Where it is scores and logits, both (N, E), the scores of a cluster are added: (N, K). That
        is exact for merged copies where a token goes to one expert, as in every Llama 4.
        """
        group_of: Any = self.group_of
        output = self.router(*args, **extra)
        if len(output) == 2:
            scores, logits = output
            return scores.new_zeros(len(scores), self.num_experts).index_add(
                1, group_of, scores
            ), logits
        first, second, third = output
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

    def forward(self, hidden: Tensor, *args: Any, **extra: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The router's output for hidden states (…, H), with its weights rescaled."""
        output = self.router(hidden, *args, **extra)
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
