"""Statistics of a mixture's routers on a task's tokens, collected by hooks, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from foretune.pruning.experts import ExpertBlock
from foretune.pruning.routers import RouterOutput, parse_router_output

WEIGHTS = ("softmax", "router", "renormalised softmax", "renormalised router")


@dataclass
class ExpertStatistics:
    """Sums over the N tokens that reached one block; E experts, H hidden size.

    Args:
        num_tokens: N.
        frequency: (E,), how often each expert was chosen; the sum is top_k · N, less the choices
            beyond an expert's capacity.
        gate_sum: (E,), Σ of the weights with which each expert was chosen.
        logit_sum: (E,), Σ_t h_t of the router's logits.
        logit_products: (E, E), Σ_t h_t h_tᵀ.
        activation: Kind of weight → (E,), Σ g·‖f‖ over the tokens an expert was chosen for, its
            weight times the norm of its output; None without statistics of outputs. The kinds are
            "softmax" (of the router's logits) and "router" (the router's own weights), and
            "renormalised softmax" and "renormalised router", scaled to sum to one for each token.
        output_sum: (E, H), Σ_t f_e(x_t) over all tokens, chosen or not; None without statistics of
            outputs.
    """

    num_tokens: int
    frequency: np.ndarray
    gate_sum: np.ndarray
    logit_sum: np.ndarray
    logit_products: np.ndarray
    activation: dict[str, np.ndarray] | None = None
    output_sum: np.ndarray | None = None

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int | None) -> ExpertStatistics:
        """Statistics of no tokens; with a `hidden_size` including those of outputs."""
        e = num_experts
        zeros = cls(0, np.zeros(e), np.zeros(e), np.zeros(e), np.zeros((e, e)))
        if hidden_size is not None:
            zeros.activation = {kind: np.zeros(e) for kind in WEIGHTS}
            zeros.output_sum = np.zeros((e, hidden_size))
        return zeros

    def correlation(self) -> np.ndarray:
        """Cosine of the centred logit columns, (E, E); 0 with a column that is constant."""
        n = max(self.num_tokens, 1)
        mean = self.logit_sum / n
        covariance = self.logit_products / n - np.outer(mean, mean)
        deviation = np.sqrt(np.diag(covariance).clip(0))
        varies = deviation > 1e-6 * max(deviation.max(), 1e-12)
        scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
        correlation = covariance * np.outer(scale, scale)
        np.fill_diagonal(correlation, 1)
        return correlation.clip(-1, 1)

    def cosine(self) -> np.ndarray:
        """Cosine of the logit columns, not centred, (E, E)."""
        norm = np.sqrt(np.diag(self.logit_products)).clip(1e-12)
        return (self.logit_products / np.outer(norm, norm)).clip(-1, 1)


class Collector:
    """Collects statistics of the forward passes inside its `with` block.

    Set `mask` (and `decoder_mask` for an encoder-decoder) before every forward pass: (n, L), true
    where a token is not padding; None without padding.

    Args:
        blocks: The model's blocks of experts.
        outputs: Run every expert on every token, for the statistics of outputs.
    """

    def __init__(self, blocks: Sequence[ExpertBlock], *, outputs: bool) -> None:
        self.blocks = blocks
        self.outputs = outputs
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.statistics: dict[str, ExpertStatistics] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        for block in self.blocks:
            self._handles += self._hooks(block)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hooks(self, block: ExpertBlock) -> list[RemovableHandle]:
        """Hooks that count a block's tokens: by what the router says, and what the experts read.

        The two may read different vectors (Gemma 4 normalises each anew). A list of networks is not
        called as one module, and Llama 4's experts read every token multiplied by each weight, so
        there the router's input is taken for that of the experts.
        """
        apart = block.fused and not block.scales_inputs
        in_decoder = "decoder" in block.name.split(".")
        routings: list[RouterOutput] = []

        def routed(module: Any, args: Any, output: Any) -> None:
            routing = parse_router_output(output)
            assert routing is not None  # checked by `find_blocks`
            if apart:
                routings[:] = [routing]
            else:
                count(args[0], routing)

        def read(module: Any, args: Any, options: Any) -> None:
            if routings:
                count(args[0] if args else options["hidden_states"], routings.pop())

        def count(hidden: Tensor, routing: RouterOutput) -> None:
            x = hidden.reshape(-1, hidden.shape[-1])
            mask = self.decoder_mask if in_decoder and self.decoder_mask is not None else self.mask
            if mask is not None:
                tokens = mask.reshape(-1).bool().to(x.device)
                x = x[tokens]
                routing = RouterOutput(
                    routing.logits[tokens], routing.scores[tokens], routing.indices[tokens]
                )
            if block.name not in self.statistics:
                size = x.shape[-1] if self.outputs else None
                self.statistics[block.name] = ExpertStatistics.empty(block.num_experts, size)
            _add(self.statistics[block.name], block, x, routing)

        handles = [block.router.register_forward_hook(routed)]
        if apart:
            handles.append(block.experts.register_forward_pre_hook(read, with_kwargs=True))
        return handles


@torch.no_grad()
def _add(sums: ExpertStatistics, block: ExpertBlock, x: Tensor, routing: RouterOutput) -> None:
    logits, scores = routing.logits.double(), routing.scores.double()
    routed = routing.indices >= 0
    gates = torch.zeros_like(logits)
    gates.scatter_add_(1, routing.indices.clamp(min=0), scores * routed)
    chosen = torch.zeros_like(logits)
    chosen.scatter_add_(1, routing.indices.clamp(min=0), routed.double())
    sums.num_tokens += len(x)
    sums.frequency += _numpy(chosen.sum(0))
    sums.gate_sum += _numpy(gates.sum(0))
    sums.logit_sum += _numpy(logits.sum(0))
    sums.logit_products += _numpy(logits.T @ logits)
    if sums.activation is None:
        return
    assert sums.output_sum is not None
    by_kind = {"softmax": logits.softmax(1) * chosen, "router": gates}
    for kind, weights in [*by_kind.items()]:
        total = weights.sum(1, keepdim=True).clamp(min=1e-20)
        by_kind[f"renormalised {kind}"] = weights / total
    for expert in range(block.num_experts):
        output = block.output(expert, x).double()
        norm = output.norm(dim=1)
        for kind, weights in by_kind.items():
            sums.activation[kind][expert] += float((weights[:, expert] * norm).sum())
        sums.output_sum[expert] += _numpy(output.sum(0))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
