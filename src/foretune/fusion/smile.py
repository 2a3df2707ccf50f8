"""SMILE: fuse fine-tuned models into a mixture of low-rank experts, without data or training.

Paper: Tang et al., "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From
Pre-Trained Foundation Models", 2024, arXiv:2408.10174.

Each linear layer keeps the base's weight; the change of model i becomes expert i:

    D_i = W_i − W_0 = U_i S_i V_iᵀ
    r_i(x) = ‖ V_i[:, :g]ᵀ x ‖,   p = softmax over the top K of r, the rest 0
    y = W_0 x + b_0 + Σ_i p_i ( U_i[:, :k] S_i[:k] V_i[:, :k]ᵀ x + b_i − b_0 )

    symbol  here        shape      meaning
    T                              number of fine-tuned models
    k       k                      rank of an expert
    g       gate_k                 rank of its gate
    K       top_k                  experts per token
    V_iᵀ    down, gate  (k, in)    right singular vectors of D_i
    U_i S_i up          (out, k)   left singular vectors, scaled by the singular values

Deviations:
    - An expert without a change in a layer is never chosen there. The authors' code builds its gate
      from the singular vectors of a zero matrix, so its choice is arbitrary.
    - A layer where only the bias changed has experts too (the authors' code drops them).
    - A LoRA expert is decomposed exactly through its factors, without forming B A; a change of a
      large layer by a randomised SVD (`foretune.linalg.low_rank`).
    - Output embeddings (lm_head) and task heads get no experts: heads are kept per task.
    - Besides the paper's gate there is one from a few activations, and besides routing by token
      there are routing by sequence and by task. Which is best, held-out rows tell
      (`foretune.fusion.comparison`): on LoRA experts the paper's gate did worse than plain
      averaging in our measurements.
Silent in the paper:
    - Padding: it counts neither in routing by sequence nor in `usage`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.errors import UserError
from foretune.method import Method
from foretune.run import check_int, check_one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foretune.fusion.finetuned import Finetuned, Source
    from foretune.fusion.fused import Fused
    from foretune.fusion.heads import Heads
    from foretune.fusion.mixture import Routing

PAPER = {
    "title": "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained "
    "Foundation Models",
    "authors": "Anke Tang and Li Shen and Yong Luo and Shuai Xie and Han Hu and Lefei Zhang and "
    "Bo Du and Dacheng Tao",
    "year": 2024,
    "venue": "arXiv",
    "arxiv": "2408.10174",
}


@dataclass(frozen=True, kw_only=True)
class SMILE(Method):
    """Fuse models over one base: each linear layer routes to low-rank experts, without training.

    Args:
        k: Rank of an expert; null for full rank.
        gate_k: Rank of an expert's gate. Near the layer's width all gates are alike.
        top_k: Experts per choice, weighted by a softmax of their gates.
        gate: "weights" (the paper's: directions that fine-tuning changed) or "activations"
            (directions in which a task's inputs stand out; needs `samples`).
        routing: "token" (the paper's), "sequence" (one choice per sequence and layer), or "task"
            (your choice, by `set_task`).
        routing_use_diff: Whether the gate's directions are those of the change (the paper's); False
            takes those of the fine-tuned weight itself, an option of the authors' code.
        rest: Parameters outside the fused layers (embeddings, norms, convolutions): "base" keeps
            the base's, "average" takes the mean of the models.
        target_modules: Layers to fuse, by the end of their names or by pattern (`*.attention.*`);
            null for every linear layer.
        exclude_modules: Modules that stay as in the base with all their submodules, named in the
            same way.
    """

    k: int | None = 32
    gate_k: int = 16
    top_k: int = 1
    gate: Literal["weights", "activations"] = "weights"
    routing: Literal["token", "sequence", "task"] = "token"
    routing_use_diff: bool = True
    rest: Literal["base", "average"] = "base"
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()

    name: ClassVar[str] = "smile"
    label: ClassVar[str] = "SMILE"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_int("k", self.k, 1, optional=True)
        check_int("gate_k", self.gate_k, 1)
        check_int("top_k", self.top_k, 1)
        check_one_of("gate", self.gate, ("weights", "activations"))
        check_one_of("routing", self.routing, ("token", "sequence", "task"))
        check_one_of("rest", self.rest, ("base", "average"))
        if not isinstance(self.routing_use_diff, bool):
            raise UserError(
                f"routing_use_diff must be true or false, got {self.routing_use_diff!r}"
            )
        if not self.routing_use_diff and self.gate != "weights":
            raise UserError("routing_use_diff=false chooses the weights of gate=weights")
        for field in ("target_modules", "exclude_modules"):
            value = getattr(self, field)
            if value is None and field == "target_modules":
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise UserError(f"{field} must be a list of module names, got {value!r}")
            # A tuple, so that the record is hashable and equal after a round trip through JSON.
            object.__setattr__(self, field, tuple(str(name) for name in value))

    @override
    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def fuse(
        self,
        base: Source,
        finetuned: Mapping[str, Source],
        samples: Mapping[str, Sequence[Any]] | None = None,
        tokenizer: Any = None,
        *,
        allow_unverified: bool = False,
    ) -> Fused:
        """Fuse models over one base; the inputs are left unchanged.

        Args:
            base: A model, or its folder.
            finetuned: Name → a model, a folder, a PEFT model or a PEFT folder.
            samples: For gate="activations": name → a few texts of the task, or batches (mappings
                that the model is called with).
            tokenizer: Tokenizer of the sample texts, where the base's folder has none.
            allow_unverified: Whether to take adapters that do not record their base.

        Raises:
            UserError: The models do not fit the base, a layer cannot be fused, no layer changed, or
                samples are missing for a gate that needs them.
        """
        import torch

        from foretune.fusion.activation_gate import batches
        from foretune.fusion.finetuned import check_all_used
        from foretune.fusion.fused import Fused, watch_mask
        from foretune.fusion.heads import keep_heads
        from foretune.fusion.mixture import Routing
        from foretune.fusion.skeleton import make_skeleton, open_finetuned
        from foretune.fusion.verification import verify

        self._check_samples(finetuned, samples)
        model, base_tokenizer = make_skeleton(base, finetuned)
        self._check_model(model)
        routing = Routing(list(finetuned), self.routing, self.top_k, causal=_generates(model))
        total = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            experts = [
                open_finetuned(name, source, model, allow_unverified=allow_unverified)
                for name, source in finetuned.items()
            ]
            heads = keep_heads(model, experts, routing)
            report = {"base_parameters": total, **self._fuse_all(model, experts, heads, routing)}
        check_all_used(experts)
        watch_mask(model, routing)
        fused = Fused(
            model.eval(),
            list(finetuned),
            self.to_dict(),
            routing,
            heads.labels,
            report,
            base_tokenizer or tokenizer,
        )
        batch = None
        if samples is not None:
            batch = next(batches(fused.tokenizer, next(iter(samples.values()))))
        verify(model, routing, report, batch)
        if samples is not None and self.gate == "activations":
            from foretune.fusion.activation_gate import RIDGE, set_gates

            set_gates(fused, samples, self.gate_k, RIDGE)
        report["extra_parameters"] = sum(p.numel() for p in model.parameters()) - total
        return fused

    def add_expert(self, fused: Fused, name: str, source: Source, **options: Any) -> None:
        """Add a model to one that this method fused; see `Fused.add_expert`."""
        from foretune.fusion.membership import add_expert

        add_expert(fused, self, name, source, **options)

    def remove_expert(self, fused: Fused, name: str, **options: Any) -> None:
        """Remove a model from one that this method fused; see `Fused.remove_expert`."""
        from foretune.fusion.membership import remove_expert

        remove_expert(fused, self, name, **options)

    def _fuse_all(
        self, model: nn.Module, experts: Sequence[Finetuned], heads: Heads, routing: Routing
    ) -> dict[str, Any]:
        """Replace the linear layers one by one, then see to the rest; returns the report.

        Raises:
            UserError: No linear layer differs from the base.
        """
        from foretune.fusion.mixture import energy_kept, expert_layers, replace_module
        from foretune.fusion.rest import change_rest, tensor_names

        names = tensor_names(model)
        handled: set[str] = set()
        for name, layer in self._layers(model, heads).items():
            fused = self._fused_layer(name, layer, experts, routing)
            handled |= {f"{name}.{key}" for key, _ in layer.named_parameters()}
            if fused is not None:
                replace_module(model, name, fused)
        for name in (name for name in names if _inside(name, self.exclude_modules)):
            handled.add(name)
            for expert in experts:
                expert.skip(name)
        rest = [name for name in names if name not in handled and not heads.hold(name)]
        left_out = change_rest(model, experts, rest, average=self.rest == "average")
        num_layers = len(expert_layers(model))
        if not num_layers and not heads.changed:
            raise UserError(_nothing_fused(left_out))
        return {
            "layers": num_layers,
            "energy_kept": energy_kept(model),
            "left_out": left_out,
            "notes": self._notes(experts, left_out),
        }

    def _notes(self, experts: Sequence[Finetuned], left_out: Sequence[str]) -> list[str]:
        notes = []
        if left_out and self.rest == "base":
            notes.append(
                f"{len(left_out)} parameters outside the fused layers differ and stay as in the "
                f"base: {', '.join(left_out[:3])}{' …' if len(left_out) > 3 else ''}"
            )
        return [*notes, *(note for expert in experts for note in expert.notes)]

    def _layers(self, model: nn.Module, heads: Heads) -> dict[str, nn.Module]:
        """The linear layers that may get experts, by name.

        Raises:
            UserError: A name in target_modules matches none.
        """
        from torch import nn
        from transformers import Conv1D

        output = getattr(model, "get_output_embeddings", lambda: None)()
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and not heads.hold(f"{name}.")
            and not type(module).__name__.startswith("NonDynamicallyQuantizable")
            and (module is not output or self.target_modules is not None)
        }
        if self.target_modules is not None:
            for target in self.target_modules:
                if not any(_matches(name, [target]) for name in layers):
                    ends = sorted({name.rpartition(".")[2] for name in layers})
                    raise UserError(
                        f"no module matches target_modules=['{target}']; "
                        f"{type(model).__name__} has: {', '.join(ends)}"
                    )
            layers = {n: m for n, m in layers.items() if _matches(n, self.target_modules)}
        return {n: m for n, m in layers.items() if not _inside(n, self.exclude_modules)}

    def _fused_layer(
        self, name: str, layer: Any, experts: Sequence[Finetuned], routing: Routing
    ) -> nn.Module | None:
        """The layer with experts; None if no model changes it."""
        import torch

        from foretune.fusion.mixture import LowRankExperts

        triplets, energies = [], []
        for expert in experts:
            factors, energy = self._factors(name, layer, expert)
            triplets.append(factors)
            energies.append(energy)
        biases = [
            None if layer.bias is None else expert.change(f"{name}.bias", layer.bias)
            for expert in experts
        ]
        if all(f is None for f in triplets) and all(b is None for b in biases):
            return None
        weight = layer.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        placement = {"device": weight.device, "dtype": dtype}
        size_out, size_in = _shape(layer)
        zeros = (torch.zeros(size_out, 1), torch.zeros(1), torch.zeros(1, size_in))
        padded = [zeros if f is None else f for f in triplets]
        down = _stack([vh for _, _, vh in padded], self.k)
        up = _stack([(u * s).T for u, s, _ in padded], self.k).transpose(1, 2)
        present = [f is not None or b is not None for f, b in zip(triplets, biases, strict=True)]
        directions = [vh for _, _, vh in padded]
        if not self.routing_use_diff:
            for i in (i for i, is_present in enumerate(present) if is_present):
                directions[i] = self._weight_directions(name, layer, experts[i]).cpu()
        shift = None
        if any(b is not None for b in biases):
            shift = torch.stack([torch.zeros(size_out) if b is None else b.cpu() for b in biases])
        return LowRankExperts(
            layer,
            up=(up @ down if self.k is None else up).to(**placement).contiguous(),
            down=None if self.k is None else down.to(**placement),
            gate=_stack(directions, self.gate_k).to(**placement),
            offset=None,
            shift=None if shift is None else shift.to(**placement),
            present=torch.tensor(present, device=weight.device),
            routing=routing,
            energy=torch.tensor([-1.0 if e is None else e for e in energies], device=weight.device),
        )

    def _factors(
        self, name: str, layer: Any, expert: Finetuned
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, float | None]:
        """An expert's leading singular triplets, and the share of energy in the first k."""
        import torch
        from transformers import Conv1D

        from foretune.linalg.low_rank import svd_of_product, truncated_svd

        rank = None if self.k is None else max(self.k, self.gate_k)
        pair = expert.pair(f"{name}.weight")
        if pair is not None:
            factors = svd_of_product(pair.up, pair.down)
            total = torch.linalg.vector_norm(factors[1], dtype=torch.float64).square()
            if not total:
                return None, None
        else:
            change = expert.change(f"{name}.weight", layer.weight)
            if change is None:
                return None, None
            factors = truncated_svd(change.T if isinstance(layer, Conv1D) else change, rank)
            total = torch.linalg.vector_norm(change, dtype=torch.float64).square()
        energy = factors[1][: self.k].double().square().sum()
        u, s, vh = (factor.cpu() for factor in factors)
        factors = u[:, :rank].clone(), s[:rank].clone(), vh[:rank].clone()
        return factors, min(1.0, float(energy / total))

    def _weight_directions(self, name: str, layer: Any, expert: Finetuned) -> Tensor:
        """The leading right singular vectors of a model's weight itself, (gate_k, in)."""
        from transformers import Conv1D

        from foretune.linalg.low_rank import truncated_svd

        weight, change = layer.weight.float(), expert.change(f"{name}.weight", layer.weight)
        weight = weight if change is None else weight + change
        return truncated_svd(weight.T if isinstance(layer, Conv1D) else weight, self.gate_k)[2]

    def _check_model(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if self.routing == "sequence" and getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"routing=sequence is not for an encoder-decoder ({type(model).__name__}), whose "
                "layers read two sequences; use routing=token or routing=task"
            )

    def _check_samples(
        self, finetuned: Mapping[str, Source], samples: Mapping[str, Sequence[Any]] | None
    ) -> None:
        if not finetuned:
            raise UserError("nothing to fuse: give at least one fine-tuned model")
        if self.top_k > len(finetuned):
            raise UserError(
                f"top_k={self.top_k} exceeds the number of fused models, {len(finetuned)}"
            )
        if self.gate == "weights":
            if samples is not None:
                raise UserError("samples are for gate=activations; gate=weights takes none")
            return
        missing = [name for name in finetuned if not (samples or {}).get(name)]
        if missing:
            raise UserError(
                f"gate=activations needs samples of every task; none for {', '.join(missing)}"
            )


def _nothing_fused(left_out: Sequence[str]) -> str:
    if left_out:
        return (
            f"no linear layer differs from the base, only {', '.join(left_out[:3])}"
            f"{' …' if len(left_out) > 3 else ''}: they get no experts; use another method, or "
            "target_modules for output embeddings"
        )
    return (
        "no linear layer differs between the base and the fine-tuned models: give the base "
        "that they were tuned from, and target_modules that include the changed layers"
    )


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate())


def _matches(name: str, targets: Sequence[str]) -> bool:
    """Whether a target is the module's full name, the end of it, or a pattern for it."""
    return any(name == t or name.endswith(f".{t}") or fnmatch.fnmatchcase(name, t) for t in targets)


def _inside(name: str, targets: Sequence[str]) -> bool:
    """Whether a module or parameter is, or lies in, a module that a target matches."""
    return any(_matches(path, targets) for path in accumulate(name.split("."), "{}.{}".format))


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, or of a `Conv1D`, whose weight is stored transposed."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def _stack(factors: Sequence[Tensor], limit: int | None) -> Tensor:
    """(T, r, size) of each factor's leading rows; factors of lower rank end in zero rows."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([factor[:limit] for factor in factors], batch_first=True)
