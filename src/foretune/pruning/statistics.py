"""What the routers of a mixture do on a task's tokens, counted by hooks; padding is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from foretune.pruning.experts import ExpertBlock, Routing, routing_of


@dataclass
class ExpertStatistics:
    """Sums over the tokens of one block; E experts, H hidden size.

    Args:
        num_tokens: N.
        frequency: (E,) how often each expert was chosen; their sum is top_k · N, less what a
            capacity turned away.
        gate_sum: (E,) Σ of the weights with which it was chosen.
        logit_sum: (E,) Σ_t h_t of the router's logits.
        logit_products: (E, E) Σ_t h_t h_tᵀ.
        activation: (E,) Σ g·‖f‖ over the tokens that it was chosen for: weight times norm of its
            output; None where outputs were not asked for.
        activation_renormalised: The same with a token's weights scaled to sum to one.
        output_sum: (E, H) Σ_t f_e(x_t) over all tokens, chosen or not; None likewise.
    """

    num_tokens: int
    frequency: np.ndarray
    gate_sum: np.ndarray
    logit_sum: np.ndarray
    logit_products: np.ndarray
    activation: np.ndarray | None = None
    activation_renormalised: np.ndarray | None = None
    output_sum: np.ndarray | None = None

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int | None) -> ExpertStatistics:
        """Zeros; with `hidden_size` those of outputs too."""
        e = num_experts
        made = cls(0, np.zeros(e), np.zeros(e), np.zeros(e), np.zeros((e, e)))
        if hidden_size is not None:
            made.activation, made.activation_renormalised = np.zeros(e), np.zeros(e)
            made.output_sum = np.zeros((e, hidden_size))
        return made

    def correlation(self) -> np.ndarray:
        """(E, E) cosine of the centred logit columns; 0 beside a column that never varies."""
        n = max(self.num_tokens, 1)
        mean = self.logit_sum / n
        covariance = self.logit_products / n - np.outer(mean, mean)
        deviation = np.sqrt(np.diag(covariance).clip(0))
        known = deviation > 1e-6 * max(deviation.max(), 1e-12)
        scale = np.where(known, 1 / np.where(known, deviation, 1), 0)
        found = covariance * np.outer(scale, scale)
        np.fill_diagonal(found, 1)
        return found.clip(-1, 1)

    def cosine(self) -> np.ndarray:
        """(E, E) cosine of the logit columns as they are."""
        norm = np.sqrt(np.diag(self.logit_products)).clip(1e-12)
        return (self.logit_products / np.outer(norm, norm)).clip(-1, 1)


class Collector:
    """Counts while the model runs inside the `with` block.

    Set `mask` (and `decoder_mask` for an encoder-decoder) before every forward pass: (n, L), true
    where a token is no padding; None where all are.

    Args:
        blocks: Of the model.
        outputs: Whether to run every expert on every token, for the statistics that need it.
    """

    def __init__(self, blocks: Sequence[ExpertBlock], *, outputs: bool) -> None:
        self.blocks = blocks
        self.outputs = outputs
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.found: dict[str, ExpertStatistics] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        for block in self.blocks:
            self._handles.append(block.router.register_forward_hook(self._hook(block)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, block: ExpertBlock) -> Any:
        in_decoder = "decoder" in block.name.split(".")

        def count(module: Any, args: Any, output: Any) -> None:
            routing = routing_of(output)
            assert routing is not None  # `find_blocks` has tried it
            x = args[0].reshape(-1, args[0].shape[-1])
            mask = self.decoder_mask if in_decoder and self.decoder_mask is not None else self.mask
            if mask is not None:
                there = mask.reshape(-1).bool().to(x.device)
                x = x[there]
                routing = Routing(
                    routing.logits[there], routing.scores[there], routing.indices[there]
                )
            found = self.found.get(block.name)
            if found is None:
                size = x.shape[-1] if self.outputs else None
                found = self.found[block.name] = ExpertStatistics.empty(block.num_experts, size)
            _add(found, block, x, routing)

        return count


@torch.no_grad()
def _add(found: ExpertStatistics, block: ExpertBlock, x: Tensor, routing: Routing) -> None:
    logits, scores = routing.logits.double(), routing.scores.double()
    there = routing.indices >= 0
    gates = torch.zeros_like(logits)
    gates.scatter_add_(1, routing.indices.clamp(min=0), scores * there)
    chosen = torch.zeros_like(logits)
    chosen.scatter_add_(1, routing.indices.clamp(min=0), there.double())
    found.num_tokens += len(x)
    found.frequency += _numpy(chosen.sum(0))
    found.gate_sum += _numpy(gates.sum(0))
    found.logit_sum += _numpy(logits.sum(0))
    found.logit_products += _numpy(logits.T @ logits)
    if found.activation is None:
        return
    assert found.activation_renormalised is not None and found.output_sum is not None
    total = gates.sum(1, keepdim=True).clamp(min=1e-20)
    for expert in range(block.num_experts):
        output = block.output(expert, x).double()
        norm = output.norm(dim=1)
        found.activation[expert] += float((gates[:, expert] * norm).sum())
        found.activation_renormalised[expert] += float(
            (gates[:, expert] / total[:, 0] * norm).sum()
        )
        found.output_sum[expert] += _numpy(output.sum(0))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
