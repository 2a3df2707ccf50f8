"""A linear layer with low-rank experts beside it, and what all such layers of a model share.

symbol  here           shape          meaning
W_0     base           (out, in)      the layer as it was
V_iᵀ    down           (T, k, in)     what an expert reads
U_i S_i up             (T, out, k)    what it writes
        gate           (T, g, in)     the directions whose energy in x speaks for an expert
b_i−b_0 bias           (T, out)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.errors import UserError, did_you_mean
from foretune.models.calls import cache_among, holds_tokens

Granularity = Literal["token", "sequence", "task"]


@dataclass(eq=False)
class Routing:
    """What the layers of one model share: how they route, and what the caller said.

    Args:
        names: Of the experts, in order.
        granularity: What one choice is made for; "task" leaves it to the caller.
        top_k: Experts that one choice takes.
        causal: Whether a token must not see later ones, also not in the choice.
        weights: (T,) or (rows, T): the caller's choice; None for none made.
        mask: (rows, length): 1 where a token is no padding; None where nothing is known.
    """

    names: list[str]
    granularity: Granularity = "token"
    top_k: int = 1
    causal: bool = False
    weights: Tensor | None = None
    mask: Tensor | None = None

    def choose(self, tasks: str | Sequence[str] | None) -> None:
        """Sends all rows to one expert, or each row to its own; None lets the gate choose.

        Raises:
            UserError: There is no such expert.
        """
        if tasks is None:
            self.weights = None
            return
        wanted = [tasks] if isinstance(tasks, str) else list(tasks)
        index = torch.tensor([self.index(name) for name in wanted])
        weights = F.one_hot(index, len(self.names)).float()
        self.weights = weights[0] if isinstance(tasks, str) else weights

    def index(self, name: str) -> int:
        """An expert's number.

        Raises:
            UserError: There is no such expert.
        """
        if name not in self.names:
            raise UserError(
                f'no expert "{name}"; there are {", ".join(self.names)}.'
                f"{did_you_mean(name, self.names)}"
            )
        return self.names.index(name)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: keeps the attention mask for the layers inside.

        Raises:
            UserError: Cached decoding while choices are made for sequences: the layers would see
                only the newest token.
        """
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cache = cache_among((*args, *kwargs.values()))
        cached = cache is not None and holds_tokens(cache)
        if cached and self.granularity == "sequence" and self.weights is None:
            raise UserError(
                "routing by sequence needs every token in each pass: generate(use_cache=False), "
                "or routing=token, or set_task"
            )

    def tokens(self, x: Tensor) -> Tensor | None:
        """(rows, length) of booleans for x (rows, length, in): which tokens are no padding."""
        if self.mask is None or x.dim() != 3 or self.mask.shape != x.shape[:2]:
            return None
        return self.mask.to(x.device).bool()


class LowRankExperts(nn.Module):
    """y = base(x) + Σ_i p_i(x) · (up_i down_i x + bias_i), the p_i from the energy of x in gate_i.

    Args:
        base: An `nn.Linear`, a `Conv1D` of transformers, or a quantised layer: it is only called.
        up: (T, out, k).
        down: (T, k, in); None where `up` is (T, out, in), the experts' full matrices.
        gate: (T, g, in).
        offset: (T, g): subtracted from gate · x; None for none.
        bias: (T, out); None where no expert changes it.
        present: (T,): False for an expert that leaves this layer as it is; it is never chosen.
        routing: Shared by the layers of a model.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        up: Tensor,
        down: Tensor | None,
        gate: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        present: Tensor,
        routing: Routing,
    ) -> None:
        super().__init__()
        self.base = base
        self.up = nn.Parameter(up)
        self.down = None if down is None else nn.Parameter(down)
        self.gate = nn.Parameter(gate)
        self.offset = None if offset is None else nn.Parameter(offset)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.present: Tensor
        self.register_buffer("present", present)
        self.routing = routing
        self.observers: list[Any] = []

    @property
    def weight(self) -> Any:
        """The base's: some models (T5) look at a layer's weight to learn its type."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        p = self.probabilities(x)
        for observe in self.observers:
            observe(self, x, p)
        return self.base(x) + self.experts(x, p)

    def logits(self, x: Tensor) -> Tensor:
        """The energy of x in each expert's directions: (..., in) → (..., T), float32."""
        seen = torch.einsum("...i,tgi->...tg", x.to(self.gate.dtype), self.gate)
        if self.offset is not None:
            seen = seen - self.offset
        return seen.float().norm(dim=-1)

    def probabilities(self, x: Tensor) -> Tensor:
        """Each expert's share in the answer: (..., in) → (..., T), or (..., 1, T) for all tokens.

        Rows add up to 1, but where the caller chose an expert that is absent here.
        """
        if self.routing.weights is not None:
            return self._chosen(x)
        if self.routing.granularity == "task":
            raise UserError(
                "routing=task leaves the choice to you: set_task(NAME) first; the experts are "
                f"{', '.join(self.routing.names)}"
            )
        logits = self.logits(x)
        if self.routing.granularity == "sequence" and x.dim() == 3:
            logits = self._over_sequence(logits, self.routing.tokens(x))
        logits = logits.masked_fill(~self.present, float("-inf"))
        wanted = min(self.routing.top_k, len(self.present))
        value, index = logits.topk(wanted, dim=-1)
        # A softmax over the chosen is the softmax over all, renormalised.
        return torch.zeros_like(logits).scatter(-1, index, value.softmax(dim=-1)).to(x.dtype)

    def experts(self, x: Tensor, p: Tensor) -> Tensor:
        """The experts' part of the answer: (..., in), (..., T) → (..., out)."""
        kind = self.up.dtype
        p = p.to(kind)
        if self.down is None:
            every = torch.einsum("...i,toi->...to", x.to(kind), self.up)
            out = torch.einsum("...t,...to->...o", p.expand(*x.shape[:-1], -1), every)
        else:
            # All experts as one matrix of T · k columns, those not chosen times zero.
            read = torch.einsum("...i,tki->...tk", x.to(kind), self.down) * p.unsqueeze(-1)
            out = torch.einsum("...tk,tok->...o", read, self.up)
        if self.bias is not None:
            out = out + p @ self.bias
        return out.to(x.dtype)

    def _chosen(self, x: Tensor) -> Tensor:
        weights = self.routing.weights
        assert weights is not None
        weights = weights.to(device=x.device, dtype=x.dtype)
        if weights.dim() == 1:
            return weights.expand(*(1,) * (x.dim() - 1), -1)
        if x.dim() < 2 or len(weights) != len(x):
            raise UserError(
                f"{len(weights)} tasks were given where a layer sees {x.shape[0]} rows; give one "
                "for all rows, or one for each"
            )
        return weights.view(len(weights), *(1,) * (x.dim() - 2), -1)

    def _over_sequence(self, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """The mean over the sequence, or over what came so far: (rows, length or 1, T)."""
        count = torch.ones_like(logits[..., :1]) if tokens is None else tokens.unsqueeze(-1).float()
        if self.routing.causal:
            return (logits * count).cumsum(1) / count.cumsum(1).clamp_min(1)
        return (logits * count).sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp_min(1)


class TaskHeads(nn.Module):
    """A head for each task, of which the one that was chosen answers.

    Args:
        heads: One module a task, in the order of the experts; their outputs may differ in width.
        routing: Shared by the layers of a model.
    """

    def __init__(self, heads: Sequence[nn.Module], routing: Routing) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.routing = routing
        self.selected: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the chosen head says.

        Raises:
            UserError: None was chosen, or rows were sent to several.
        """
        if self.selected is None:
            raise UserError(
                "each task has a head of its own: set_task(NAME) says which; there are "
                f"{', '.join(self.routing.names)}"
            )
        return self.heads[self.selected](*args, **kwargs)


@dataclass
class Usage:
    """How often each expert was chosen, layer by layer.

    Args:
        names: Of the experts.
        layers: Name → (T,) shares that add up to 1, padding left out.
    """

    names: list[str]
    layers: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        """Each expert's share over all layers."""
        if not self.layers:
            return dict.fromkeys(self.names, 0.0)
        total = torch.stack(list(self.layers.values())).mean(0)
        return dict(zip(self.names, total.tolist(), strict=True))


@contextmanager
def observe(model: nn.Module, seen: Any) -> Iterator[None]:
    """Calls seen(name, layer, x, p) in each layer with experts while the block lasts."""
    layers = expert_layers(model)
    calls = {name: _Named(name, seen) for name in layers}
    for name, layer in layers.items():
        layer.observers.append(calls[name])
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.observers.remove(calls[name])


@contextmanager
def count_usage(model: nn.Module, names: Sequence[str]) -> Iterator[Usage]:
    """Counts which experts are chosen while the block lasts; the result is filled at its end."""
    usage = Usage(list(names))
    counts: dict[str, Tensor] = {}

    def count(name: str, layer: LowRankExperts, x: Tensor, p: Tensor) -> None:
        shares = p.detach().float().expand(*x.shape[:-1], -1)
        tokens = layer.routing.tokens(x)
        shares = shares.reshape(-1, shares.shape[-1]) if tokens is None else shares[tokens]
        counts[name] = counts.get(name, torch.zeros(1)) + shares.sum(0).cpu()

    with observe(model, count):
        yield usage
    usage.layers = {name: total / total.sum().clamp_min(1e-9) for name, total in counts.items()}


class _Named:
    def __init__(self, name: str, seen: Any) -> None:
        self.name, self.seen = name, seen

    def __call__(self, layer: LowRankExperts, x: Tensor, p: Tensor) -> None:
        self.seen(self.name, layer, x, p)


def expert_layers(model: nn.Module) -> dict[str, LowRankExperts]:
    """Name → layer with experts."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankExperts)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the module of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
