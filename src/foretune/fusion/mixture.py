"""A linear layer with low-rank experts beside it, and the routing that such layers share.

symbol  here           shape          meaning
W_0     base           (out, in)      the base's layer
V_iᵀ    down           (T, k, in)     an expert's input directions
U_i S_i up             (T, out, k)    an expert's output directions, scaled
        gate           (T, g, in)     directions whose energy in x is an expert's routing logit
b_i−b_0 shift          (T, out)       change of the bias
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.errors import UserError, did_you_mean
from foretune.models.calls import cache_among, holds_tokens

Granularity = Literal["token", "sequence", "task"]


@dataclass(eq=False)
class Routing:
    """How the layers of one model route, the caller's choice and the current attention mask.

    Args:
        names: Names of the experts, in order.
        granularity: Whether experts are chosen per token, per sequence, or by the caller (task).
        top_k: Experts per choice.
        causal: Whether routing of a token must not depend on later tokens.
        weights: (T,) or (rows, T), the caller's choice; None lets the gate choose.
        mask: (rows, length), 1 where a token is not padding; None where unknown.
    """

    names: list[str]
    granularity: Granularity = "token"
    top_k: int = 1
    causal: bool = False
    weights: Tensor | None = None
    mask: Tensor | None = None

    def choose(self, tasks: str | Sequence[str] | None) -> None:
        """Send all rows to one expert, or each row to its own; None lets the gate choose.

        Raises:
            UserError: There is no such expert.
        """
        if tasks is None:
            self.weights = None
            return
        expert_names = [tasks] if isinstance(tasks, str) else list(tasks)
        index = torch.tensor([self.index(name) for name in expert_names])
        weights = F.one_hot(index, len(self.names)).float()
        self.weights = weights[0] if isinstance(tasks, str) else weights

    def index(self, name: str) -> int:
        """The position of an expert.

        Raises:
            UserError: There is no such expert.
        """
        if name not in self.names:
            raise UserError(
                f'no expert "{name}"; there are {", ".join(self.names)}.'
                f"{did_you_mean(name, self.names)}"
            )
        return self.names.index(name)

    def store_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: store the (rows, length) attention mask for its layers.

        Raises:
            UserError: Decoding with a cache while routing by sequence: the layers would see only
                the newest token.
        """
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cache = cache_among((*args, *kwargs.values()))
        cached = cache is not None and holds_tokens(cache)
        if cached and self.granularity == "sequence" and self.weights is None:
            raise UserError(
                "routing by sequence needs all tokens in every forward pass: use "
                "generate(use_cache=False), routing=token, or set_experts"
            )

    def tokens(self, x: Tensor) -> Tensor | None:
        """For x (rows, length, in) a boolean (rows, length): which tokens are not padding.

        None where no mask of that shape is known.
        """
        if self.mask is None or x.dim() != 3 or self.mask.shape != x.shape[:2]:
            return None
        return self.mask.to(x.device).bool()


class LowRankExperts(nn.Module):
    """y = base(x) + Σ_i p_i(x) · (up_i down_i x + bias_i), the p_i from the energy of x in gate_i.

    Args:
        base: An `nn.Linear`, a `Conv1D` of transformers, or a quantised layer; it is only called.
        up: (T, out, k).
        down: (T, k, in); None where `up` is (T, out, in), the experts' full matrices.
        gate: (T, g, in).
        offset: (T, g), subtracted from gate · x; None for zero.
        shift: (T, out), the changes of the bias; None where no expert changes it.
        present: (T,), False for an expert without a change in this layer, which is never chosen.
        routing: Shared by the layers of a model.
        energy: (T,), the share of the energy of its change that an expert holds; below 0 for one
            that does not change the weight. None where it is unknown.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        up: Tensor,
        down: Tensor | None,
        gate: Tensor,
        offset: Tensor | None,
        shift: Tensor | None,
        present: Tensor,
        routing: Routing,
        energy: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.up = nn.Parameter(up)
        self.down = None if down is None else nn.Parameter(down)
        self.gate = nn.Parameter(gate)
        self.offset = None if offset is None else nn.Parameter(offset)
        self.shift = None if shift is None else nn.Parameter(shift)
        self.present: Tensor
        self.register_buffer("present", present)
        self.energy: Tensor | None
        self.register_buffer("energy", energy)
        self.routing = routing
        self.observers: list[Any] = []
        self.poisoned = False  # see `foretune.fusion.verification`

    @property
    def weight(self) -> Any:
        """The base layer's weight, (out, in): some models (T5) read its dtype."""
        return self._outside(self.base.weight)

    @property
    def bias(self) -> Any:
        """The base layer's bias, (out,) or None."""
        return self._outside(self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        p = self.probabilities(x)
        for observe in self.observers:
            observe(self, x, p)
        return self.base(x) + self.experts(x, p)

    def logits(self, x: Tensor) -> Tensor:
        """Norm of x in each expert's gate directions: (..., in) → (..., T), float32."""
        projected = torch.einsum("...i,tgi->...tg", x.to(self.gate.dtype), self.gate)
        if self.offset is not None:
            projected = projected - self.offset
        return projected.float().norm(dim=-1)

    def probabilities(self, x: Tensor) -> Tensor:
        """Weight of each expert: (..., in) → (..., T), or (..., 1, T) for all tokens.

        Weights sum to 1.

        Raises:
            UserError: Routing by task and no task was chosen, or the number of tasks is not that of
                the rows.
        """
        if self.routing.weights is not None:
            return self._chosen(x)
        if self.routing.granularity == "task":
            raise UserError(
                "routing=task needs a task: call set_task(NAME) first; the experts are "
                f"{', '.join(self.routing.names)}"
            )
        logits = self.logits(x)
        if self.routing.granularity == "sequence" and x.dim() == 3:
            logits = self._over_sequence(logits, self.routing.tokens(x))
        logits = logits.masked_fill(~self.present, float("-inf"))
        top_k = min(self.routing.top_k, len(self.present))
        value, index = logits.topk(top_k, dim=-1)
        # The softmax over the chosen experts is that over all experts, renormalised.
        return torch.zeros_like(logits).scatter(-1, index, value.softmax(dim=-1)).to(x.dtype)

    def experts(self, x: Tensor, p: Tensor) -> Tensor:
        """Weighted sum of the experts' outputs: (..., in), (..., T) → (..., out)."""
        dtype = self.up.dtype
        p = p.to(dtype)
        if self.down is None:
            outputs = torch.einsum("...i,toi->...to", x.to(dtype), self.up)
            out = torch.einsum("...t,...to->...o", p.expand(*x.shape[:-1], -1), outputs)
        else:
            # All experts as one matrix with T · k columns; those not chosen are multiplied by zero.
            hidden = torch.einsum("...i,tki->...tk", x.to(dtype), self.down) * p.unsqueeze(-1)
            out = torch.einsum("...tk,tok->...o", hidden, self.up)
        if self.shift is not None:
            out = out + p @ self.shift
        return out.to(x.dtype)

    def _outside(self, value: Any) -> Any:
        """What a module that reads the layer's tensors instead of calling it gets to see."""
        if not self.poisoned or value is None or not value.is_floating_point():
            return value
        return torch.full_like(value, float("nan"))

    def _chosen(self, x: Tensor) -> Tensor:
        weights = self.routing.weights
        assert weights is not None
        weights = weights.to(device=x.device, dtype=x.dtype)
        if weights.dim() == 1:
            return weights.expand(*(1,) * (x.dim() - 1), -1)
        if x.dim() < 2 or len(weights) != len(x):
            raise UserError(
                f"got {len(weights)} tasks, but a layer's input has {x.shape[0]} rows; give one "
                "task for all rows, or one per row"
            )
        return weights.view(len(weights), *(1,) * (x.dim() - 2), -1)

    def _over_sequence(self, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """Mean over the sequence, or over the tokens so far if causal: (rows, 1 or length, T)."""
        count = torch.ones_like(logits[..., :1]) if tokens is None else tokens.unsqueeze(-1).float()
        if self.routing.causal:
            return (logits * count).cumsum(1) / count.cumsum(1).clamp_min(1)
        return (logits * count).sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp_min(1)


class TaskHeads(nn.Module):
    """One head per task; `selected` answers.

    Args:
        heads: One module per task, in the order of the experts; their widths may differ.
        routing: Shared by the layers of a model.
        base_head: The base's head, which does not answer.
    """

    def __init__(self, heads: Sequence[nn.Module], routing: Routing, base_head: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.base_head = (base_head,)  # in a tuple, so that it is not part of the model
        self.routing = routing
        self.selected: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the selected head.

        Raises:
            UserError: No head is selected.
        """
        if self.selected is None:
            raise UserError(
                "each task has its own head: choose one with set_task(NAME); there are "
                f"{', '.join(self.routing.names)}"
            )
        return self.heads[self.selected](*args, **kwargs)


@dataclass
class Usage:
    """How often each expert was chosen, layer by layer.

    Args:
        names: Names of the experts.
        layers: Layer → (T,) shares that sum to 1, padding not counted.
    """

    names: list[str]
    layers: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        """Each expert's share, averaged over the layers."""
        if not self.layers:
            return dict.fromkeys(self.names, 0.0)
        total = torch.stack(list(self.layers.values())).mean(0)
        return dict(zip(self.names, total.tolist(), strict=True))


@contextmanager
def observe(
    model: nn.Module, observer: Callable[[str, LowRankExperts, Tensor, Tensor], Any]
) -> Iterator[None]:
    """Call observer(name, layer, x, p) in each layer with experts inside the `with` block.

    x is the layer's input (..., in), p the experts' weights (..., T).
    """
    layers = expert_layers(model)
    observers = {name: partial(observer, name) for name in layers}
    for name, layer in layers.items():
        layer.observers.append(observers[name])
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.observers.remove(observers[name])


@contextmanager
def count_usage(model: nn.Module, names: Sequence[str]) -> Iterator[Usage]:
    """Count which experts are chosen inside the `with` block; filled when the block ends."""
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


def expert_layers(model: nn.Module) -> dict[str, LowRankExperts]:
    """The layers with experts, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankExperts)}


def energy_kept(model: nn.Module) -> float:
    """The share of the changes' energy that the experts hold, averaged over the layers."""
    shares = []
    for layer in expert_layers(model).values():
        energies = [] if layer.energy is None else [e for e in layer.energy.tolist() if e >= 0]
        shares.append(sum(energies) / len(energies) if energies else 1.0)
    return sum(shares) / len(shares) if shares else 1.0


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module of that name by `new`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
